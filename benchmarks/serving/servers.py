"""ASGI servers compared: ``python -m benchmarks.serving.servers [--json FILE] [--only A,B]``.

What a segmentation service needs of one: correctness, limits, speed. Each server runs a FastAPI
application in its own process, with 2 s for headers, reads and writes and 3 s for a graceful stop
where it has such limits. Clients are curl, Java's HttpClient (if there is `java`) and sockets.
"open": still open after 20 s (TLS: 65 s). Needs Linux and ``pip install hypercorn h2 granian zttp
trustme``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response

WATCH, TLS_WATCH = 20.0, 65.0
THIS = "benchmarks.serving.servers"
QUIET = f" {THIS}:app --log-level critical"
UVICORN = f"uvicorn{QUIET} --no-access-log --timeout-graceful-shutdown 3 --port {{port}} --http "
UVICORN_TLS = " --ssl-certfile {cert} --ssl-keyfile {key}"
HYPERCORN = f"hypercorn{QUIET} -k uvloop --graceful-timeout 3 --read-timeout 2"
HYPERCORN += " --bind 127.0.0.1:{port}"
GRANIAN = f"granian{QUIET} --interface asgi --no-ws --port {{port}} --workers-kill-timeout 3"
GRANIAN += " --http1-header-read-timeout 2000"
# Name: module and its arguments, those for TLS, packages whose versions matter.
SERVERS = {
    "uvicorn h11": (UVICORN + "h11", UVICORN_TLS, "uvicorn h11"),
    "uvicorn h11 + limits": (
        f"{THIS} --limited {{port}}",
        " {cert} {key}",
        "uvicorn h11",
    ),
    "uvicorn httptools": (UVICORN + "httptools", UVICORN_TLS, "uvicorn httptools"),
    "uvicorn zttp": (UVICORN + "zttp --http2", UVICORN_TLS, "uvicorn zttp"),
    "hypercorn": (HYPERCORN, " --certfile {cert} --keyfile {key}", "hypercorn h11 h2"),
    "granian": (GRANIAN, " --ssl-certificate {cert} --ssl-keyfile {key}", "granian"),
}
JAVA = """
import java.net.http.*;
class Main { public static void main(String[] url) throws Exception {
  HttpClient client = HttpClient.newHttpClient();
  for (int size : new int[]{300000, 5}) {
    HttpRequest.Builder request = HttpRequest.newBuilder(java.net.URI.create(url[0]));
    request.POST(HttpRequest.BodyPublishers.ofByteArray(new byte[size]));
    request.timeout(java.time.Duration.ofSeconds(8));
    var answer = client.send(request.build(), HttpResponse.BodyHandlers.ofString());
    System.out.print(answer.body() + "/" + answer.version() + " "); } } }
"""

app = FastAPI(openapi_url=None)
noted: dict[str, str] = {}


@app.api_route("/bytes/{size}", methods=["GET", "HEAD"])
async def send_bytes(size: int, pause: float = 0) -> Response:
    await asyncio.sleep(pause)
    return Response(bytes(size))


@app.post("/length")
async def length(request: Request, limit: float | None = None, pause: float = 0) -> Response:
    """The body's length; 408 when it has not come within ``limit`` seconds."""
    await asyncio.sleep(pause)

    async def size() -> int:
        return sum([len(chunk) async for chunk in request.stream()])

    try:
        return Response(str(await asyncio.wait_for(size(), limit)))
    except asyncio.TimeoutError:
        return Response("too slow", 408, {"Connection": "close"})


@app.post("/refuse")
async def refuse(close: bool) -> Response:
    return Response("too large", 413, {"Connection": "close"} if close else {})


@app.get("/noted")
async def show_noted() -> dict[str, str]:
    return noted


async def watch(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
    """Wait up to 4 s for the news that the client has gone; note it under the path's last part."""
    start = time.monotonic()
    with contextlib.suppress(asyncio.TimeoutError):
        while (await asyncio.wait_for(receive(), 4))["type"] != "http.disconnect":
            pass
        noted[scope["path"].rpartition("/")[2]] = f"after {time.monotonic() - start:.1f} s"


app.mount("/watch", watch)


def run_limited(port: str, *tls: str) -> None:
    """Uvicorn's h11 protocol with this project's limits."""
    import uvicorn

    from fdconv_deploy.serve import Settings
    from fdconv_deploy.serve.http_limits import MAX_HEAD_BYTES, Held, LimitedProtocol

    settings = Settings(header_seconds=2, body_seconds=2, write_seconds=2)
    options = dict(zip(("ssl_certfile", "ssl_keyfile"), tls, strict=False))
    uvicorn.run(
        app,
        port=int(port),
        http=partial(
            LimitedProtocol, settings, lambda status, detail, _: ([], detail.encode()), Held()
        ),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=3,
        **options,
    )


class Server:
    """One server's process."""

    def __init__(self, name: str, folder: Path, *, tls: bool = False) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = free.getsockname()
        command = "-W ignore -m " + SERVERS[name][0] + (SERVERS[name][1] if tls else "")
        files = {"cert": folder / "cert.pem", "key": folder / "key.pem"}
        words = command.format(port=self.address[1], **files).split()
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        environment = {**os.environ, "PYTHONPATH": paths}
        self.process = subprocess.Popen(
            [sys.executable, *words], env=environment, start_new_session=True
        )
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.address[1]}/length"
        for _ in range(200):
            with contextlib.suppress(OSError):
                socket.create_connection(self.address).close()
                return
            time.sleep(0.1)
        raise RuntimeError(f"{name} did not start.")

    def talk(self, *parts: bytes, pause: float = 0.0, watch: float = 1.5) -> str:
        """Send the parts; the statuses answered, and when the server closed."""
        answer, end = self.exchange(*parts, pause=pause, watch=watch)
        statuses = re.findall(rb"HTTP/1\.[01] (\d+)", answer)
        return f"{b' '.join(statuses).decode() or 'nothing'}, {end}"

    def exchange(self, *parts: bytes, pause: float = 0.0, watch: float = 1.5) -> tuple[bytes, str]:
        start, received, broken = time.monotonic(), b"", ""
        with socket.create_connection(self.address) as plug:
            try:
                for part in parts:
                    plug.sendall(part)
                    time.sleep(pause)
            except OSError:
                broken = "sending broken, "
            try:
                while (left := start + watch - time.monotonic()) > 0:
                    plug.settimeout(left)
                    chunk = plug.recv(1 << 20)
                    if not chunk:
                        return received, f"{broken}closed {time.monotonic() - start:.1f} s"
                    received += chunk
            except TimeoutError:
                pass
            except OSError:
                return received, f"{broken}reset {time.monotonic() - start:.1f} s"
        return received, f"{broken}open"

    def holds(self, plug: socket.socket) -> bool:
        """Whether the process still has its end of the connection."""
        ends = f":{self.address[1]:04X} ", f":{plug.getsockname()[1]:04X} "
        rows = Path("/proc/net/tcp").read_text().splitlines()
        found = [row for row in rows if ends[0] in row and ends[1] in row.partition(ends[0])[2]]
        return any(row.split()[9] != "0" for row in found)

    def noted(self, name: str) -> str:
        answer = self.exchange(get("/noted", "Connection: close\r\n"))[0]
        return json.loads(answer.rpartition(b"\r\n\r\n")[2]).get(name, "no")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def get(path: str, headers: str = "", start: str = "GET {} HTTP/1.1") -> bytes:
    return f"{start.format(path)}\r\nHost: x\r\n{headers}\r\n".encode()


def post(path: str, size: int, headers: str = "", sent: int | None = None) -> bytes:
    headers += f"Content-Length: {size}\r\n"
    return get(path, headers, "POST {} HTTP/1.1") + bytes(size if sent is None else sent)


def run(command: str) -> str:
    if not shutil.which(command.split()[0]):
        return "skipped"
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or f"{command.split()[0]}: exit status {done.returncode}"


def unread_answers(server: Server) -> str:
    """Clients that never read: 8 MB, and sizes around what the kernel holds for them."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as plug:
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plug.connect(listener.getsockname())
        end = listener.accept()[0]
        end.setblocking(False)
        room = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                room += end.send(bytes(1 << 23))
        end.close()
    sizes = [8 << 20, *range(room - (96 << 10), room + (288 << 10), 24 << 10)]
    plugs = [socket.socket() for _ in sizes]
    for plug, size in zip(plugs, sizes, strict=True):
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plug.connect(server.address)
        plug.sendall(get(f"/bytes/{size}"))
    time.sleep(WATCH)
    held = [server.holds(plug) for plug in plugs]
    return f"8 MB {'held' if held[0] else 'cut'}, {sum(held[1:])} of {len(held) - 1} others held"


def disconnect(server: Server) -> str:
    """The client leaves after 0.5 s; another one stays."""
    with ThreadPoolExecutor() as pool:
        pool.submit(server.exchange, get("/watch/stays"), watch=4.5)
        server.exchange(get("/watch/leaves"), watch=0.5)
        time.sleep(3.5)
    return f"{server.noted('leaves')}; one that stays: {server.noted('stays')}"


def stop(server: Server) -> str:
    """SIGTERM with an idle connection, a request of 1.5 s and one of a minute."""
    paths = ("/bytes/1", "/bytes/1?pause=1.5", "/bytes/1?pause=60")
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(server.talk, get(path), watch=10) for path in paths]
        time.sleep(0.7)
        start = time.monotonic()
        server.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(10)
        ended = f"ended after {time.monotonic() - start:.1f} s"
        return "; ".join([ended, *(job.result() for job in jobs)])


def check(name: str, folder: Path) -> dict[str, str]:
    server, tls, stopped = (Server(name, folder, tls=n == 1) for n in range(3))
    line, one = get("/bytes/1")[:-2], get("/bytes/1")
    curl = "curl -skm 5 -w /HTTP%{http_version}/%{num_connects}new; --data-binary "
    old = get("/bytes/1", "Connection: keep-alive\r\n", "GET {} HTTP/1.0")
    long, stalled = get("/bytes/1", f"X: {'y' * 10**6}\r\n"), post("/length?limit=1", 9, sent=3)
    expect = post("/length", 4, "Expect: 100-continue\r\n", sent=0)
    head = get("/bytes/9000", start="HEAD {} HTTP/1.1")
    talk, upload = server.talk, 20_000_000
    checks: dict[str, Callable[[], str]] = {
        "POST offering h2c (curl): 300,000 bytes, 5": lambda: run(
            f"{curl} @{folder}/body --http2 {server.url} --next {curl[4:]} abcde {server.url}"
        ),
        "POST offering h2c (Java): 300,000 bytes, 5": lambda: run(
            f"java {folder}/Main.java {server.url}"
        ),
        "HTTP/2 by knowledge, cleartext": lambda: run(
            f"{curl} abc --http2-prior-knowledge {server.url}"
        ),
        "HTTP/2 over TLS": lambda: run(f"{curl} abc --http2 {tls.url}"),
        "HEAD, then GET": lambda: f"{talk(head + one)}, {len(server.exchange(head)[0])} bytes",
        "HTTP/1.0 keep-alive, two GETs": lambda: talk(old, old, pause=0.3),
        "Expect: 100-continue": lambda: talk(expect, b"abcd", pause=0.5),
        "Three pipelined GETs": lambda: talk(one * 3),
        "Garbage after a request": lambda: talk(one + b"\x00\x01garbage\r\n\r\n"),
        "Path of 100 kB": lambda: talk(get("/" + "y" * 100_000)),
        "Header of 1 MB": lambda: talk(long),
        "Nothing sent": lambda: talk(watch=WATCH),
        "Headers stall": lambda: talk(line, watch=WATCH),
        "Headers in drops": lambda: talk(line, *[b"X: y\r\n"] * 24, pause=0.5, watch=WATCH),
        "Body stalls": lambda: talk(post("/length", 9, sent=3), watch=WATCH),
        "Body stalls, application limits it": lambda: talk(stalled),
        "413 at once, 20 MB sent": lambda: talk(post("/refuse?close=0", upload) + one, watch=9),
        "413 and close, 20 MB sent": lambda: talk(post("/refuse?close=1", upload), watch=9),
        "Unread answers": lambda: unread_answers(server),
        "Disconnect seen": lambda: disconnect(server),
        "Idle TLS handshake": lambda: tls.talk(watch=TLS_WATCH),
        "SIGTERM (limit 3 s): idle; 1.5 s; 60 s": lambda: stop(stopped),
    }
    with ThreadPoolExecutor(len(checks)) as pool:
        jobs = {title: pool.submit(job) for title, job in checks.items()}
        found = {title: job.result() for title, job in jobs.items()}
    for each in (server, tls, stopped):
        each.kill()
    return found


def ask(plug: socket.socket, request: bytes, answer: bytes) -> None:
    plug.sendall(request)
    received = b""
    while not received.endswith(answer):
        chunk = plug.recv(1 << 16)
        if not chunk:
            raise ConnectionError(f"The server closed the connection after {received!r}.")
        received += chunk


def load(server: Server, size: int, seconds: float) -> int:
    """Requests answered to 8 clients."""

    def client(_: int) -> int:
        count, end, request = 0, time.monotonic() + seconds, post("/length", size)
        while time.monotonic() < end:
            with socket.create_connection(server.address) as plug:
                for _ in range(100):  # hypercorn closes after 1000
                    ask(plug, request, b"\r\n\r\n%d" % size)
                    count += 1
        return count

    with ThreadPoolExecutor() as pool:
        return sum(pool.map(client, range(8)))


def speed(names: list[str], folder: Path, rounds: int = 22) -> dict[str, dict[str, str]]:
    """Latency in blocks of 100 requests, throughput in spells of 1.5 s, rotating over servers."""
    servers = {name: Server(name, folder) for name in names}
    latency: dict[str, list[float]] = {name: [] for name in names}
    spells: dict[str, list[float]] = {name: [] for name in names}
    request = post("/length", 16_000)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with socket.create_connection(servers[name].address) as plug:
                for count in range(105):
                    start = time.perf_counter()
                    ask(plug, request, b"\r\n\r\n16000")
                    if count >= 5:  # the first ones wake the process
                        latency[name].append((time.perf_counter() - start) * 1e3)
            if turn % 7 == 6:
                spells[name].append(load(servers[name], 300_000, 1.5) / 1.5)
    for server in servers.values():
        server.kill()
    return {
        name: {
            "p50, one client, 16 kB": f"{statistics.median(latency[name]):.2f} ms",
            "8 clients, 300 kB": f"{statistics.median(spells[name]):.0f} /s",
        }
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default=",".join(SERVERS))
    parser.add_argument("--limited", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.limited:
        run_limited(*options.limited)
        return
    import trustme

    names = options.only.split(",")
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor() as pool:
        certificate = trustme.CA().issue_cert("127.0.0.1")
        certificate.cert_chain_pems[0].write_to_path(f"{made}/cert.pem")
        certificate.private_key_pem.write_to_path(f"{made}/key.pem")
        Path(made, "Main.java").write_text(JAVA)
        Path(made, "body").write_bytes(bytes(300_000))
        fast = speed(names, Path(made))
        found = dict(zip(names, pool.map(lambda name: check(name, Path(made)), names), strict=True))
    for name in names:
        versions = (f"{p} {importlib.metadata.version(p)}" for p in SERVERS[name][2].split())
        found[name] = {"Versions": ", ".join(versions), **found[name], **fast.get(name, {})}
    print("| |", " | ".join(names), "|\n" + "|---" * (len(names) + 1) + "|")
    for title in found[names[0]]:
        print(f"| {title} |", " | ".join(found[name][title] for name in names), "|")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
