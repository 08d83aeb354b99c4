"""Throughput and added latency: ``python -m benchmarks.serving.throughput [--full]``.

The tensor path against the raw session at equal batch, the JPEG-to-PNG path against the
in-process pipeline, the latency that HTTP adds at concurrency 1, and the same from a plain
FastAPI service and from LitServe on the same bundle. Every side has one thread per run. The
sides take turns, so that a machine's drift hits all alike; quote the ratios, medians of turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.baselines import image_answer
from benchmarks.serving.harness import (
    Connection,
    Load,
    Server,
    closed_loop,
    demo_bundle,
    machine,
    median,
    ours,
    scene,
    server,
    write,
)
from fdconv_deploy.runtime import Session, open_session

LITSERVE_MISSING = "not installed here: pip install litserve"


def kserve(tensor: np.ndarray) -> Callable[[Connection], int]:
    """A KServe v2 request with binary tensors both ways."""
    given = {
        "name": "images",
        "datatype": "FP32",
        "shape": list(tensor.shape),
        "parameters": {"binary_data_size": tensor.nbytes},
    }
    wanted = {"name": "logits", "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [given], "outputs": [wanted]}).encode()
    body = head + tensor.tobytes()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return lambda plug: plug.post("/v2/models/bundle/infer", body, headers)[0]


def raw(path: str, body: bytes, **headers: str) -> Callable[[Connection], int]:
    return lambda plug: plug.post(path, body, headers)[0]


def in_form(path: str, body: bytes) -> Callable[[Connection], int]:
    """As LitServe takes binary data."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    form = head + body + b"\r\n--x--\r\n"
    return raw(path, form, **{"Content-Type": "multipart/form-data; boundary=x"})


def in_process(call: Callable[[], Any], seconds: float) -> Load:
    load, start = Load(), time.perf_counter()
    while (begin := time.perf_counter()) - start < seconds:
        call()
        load.add(200, time.perf_counter() - begin)
    load.wall = time.perf_counter() - start
    return load


def sides(
    session: Session, servers: dict[str, Server], tensor: np.ndarray, jpeg: bytes
) -> dict[str, dict[str, Callable[[int, float], Load]]]:
    """Case -> side -> (connections, seconds) -> what was seen."""

    def over(name: str, ask: Callable[[Connection], int]) -> Callable[[int, float], Load]:
        port = servers[name].port
        return lambda n, s: closed_loop(port, ask, connections=n, seconds=s)

    image = {"Content-Type": "image/jpeg", "Accept": "image/png"}
    tensors = {
        "in process": lambda n, s: in_process(lambda: session.run(tensor), s),
        "fdconv": over("fdconv", kserve(tensor)),
    }
    images = {
        "in process": lambda n, s: in_process(lambda: image_answer(session, jpeg), s),
        "fdconv": over("fdconv", raw("/v1/segment", jpeg, **image)),
    }
    tensors["plain"] = over("plain", raw("/tensor", tensor.tobytes()))
    images["plain"] = over("plain", raw("/image", jpeg))
    if "litserve" in servers:
        tensors["litserve"] = over("litserve", in_form("/tensor", tensor.tobytes()))
        images["litserve"] = over("litserve", in_form("/image", jpeg))
    return {"tensor": tensors, "image": images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="More and longer turns.")
    parser.add_argument("--isolation", default="thread", choices=["thread", "process"])
    arguments = parser.parse_args()
    turns, seconds = (40, 1.5) if arguments.full else (8, 0.7)
    bundle = demo_bundle(arguments.bundle)
    about = machine()
    with ExitStack() as stack:
        session = stack.enter_context(open_session(bundle, threads=1))
        session.warm_up()
        batch = session.batch_sizes[-1]
        height, width = session.input_size
        rng = np.random.default_rng(0)
        tensor = rng.normal(size=(batch, 3, height, width)).astype(np.float32)
        own = ["--isolation", arguments.isolation]
        servers = {"fdconv": stack.enter_context(server(ours(bundle, *own)))}
        module = [sys.executable, "-m", "benchmarks.serving.baselines"]
        servers["plain"] = stack.enter_context(server([*module, "plain", str(bundle), "{port}"]))
        if importlib.util.find_spec("litserve"):
            command = [*module, "litserve", str(bundle), "{port}"]
            servers["litserve"] = stack.enter_context(server(command))
        result: dict[str, Any] = {"machine": about, "turns": turns, "seconds": seconds}
        result["bundle"] = {"input": [height, width], "batch": batch, "threads": 1}
        result["isolation"] = arguments.isolation
        if "litserve" not in servers:
            result["litserve"] = LITSERVE_MISSING
        cases = sides(session, servers, tensor, scene())
        for case, each in (("tensor", batch), ("image", 1)):
            seen: dict[str, list[float]] = {name: [] for name in cases[case]}
            spent: dict[str, list[float]] = {name: [] for name in cases[case]}
            for _ in range(turns):
                for name, run in cases[case].items():
                    clock = servers[name].cpu_seconds if name in servers else time.process_time
                    before = clock()
                    load = run(4, seconds)
                    seen[name].append(load.per_second(each))
                    spent[name].append((clock() - before) / (load.count() * each) * 1e3)
            result[case] = ratios(seen, "images per second, 4 connections")
            # Tells more than the clock where a machine has other things to do.
            result[case]["processor ms per image"] = {
                name: round(median(values), 2) for name, values in spent.items()
            }
        one = sides(session, servers, tensor[:1], scene())["tensor"]
        waits: dict[str, list[float]] = {name: [] for name in one}
        for _ in range(turns):
            for name, run in one.items():
                waits[name].append(run(1, seconds).percentile(0.5))
        base = waits["in process"]
        result["latency, one tensor at a time"] = {
            "p50 ms": {name: round(median(values), 3) for name, values in waits.items()},
            "added p50 ms": {
                name: round(median([v - b for v, b in zip(values, base, strict=True)]), 3)
                for name, values in waits.items()
                if name != "in process"
            },
        }
    write("throughput", result, keep=arguments.full)


def ratios(seen: dict[str, list[float]], unit: str) -> dict[str, Any]:
    base, own = seen["in process"], seen["fdconv"]
    return {
        unit: {name: round(median(values), 2) for name, values in seen.items()},
        "fdconv / in process": round(median([a / b for a, b in zip(own, base, strict=True)]), 3),
        **{
            f"fdconv / {name}": round(
                median([a / b for a, b in zip(own, seen[name], strict=True)]), 3
            )
            for name in ("plain", "litserve")
            if name in seen
        },
    }


if __name__ == "__main__":
    main()
