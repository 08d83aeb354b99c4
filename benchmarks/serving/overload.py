"""Four times what it can do: ``python -m benchmarks.serving.overload [--full]`` (60 s).

First the capacity is measured with as many clients as keep it busy. Then requests arrive at
four times that rate, whether answers come or not (an open loop), and afterwards at half of it.
Shown: the latency of what is accepted, how quickly the rest is turned away, memory, recovery.
"""

from __future__ import annotations

import argparse
import queue
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
QUEUE = 16


def open_loop(port: int, body: bytes, per_second: float, seconds: float, senders: int) -> Load:
    """Requests at a rate of their own. Latency counts from when each was due."""
    load, lock = Load(), threading.Lock()
    due: queue.SimpleQueue[float | None] = queue.SimpleQueue()

    def sender() -> None:
        plug: Connection | None = None
        while (at := due.get()) is not None:
            try:
                plug = plug or Connection(port)
                status = plug.post("/v1/segment", body, HEADERS)[0]
            except OSError:
                status, plug = 0, None
            with lock:
                load.add(status, time.perf_counter() - at)

    threads = [threading.Thread(target=sender) for _ in range(senders)]
    for thread in threads:
        thread.start()
    start = time.perf_counter()
    for number in range(int(per_second * seconds)):
        at = start + number / per_second
        time.sleep(max(at - time.perf_counter(), 0))
        due.put(at)
    for _ in threads:
        due.put(None)
    for thread in threads:
        thread.join()
    load.wall = time.perf_counter() - start
    return load


def described(load: Load) -> dict:
    return {
        "per second": round(sum(load.statuses().values()) / load.wall, 1),
        "statuses": load.statuses(),
        "accepted ms p50, p99": [round(load.percentile(p), 1) for p in (0.5, 0.99)],
        "rejected ms p50, p99": [round(load.percentile(p, 503), 1) for p in (0.5, 0.99)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="60 seconds.")
    arguments = parser.parse_args()
    seconds = 60.0 if arguments.full else 6.0
    body = scene()
    about = machine()
    with server(ours(demo_bundle(arguments.bundle), "--queue", str(QUEUE))) as found:
        capacity = closed_loop(
            found.port,
            lambda plug: plug.post("/v1/segment", body, HEADERS)[0],
            connections=4,
            seconds=max(seconds / 6, 3),
        ).per_second()
        before = found.rss()
        # Enough senders that rejections, which are quick, never wait for one another.
        flood = open_loop(found.port, body, 4 * capacity, seconds, senders=QUEUE + 16)
        during = found.rss()
        after = open_loop(found.port, body, capacity / 2, seconds / 3, senders=8)
        result = {
            "machine": about,
            "seconds": seconds,
            "capacity per second": round(capacity, 1),
            "queue": QUEUE,
            "bound ms on accepted: (queue + 1) / capacity": round((QUEUE + 1) / capacity * 1e3),
            "at 4 x capacity": described(flood),
            "afterwards, at half capacity": described(after),
            "resident MB before, after the flood": [round(before), round(during)],
        }
    write("overload", result, keep=arguments.full)


if __name__ == "__main__":
    main()
