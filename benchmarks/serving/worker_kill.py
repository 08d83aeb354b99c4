"""A worker killed under load: ``python -m benchmarks.serving.worker_kill [--full]``.

The service runs with ``--isolation process`` and two workers; every so often one of its worker
processes is killed with SIGKILL while eight clients ask without pause. Only requests that the
worker had may fail, with a 503 that says when to try again, and no connection may break.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from pathlib import Path

from benchmarks.serving.harness import (
    HEADERS,
    Connection,
    Load,
    closed_loop,
    demo_bundle,
    finish,
    machine,
    ours,
    scene,
    server,
)
from fdconv_deploy.runtime import Bundle

WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="20 kills.")
    arguments = parser.parse_args()
    kills = 20 if arguments.full else 3
    bundle, body, about, pause = demo_bundle(arguments.bundle), scene(), machine(), 3.0
    largest = max(Bundle.open(bundle).batch_sizes)
    rng = random.Random(0)
    options = ["--isolation", "process", "--workers", str(WORKERS)]
    without_retry: list[int] = []
    with server(ours(bundle, *options)) as found:
        seen: list[Load] = []

        def ask(plug: Connection) -> int:
            status, headers, _ = plug.post("/v1/segment", body, HEADERS)
            if status != 200 and "retry-after" not in headers:
                without_retry.append(status)
            return status

        loading = threading.Thread(
            target=lambda: seen.append(
                closed_loop(found.port, ask, connections=8, seconds=pause * (kills + 1))
            )
        )
        loading.start()
        for _ in range(kills):
            time.sleep(pause)
            rng.choice(found.process.children()).kill()
        loading.join()
        load = seen[0]
        text = found.get("/metrics")[1].decode()
        deaths = next(
            float(line.split()[1])
            for line in text.splitlines()
            if line.startswith("fdconv_worker_deaths_total")
        )
        alive = len(found.process.children())
    statuses = load.statuses()
    failed = statuses.get(503, 0)
    result = {
        "machine": about,
        "kills": kills,
        "workers": WORKERS,
        "largest batch": largest,
        "statuses": statuses,
        "answered ms p50, p99, most": [round(load.percentile(p), 1) for p in (0.5, 0.99, 1)],
        "deaths counted by the service": deaths,
        "workers at the end": alive,
    }
    held = {
        "only 200 and 503": set(statuses) <= {200, 503},
        # A worker killed while it had nothing fails what it is given next.
        f"at most {largest} requests failed per kill": failed <= largest * kills,
        "every 503 says when to try again": not without_retry,
        "all workers replaced": alive == WORKERS,
    }
    finish("worker-kill", result, held, keep=arguments.full)


if __name__ == "__main__":
    main()
