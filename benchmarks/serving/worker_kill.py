"""A worker killed under load: ``python -m benchmarks.serving.worker_kill [--full]``.

The service runs with ``--isolation process`` and two workers; every so often one of its worker
processes is killed with SIGKILL while eight clients ask without pause. Only requests that the
worker had may fail, with a 503 that says to try again.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from pathlib import Path

from benchmarks.serving.harness import (
    Connection,
    Load,
    closed_loop,
    demo_bundle,
    machine,
    ours,
    scene,
    server,
    write,
)

HEADERS = {"Content-Type": "image/jpeg", "Accept": "image/png"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="20 kills.")
    arguments = parser.parse_args()
    kills = 20 if arguments.full else 3
    body, about, pause = scene(), machine(), 3.0
    rng = random.Random(0)
    options = ["--isolation", "process", "--workers", "2"]
    with server(ours(demo_bundle(arguments.bundle), *options)) as found:
        seen: list[Load] = []

        def ask(plug: Connection) -> int:
            return plug.post("/v1/segment", body, HEADERS)[0]

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
        deaths = [line for line in text.splitlines() if line.startswith("fdconv_worker_deaths_t")]
        write(
            "worker-kill",
            {
                "machine": about,
                "kills": kills,
                "largest batch": 4,
                "statuses": load.statuses(),
                "counted by the service": deaths,
                "workers at the end": len(found.process.children()),
            },
            keep=arguments.full,
        )


if __name__ == "__main__":
    main()
