"""What serving adds to one tensor's inference: ``python -m benchmarks.serving.latency [--full]``.

One client at a time, no codecs. The session run directly, this service, plain FastAPI on the same
server with the same settings, and a bare socket (which is what the loopback and two wake-ups cost,
and no service can do without) take turns, all in one process on one and the same session: between
processes the same run differs by some percent, as its memory happens to lie, and that is as much
as what is measured. The client is a process of its own. LitServe keeps the model in processes of
its own, and is run so.

With ``--instant`` the session gives one answer again and again, without inference: on a machine
with other things to do, runs of milliseconds differ by more than what serving adds to them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvicorn

from benchmarks.serving.baselines import SERVER, bare, plain_app
from benchmarks.serving.harness import (
    Connection,
    demo_bundle,
    finish,
    in_form,
    kserve_request,
    litserve,
    litserve_option,
    machine,
    median,
    server,
)
from fdconv_deploy.environment import install
from fdconv_deploy.latency.machine import Bystanders
from fdconv_deploy.runtime import Session, open_session
from fdconv_deploy.serve import Settings, running

RAW, OURS, PLAIN, BARE, LITSERVE = "in process", "fdconv", "plain", "bare socket", "litserve"
Posted = tuple[int, str, bytes, dict[str, str]]  # port, path, body, headers


def client(pipe: Pipe) -> None:
    """Ask as told, one request after another, and give the seconds of each."""
    while True:
        try:
            (port, path, body, headers), seconds = pipe.recv()
        except EOFError:
            return
        plug, took = Connection(port), []
        end = time.perf_counter() + seconds
        while (begin := time.perf_counter()) < end:
            status = plug.post(path, body, headers)[0]
            took.append(time.perf_counter() - begin)
            assert status == 200, status
        plug.close()
        pipe.send(took)


@contextmanager
def asking() -> Iterator[Callable[[Posted, float], list[float]]]:
    """A client in a process of its own: give it a request and seconds."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=client, args=(there,), daemon=True)
    process.start()
    there.close()  # so that its end is noticed here

    def ask(posted: Posted, seconds: float) -> list[float]:
        here.send((posted, seconds))
        return here.recv()

    try:
        yield ask
    finally:
        here.close()
        process.join()


@contextmanager
def plain_service(session: Session) -> Iterator[int]:
    """Plain FastAPI on a thread; its port."""
    config = uvicorn.Config(plain_app(session, 1), **SERVER)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = uvicorn.Server(config)
        thread = threading.Thread(target=service.run, args=([listener],), daemon=True)
        thread.start()
        while not service.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        service.should_exit = True
        thread.join()


@contextmanager
def bare_service(session: Session) -> Iterator[int]:
    """The bare socket on a thread; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=bare, args=(session, listener), daemon=True).start()
        yield listener.getsockname()[1]


def directly(session: Session, tensor: np.ndarray, seconds: float) -> list[float]:
    """The session's own seconds, run after run."""
    took, end = [], time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        session.run(tensor)
        took.append(time.perf_counter() - begin)
    return took


def processor_seconds() -> float:
    """Of this process, the client and LitServe."""
    family = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(p.cpu_times()[:2]) for p in family)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="More turns; keep the result.")
    parser.add_argument("--instant", action="store_true", help="A session without inference.")
    litserve_option(parser)
    arguments = parser.parse_args()
    turns, seconds = (40, 0.5) if arguments.full else (12, 0.3)
    bundle, about = demo_bundle(arguments.bundle), machine()
    with ExitStack() as stack:
        session = stack.enter_context(open_session(bundle, threads=1))
        session.warm_up()
        ask = stack.enter_context(asking())
        url = stack.enter_context(running([session], settings=Settings(threads=1)))
        shape = (1, 3, *session.input_size)
        tensor = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        body = tensor.tobytes()
        if arguments.instant:
            answer = session.run_batches({"images": tensor})
            session.run_batches = lambda feeds: answer  # type: ignore[method-assign]
            session.run = lambda images: answer["logits"]  # type: ignore[method-assign]
        posted: dict[str, Posted] = {
            OURS: (int(url.rpartition(":")[2]), *kserve_request(tensor, bundle.name)),
            PLAIN: (stack.enter_context(plain_service(session)), "/tensor", body, {}),
            BARE: (stack.enter_context(bare_service(session)), "/tensor", body, {}),
        }
        command = None if arguments.instant else litserve(arguments, bundle, workers=1)
        if command:
            port = stack.enter_context(server(command)).port
            posted[LITSERVE] = (port, "/tensor", *in_form(body))
        sides: dict[str, Callable[[], list[float]]] = {
            RAW: lambda: directly(session, tensor, seconds),
            **{name: lambda p=p: ask(p, seconds) for name, p in posted.items()},
        }
        waits: dict[str, list[float]] = {name: [] for name in sides}
        spent: dict[str, list[float]] = {name: [] for name in sides if name != LITSERVE}
        with Bystanders(own=processor_seconds) as others:
            for _ in range(turns):
                for name, side in sides.items():
                    before = time.process_time()
                    took = side()
                    waits[name].append(statistics.median(took) * 1e3)
                    if name in spent:
                        spent[name].append((time.process_time() - before) / len(took) * 1e3)
    added = {
        name: [took - run for took, run in zip(found, waits[RAW], strict=True)]
        for name, found in waits.items()
        if name != RAW
    }
    result: dict[str, Any] = {
        "machine": about,
        "turns": turns,
        "seconds": seconds,
        "instant": arguments.instant,
        "others_cpu": others.share,
        "p50 ms": {name: round(median(found), 3) for name, found in waits.items()},
        "added p50 ms": {name: spread(found) for name, found in added.items()},
        # Tells more than the clock where a machine has other things to do.
        "processor ms": {name: round(median(found), 3) for name, found in spent.items()},
    }
    own = median(added[OURS])
    held = {"added p50 within 0.2 ms of plain FastAPI": own <= median(added[PLAIN]) + 0.2}
    if LITSERVE in added:
        held["ahead of LitServe"] = own < median(added[LITSERVE])
    elif not arguments.instant:
        result[LITSERVE] = f"not installed here: {install('litserve')}"
    finish("latency-instant" if arguments.instant else "latency", result, held, keep=arguments.full)


def spread(values: list[float]) -> dict[str, float]:
    low, mid, high = np.percentile(values, [25, 50, 75])
    return {"median": round(mid, 3), "q1": round(low, 3), "q3": round(high, 3)}


if __name__ == "__main__":
    main()
