"""Throughput: ``python -m benchmarks.serving.throughput [--full]``.

The tensor path against the raw session at equal batch, the JPEG-to-PNG path against the
in-process pipeline, and the same from a plain FastAPI service and from LitServe on the same
bundle. Every side runs one thread per inference and ``--workers`` inferences at a time; "plain, 2
more" is the plain service with as many threads in all as this one has, two of which code images
here and infer there. The sides take turns, so that a machine's drift hits all alike; quote the
ratios, medians of turns. For latency see `benchmarks.serving.latency`.
"""

from __future__ import annotations

import argparse
import sys
import threading
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
    finish,
    image_request,
    in_form,
    kserve,
    litserve,
    litserve_option,
    machine,
    median,
    ours,
    scene,
    server,
)
from fdconv_deploy.environment import install
from fdconv_deploy.runtime import Session, open_session

LITSERVE_MISSING = f"not installed here: {install('litserve')}"
PLAIN, MORE, LITSERVE, OURS, RAW = "plain", "plain, 2 more", "litserve", "fdconv", "in process"
Run = Callable[[int, float], Load]


def raw(path: str, body: bytes) -> Callable[[Connection], int]:
    return lambda plug: plug.post(path, body, {})[0]


def in_process(call: Callable[[], Any], workers: int, seconds: float) -> Load:
    load, lock, start = Load(), threading.Lock(), time.perf_counter()

    def work() -> None:
        while (begin := time.perf_counter()) - start < seconds:
            call()
            with lock:
                load.add(200, time.perf_counter() - begin)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.wall = time.perf_counter() - start
    return load


class Sides:
    """Who is compared: for a case, by name, a function of (connections, seconds)."""

    def __init__(
        self, session: Session, model: str, servers: dict[str, Server], workers: int
    ) -> None:
        self._session, self._model, self._servers = session, model, servers
        self._workers = workers

    def tensors(self, tensor: np.ndarray) -> dict[str, Run]:
        body = tensor.tobytes()
        return {
            RAW: self._here(lambda: self._session.run(tensor)),
            OURS: self._over(OURS, kserve(tensor, self._model)),
            PLAIN: self._over(PLAIN, raw("/tensor", body)),
            MORE: self._over(MORE, raw("/tensor", body)),
            **self._litserve("/tensor", body),
        }

    def images(self, jpeg: bytes) -> dict[str, Run]:
        return {
            RAW: self._here(lambda: image_answer(self._session, jpeg)),
            OURS: self._over(OURS, image_request()),
            PLAIN: self._over(PLAIN, raw("/image", jpeg)),
            MORE: self._over(MORE, raw("/image", jpeg)),
            **self._litserve("/image", jpeg),
        }

    def processor_seconds(self, name: str) -> float:
        return self._servers[name].cpu_seconds() if name in self._servers else time.process_time()

    def _here(self, call: Callable[[], Any]) -> Run:
        return lambda n, s: in_process(call, min(n, self._workers), s)

    def _over(self, name: str, ask: Callable[[Connection], int]) -> Run:
        port = self._servers[name].port

        def run(connections: int, seconds: float) -> Load:
            load = closed_loop(port, ask, connections=connections, seconds=seconds)
            assert set(load.statuses()) == {200}, (name, load.statuses())
            return load

        return run

    def _litserve(self, path: str, body: bytes) -> dict[str, Run]:
        if LITSERVE not in self._servers:
            return {}
        form, headers = in_form(body)
        return {LITSERVE: self._over(LITSERVE, lambda plug: plug.post(path, form, headers)[0])}


def throughput(sides: Sides, runs: dict[str, Run], each: int, turns: int, load: tuple) -> dict:
    """Images per second of each side, and this service's share of the others'."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            before = sides.processor_seconds(name)
            found = run(*load)
            seen[name].append(found.per_second(each))
            used = sides.processor_seconds(name) - before
            spent[name].append(used / (found.count() * each) * 1e3)
    return {
        f"images per second, {load[0]} connections": rounded(seen, 2),
        **{
            f"{OURS} / {name}": round(share(seen[OURS], seen[name]), 3)
            for name in runs
            if name != OURS
        },
        # Tells more than the clock where a machine has other things to do.
        "processor ms per image": rounded(spent, 2),
    }


def rounded(values: dict[str, list[float]], digits: int) -> dict[str, float]:
    return {name: round(median(found), digits) for name, found in values.items()}


def share(own: list[float], base: list[float]) -> float:
    return median([a / b for a, b in zip(own, base, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="More and longer turns.")
    parser.add_argument("--workers", type=int, default=1, help="Of every side.")
    parser.add_argument("--isolation", default="thread", choices=["thread", "process"])
    litserve_option(parser)
    arguments = parser.parse_args()
    turns, seconds = (12, 1.0) if arguments.full else (6, 0.5)
    workers, connections = arguments.workers, 4 * arguments.workers
    bundle, about = demo_bundle(arguments.bundle), machine()
    own = ["--isolation", arguments.isolation, "--workers", str(workers)]
    module = [sys.executable, "-m", "benchmarks.serving.baselines"]
    commands = {
        OURS: ours(bundle, *own),
        PLAIN: [*module, "plain", str(bundle), "{port}", str(workers)],
        MORE: [*module, "plain", str(bundle), "{port}", str(workers + 2)],
    }
    if command := litserve(arguments, bundle, workers):
        commands[LITSERVE] = command
    with ExitStack() as stack:
        session = stack.enter_context(open_session(bundle, threads=1))
        session.warm_up()
        batch = session.batch_sizes[-1]
        shape = (batch, 3, *session.input_size)
        tensor = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        servers = {name: stack.enter_context(server(c)) for name, c in commands.items()}
        sides = Sides(session, bundle.name, servers, workers)
        load = (connections, seconds)
        tensors = throughput(sides, sides.tensors(tensor), batch, turns, load)
        images = throughput(sides, sides.images(scene()), 1, turns, load)
    result: dict[str, Any] = {
        "machine": about,
        "turns": turns,
        "seconds": seconds,
        "bundle": {"input": list(session.input_size), "batch": batch, "threads": 1},
        "workers": workers,
        "isolation": arguments.isolation,
        "tensor": tensors,
        "image": images,
    }
    held = {
        "tensor path at least 0.95 of the session": tensors[f"{OURS} / {RAW}"] >= 0.95,
        "JPEG to PNG at least 0.90 of the pipeline": images[f"{OURS} / {RAW}"] >= 0.90,
    }
    if LITSERVE in commands:
        held["ahead of LitServe: tensor"] = tensors[f"{OURS} / {LITSERVE}"] > 1
        held["ahead of LitServe: image"] = images[f"{OURS} / {LITSERVE}"] > 1
    else:
        result[LITSERVE] = LITSERVE_MISSING
    suffix = "" if workers == 1 else f"-{workers}-workers"
    finish(f"throughput{suffix}", result, held, keep=arguments.full)


if __name__ == "__main__":
    main()
