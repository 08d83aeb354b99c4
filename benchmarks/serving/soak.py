"""Resident memory over time: ``python -m benchmarks.serving.soak [--full] [--leak]`` (10 min).

Clients ask for every kind of answer without pause. After a warm-up of a fifth of the time,
memory may grow by 20 MB at most. ``--leak`` plants one in the service, of 20 kB per request
(500 kB in the short form, which sees few of them), and the same test must catch it.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

from benchmarks.serving.harness import (
    Connection,
    Load,
    closed_loop,
    demo_bundle,
    machine,
    median,
    ours,
    scene,
    server,
    write,
)

LIMIT_MB = 20.0
LEAK = """
import sys
from serve import segmenting
kept, render = [], segmenting.render
def leaking(*arguments):
    kept.append(bytearray(SIZE))
    return render(*arguments)
segmenting.render = leaking
sys.argv = ["fdconv", *sys.argv[1:]]
from fdconv_deploy.cli import main
main()
"""
PATHS = [
    "/v1/segment?output=mask",
    "/v1/segment?mask=polygons",
    "/v1/segment",
    "/v1/segment?output=overlay",
    "/v1/segment?output=logits",
    "/v1/segment?output=svg",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="10 minutes.")
    parser.add_argument("--leak", action="store_true", help="Plant one.")
    arguments = parser.parse_args()
    seconds = 600.0 if arguments.full else 20.0
    command = ours(demo_bundle(arguments.bundle))
    if arguments.leak:
        size = "20_000" if arguments.full else "500_000"
        command = [sys.executable, "-c", LEAK.replace("SIZE", size), *command[3:]]
    body, about = scene(), machine()
    with server(command) as found:
        counter = iter(range(10**9))

        def ask(plug: Connection) -> int:
            path = PATHS[next(counter) % len(PATHS)]
            data = body if next(counter) % 11 else body[:500]
            plug.post(path, data, {"Content-Type": "image/jpeg"})
            return 200

        loads: list[Load] = []
        loading = threading.Thread(
            target=lambda: loads.append(
                closed_loop(found.port, ask, connections=4, seconds=seconds)
            )
        )
        loading.start()
        start, samples = time.monotonic(), []
        while loading.is_alive():
            samples.append((time.monotonic() - start, found.rss()))
            time.sleep(seconds / 200)
        loading.join()
    early = [mb for at, mb in samples if seconds / 5 <= at < 2 * seconds / 5]
    late = [mb for at, mb in samples if at >= 4 * seconds / 5]
    grown = median(late) - median(early)
    verdict = "steady" if grown <= LIMIT_MB else "leaks"
    write(
        "soak-leak" if arguments.leak else "soak",
        {
            "machine": about,
            "seconds": seconds,
            "requests": loads[0].count(),
            "resident MB after warm-up, at the end": [
                round(median(early), 1),
                round(median(late), 1),
            ],
            "grown MB": round(grown, 1),
            "limit MB": LIMIT_MB,
            "verdict": verdict,
        },
        keep=arguments.full,
    )
    sys.exit((verdict == "leaks") != arguments.leak)


if __name__ == "__main__":
    main()
