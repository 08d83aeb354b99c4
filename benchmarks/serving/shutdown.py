"""SIGTERM under load: ``python -m benchmarks.serving.shutdown [--full]``.

Eight clients ask without pause, half for images and half with tensors of half a megabyte, while
the service is told to stop, again and again. A request counts as lost when its connection was
open, the request was sent, and no whole answer came. A connection that is refused afterwards is
not a request: nobody listens any more.
"""

from __future__ import annotations

import argparse
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.serving.harness import (
    Connection,
    demo_bundle,
    finish,
    image_request,
    machine,
    ours,
    server,
    tensor_request,
)

CLIENTS = 8


def once(
    bundle: Path, asks: list[Callable[[Connection], int]], wait: float, *options: str
) -> dict[str, int]:
    counts = {"answered": 0, "turned away": 0, "lost": 0}
    lock = threading.Lock()
    with server(ours(bundle, *options)) as found:

        def count(what: str) -> None:
            with lock:
                counts[what] += 1

        def client(ask: Callable[[Connection], int]) -> None:
            while True:
                try:
                    plug = Connection(found.port)
                except OSError:
                    return  # nobody listens any more
                try:
                    while plug.open:
                        count("answered" if ask(plug) == 200 else "turned away")
                except OSError:
                    count("lost")

        threads = [
            threading.Thread(target=client, args=(asks[n % len(asks)],)) for n in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        time.sleep(wait)
        found.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        counts["exit code"] = found.process.wait(60)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="20 times, and 10 with processes.")
    arguments = parser.parse_args()
    bundle, about = demo_bundle(arguments.bundle), machine()
    asks = [image_request(), tensor_request(bundle)]
    plans = {"thread": 20, "process": 10} if arguments.full else {"thread": 2, "process": 1}
    result, held = {"machine": about, "clients": CLIENTS}, {}
    for isolation, times in plans.items():
        options = ["--isolation", isolation]
        runs = [once(bundle, asks, 0.5 + 0.037 * n, *options) for n in range(times)]
        codes = sorted({run.pop("exit code") for run in runs})
        total = {name: sum(run[name] for run in runs) for name in runs[0]}
        result[f"isolation {isolation}"] = {
            "times": times,
            "total": total,
            "exit codes": codes,
            "runs": runs,
        }
        held[f"{isolation}: every accepted request answered"] = total["lost"] == 0
        held[f"{isolation}: nobody turned away"] = total["turned away"] == 0
        # 128 + SIGTERM: uvicorn ends by the signal it was sent, once all is done.
        held[f"{isolation}: ends by the signal"] = codes == [128 + signal.SIGTERM]
    finish("shutdown", result, held, keep=arguments.full)


if __name__ == "__main__":
    main()
