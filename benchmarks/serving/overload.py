"""Four times what it can do: ``python -m benchmarks.serving.overload [--full]`` (60 s).

Before that, by the default settings, what is no overload: 64 clients of one image and 4 of 16
images each, of whom none is to be turned away. Then the service gets a short queue, and its
capacity is measured with as many clients as keep it busy. Then requests arrive at half that rate,
at four times that rate, and at half of it again, whether answers come or not (an open loop).
Shown: the latency of what is accepted, how quickly the rest is turned away, memory, recovery.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from pathlib import Path

from benchmarks.serving.harness import (
    HEADERS,
    Connection,
    Load,
    Memory,
    closed_loop,
    demo_bundle,
    finish,
    image_request,
    machine,
    median,
    ours,
    scene,
    server,
)

QUEUE = 16
# Of the bound that the queue sets on what is accepted: batches and the machine are not even.
SLACK = 2.0
REJECTED_MS = 50.0
GROWTH_MB = 20.0


def open_loop(port: int, body: bytes, per_second: float, seconds: float, senders: int) -> Load:
    """Requests at a rate of their own. Latency counts from when each was due."""
    load, lock = Load(), threading.Lock()
    due: queue.SimpleQueue[float | None] = queue.SimpleQueue()

    def sender() -> None:
        plug: Connection | None = None
        while (at := due.get()) is not None:
            try:
                plug = plug or Connection(port)
                status, headers, _ = plug.post("/v1/segment", body, HEADERS)
                if status == 503 and "retry-after" not in headers:
                    status = 1  # turned away without being told when to come back
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


def moderate(bundle: Path, seconds: float) -> dict[str, Load]:
    """Clients that ask, wait, and ask again, of a service with its default settings."""
    body, found = scene(), {}
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with server(ours(bundle)) as running:
        for clients, images in ((64, 1), (4, 16)):
            head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="f.jpg"\r\n\r\n'
            form = (head + body + b"\r\n") * images + b"--x--\r\n"
            found[f"{clients} clients of {images}"] = closed_loop(
                running.port,
                lambda plug, form=form: plug.post("/v1/segment", form, headers)[0],
                connections=clients,
                seconds=seconds,
            )
    return found


def described(load: Load) -> dict:
    return {
        "per second": round(sum(load.statuses().values()) / load.wall, 1),
        "statuses": load.statuses(),
        "accepted per second": round(load.per_second(), 1),
        "accepted ms p50, p99, most": [round(load.percentile(p), 1) for p in (0.5, 0.99, 1)],
        "rejected ms p50, p99, most": [round(load.percentile(p, 503), 1) for p in (0.5, 0.99, 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="60 seconds.")
    arguments = parser.parse_args()
    seconds = 60.0 if arguments.full else 6.0
    body, ask, about = scene(), image_request(), machine()
    bundle = demo_bundle(arguments.bundle)
    usual = moderate(bundle, seconds / 3)
    with (
        server(ours(bundle, "--queue", str(QUEUE))) as found,
        Memory(found, 0.25) as memory,
    ):
        warm = max(seconds / 6, 3)
        capacity = closed_loop(found.port, ask, connections=4, seconds=warm).per_second()
        quiet = seconds / 6
        before = open_loop(found.port, body, capacity / 2, quiet, senders=8)
        resident, first = found.rss(), len(memory.samples)
        # Enough senders that rejections, which are quick, never wait for one another.
        flood = open_loop(found.port, body, 4 * capacity, seconds, senders=QUEUE + 16)
        after = open_loop(found.port, body, capacity / 2, quiet, senders=8)
    bound = (QUEUE + 1) / capacity * 1e3
    # A full queue has its images in memory; flat is what it is from then on.
    flooded = [mb for _, mb in memory.samples[first:]]
    full = median(flooded[len(flooded) // 8 : len(flooded) // 6])
    growth = max(flooded) - full
    result = {
        "machine": about,
        "seconds": seconds,
        "by default": {name: described(load) for name, load in usual.items()},
        "capacity per second": round(capacity, 1),
        "queue": QUEUE,
        "bound ms on accepted: (queue + 1) / capacity": round(bound),
        "before, at half capacity": described(before),
        "at 4 x capacity": described(flood),
        "afterwards, at half capacity": described(after),
        "resident MB before the flood, with a full queue, at most": [
            round(mb, 1) for mb in (resident, full, memory.most())
        ],
        "seconds, resident MB": memory.series(),
    }
    held = {
        "nobody turned away by default": all(
            {*load.statuses()} == {200} for load in usual.values()
        ),
        f"p99 of accepted within {SLACK} x the bound": flood.percentile(0.99) <= SLACK * bound,
        f"p99 of rejected within {REJECTED_MS:g} ms": flood.percentile(0.99, 503) <= REJECTED_MS,
        "nothing but 200 and 503 with Retry-After": set(flood.statuses()) <= {200, 503},
        "as many answered as without the flood, less a fifth": flood.per_second() >= 0.8 * capacity,
        f"memory within {GROWTH_MB:g} MB once the queue is full": growth <= GROWTH_MB,
        "afterwards all answered, as quickly as before": set(after.statuses()) == {200}
        and after.percentile(0.5) <= 1.5 * before.percentile(0.5),
    }
    finish("overload", result, held, keep=arguments.full)


if __name__ == "__main__":
    main()
