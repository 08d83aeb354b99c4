"""Clients that hold what they get: ``python -m benchmarks.serving.attacks [NAME...] [--full]``.

Each attack has a service to itself, with the default limits, and lasts while health is asked over
HTTP and gRPC by new connections, images are segmented by a client of good will, and memory is
watched; then the service is stopped by SIGTERM while the attackers stay.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import ssl
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import grpc
import trustme

from benchmarks.serving.harness import (
    Load,
    Memory,
    demo_bundle,
    finish,
    free_port,
    machine,
    ours,
    scene,
    server,
)

HEALTH_MS, RESIDENT_MB, DRAIN_SECONDS = 250.0, 1500.0, 30.0
EVERY = 0.05
# As many systems start a process.
FEW_FILES = ["bash", "-c", 'ulimit -Sn 1024; exec "$@"', "-"]
GET = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
Attack = Callable[[int, int], AbstractContextManager[Any]]


@contextmanager
def plugs(port: int, count: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections with little room for what comes, which read nothing."""
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            plug = stack.enter_context(socket.socket())
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plug.connect(("127.0.0.1", port))
            plug.setblocking(False)
            if sent:
                plug.send(sent)
            found.append(plug)
        yield found


@contextmanager
def silent_calls(port: int, count: int) -> Iterator[None]:
    """Calls of ModelInfer that begin and never send a message, over a few connections."""
    end, began = threading.Event(), threading.Semaphore(0)

    async def hold() -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) for _ in range(4)]
        method = "/inference.GRPCInferenceService/ModelInfer"

        async def call(number: int) -> None:
            stream = channels[number % len(channels)].stream_unary(method)()
            began.release()
            with suppress(grpc.aio.AioRpcError):
                await stream

        calls = [asyncio.create_task(call(number)) for number in range(count)]
        while not end.is_set():
            await asyncio.sleep(0.1)
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        for channel in channels:
            await channel.close()

    thread = threading.Thread(target=asyncio.run, args=(hold(),))
    thread.start()
    for _ in range(count):
        began.acquire()
    try:
        yield
    finally:
        end.set()
        thread.join()


# Name: what it does to (the HTTP port, the gRPC port), and whether the service speaks TLS.
ATTACKS: dict[str, tuple[Attack, bool]] = {
    # 4 MB are more than the kernel takes; the last answer of a few is less than 64 kB short.
    "unread-answers": (lambda http, _: plugs(http, 300, GET * 100), False),
    "unread-answer": (lambda http, _: plugs(http, 1, GET * 100), False),
    "nothing-sent": (lambda http, _: plugs(http, 1500), False),
    "silent-calls": (lambda _, rpc: silent_calls(rpc, 300), False),
    "silent-grpc": (lambda _, rpc: plugs(rpc, 1500), False),
    "silent-tls": (lambda http, _: plugs(http, 1500), True),
    "silent-grpc-tls": (lambda _, rpc: plugs(rpc, 1500), True),
}


class Probe:
    """Asks again and again from a thread while a ``with`` block lasts."""

    def __init__(self, ask: Callable[[], int], every: float = EVERY) -> None:
        self.load = Load()
        self._ask, self._every, self._end = ask, every, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self.load

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._every):
            begin = time.perf_counter()
            try:
                status = self._ask()
            except (OSError, HTTPException, grpc.RpcError, grpc.FutureTimeoutError):
                status = 0
            self.load.add(status, time.perf_counter() - begin)


def worst(load: Load) -> float:
    """The 99th percentile in milliseconds, over answers of all kinds."""
    everything = sorted(took for each in load.seconds.values() for took in each)
    return round(everything[int(0.99 * (len(everything) - 1))] * 1e3, 1)


def run(name: str, bundle: Path, folder: Path, seconds: float) -> tuple[dict, dict[str, bool]]:
    attack, tls = ATTACKS[name]
    rpc = free_port()
    options = ["--grpc-port", str(rpc)]
    verify: ssl.SSLContext | None = None
    trusted: grpc.ChannelCredentials | None = None
    if tls:
        authority = trustme.CA()
        made = authority.issue_cert("127.0.0.1", "localhost")
        made.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
        made.private_key_pem.write_to_path(str(folder / "cert.key"))
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        options += ["--tls-certificate", str(folder / "cert.pem")]
        options += ["--tls-key", str(folder / "cert.key")]
        verify = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    body = scene()
    with (
        server([*FEW_FILES, *ours(bundle, *options)], verify=verify) as found,
        ExitStack() as stack,
    ):

        def health() -> int:
            return found.get("/healthz")[0]

        def grpc_health() -> int:
            address = f"localhost:{rpc}"
            options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
            plain = trusted is None
            with (
                grpc.insecure_channel(address, options)
                if plain
                else grpc.secure_channel(address, trusted, options)
            ) as opened:
                ask = opened.unary_unary("/inference.GRPCInferenceService/ServerLive")
                ask(b"", timeout=10)
            return 200

        def segment() -> int:
            asked = urllib.request.Request(
                f"{found.url}/v1/segment", body, {"Content-Type": "image/jpeg"}
            )
            with urllib.request.urlopen(asked, timeout=30, context=verify) as answer:
                return answer.status

        stack.enter_context(attack(found.port, rpc))
        with (
            Memory(found, 0.25) as memory,
            Probe(health) as over_http,
            Probe(grpc_health) as over_grpc,
            Probe(segment, 0.2) as images,
        ):
            time.sleep(seconds)
        begin = time.monotonic()
        found.process.terminate()
        found.process.wait(4 * DRAIN_SECONDS)
        stopped = time.monotonic() - begin
    result = {
        "health over HTTP": over_http.statuses(),
        "health over gRPC": over_grpc.statuses(),
        "images": images.statuses(),
        "health p99 ms over HTTP, gRPC; images": [*map(worst, (over_http, over_grpc, images))],
        "resident MB at most": round(memory.most(), 1),
        "seconds from SIGTERM to the end": round(stopped, 1),
    }
    held = {
        "every answer is 200": all(
            {*x.statuses()} == {200} for x in (over_http, over_grpc, images)
        ),
        f"health p99 within {HEALTH_MS:g} ms": max(map(worst, (over_http, over_grpc))) <= HEALTH_MS,
        f"resident within {RESIDENT_MB:g} MB": memory.most() <= RESIDENT_MB,
        f"SIGTERM within {DRAIN_SECONDS:g} s": stopped <= DRAIN_SECONDS,
    }
    return result, {f"{name}: {sentence}": holds for sentence, holds in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ATTACKS))
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", action="store_true", help="60 seconds each; keep the result.")
    arguments = parser.parse_args()
    bundle, about = demo_bundle(arguments.bundle), machine()
    results: dict[str, Any] = {"machine": about}
    held: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names or ATTACKS:
            seconds = 60.0 if arguments.full else 8.0
            results[name], shown = run(name, bundle, Path(folder), seconds)
            held |= shown
    finish("attacks", results, held, keep=arguments.full)


if __name__ == "__main__":
    main()
