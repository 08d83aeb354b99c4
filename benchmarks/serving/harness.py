"""What the load scripts share: servers as child processes, a thin client, loops, numbers."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# An image in, its mask out.
HEADERS = {"Content-Type": "image/jpeg", "Accept": "image/png"}


class Connection:
    """One kept-alive HTTP/1.1 connection, with next to no work of its own.

    After an answer that says ``Connection: close``, ``open`` is false, and the next request
    connects anew.
    """

    def __init__(self, port: int, timeout: float = 60.0) -> None:
        self._port, self._timeout = port, timeout
        self.connect()

    def connect(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", self._port), self._timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb", 1 << 20)
        self.open = True

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict, bytes]:
        """Status, lower-case headers, body. A ``ConnectionError`` if it ends before that."""
        if not self.open:
            self.connect()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
        if len(body) < 1 << 16:
            self._socket.sendall(head.encode() + body)
        else:
            self._socket.sendall(head.encode())
            self._socket.sendall(body)
        line = self._file.readline()
        if not line:
            raise ConnectionResetError("closed before an answer")
        found: dict[str, str] = {}
        while (text := self._file.readline()) not in (b"\r\n", b""):
            name, _, value = text.decode("latin-1").partition(":")
            found[name.strip().lower()] = value.strip()
        size = int(found.get("content-length", 0))
        data = self._file.read(size)
        if len(data) != size:
            raise ConnectionResetError("the answer was cut off")
        if found.get("connection") == "close":
            self.close()
        return int(line.split()[1]), found, data

    def close(self) -> None:
        self._file.close()
        self._socket.close()
        self.open = False


@dataclass
class Load:
    """What a closed or open loop saw. ``seconds`` by status; 0 stands for a broken connection."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    wall: float = 0.0

    def add(self, status: int, took: float) -> None:
        self.seconds.setdefault(status, []).append(took)

    def count(self, status: int = 200) -> int:
        return len(self.seconds.get(status, []))

    def per_second(self, each: int = 1) -> float:
        return self.count() * each / self.wall

    def percentile(self, share: float, status: int = 200) -> float:
        """Milliseconds; 0 when there was none."""
        found = sorted(self.seconds.get(status, [0.0]))
        return found[min(int(share * len(found)), len(found) - 1)] * 1e3

    def statuses(self) -> dict[int, int]:
        return {status: len(times) for status, times in sorted(self.seconds.items())}


def closed_loop(
    port: int,
    ask: Callable[[Connection], int],
    *,
    connections: int,
    seconds: float,
) -> Load:
    """``connections`` clients that each ask, wait for the answer, and ask again.

    A broken connection is counted, as status 0, and opened again.
    """
    load, lock = Load(), threading.Lock()
    start = time.perf_counter()
    end = start + seconds

    def client() -> None:
        plug: Connection | None = None
        while (begin := time.perf_counter()) < end:
            try:
                plug = plug or Connection(port)
                status = ask(plug)
            except OSError:
                status, plug = 0, None
                time.sleep(0.01)
            with lock:
                load.add(status, time.perf_counter() - begin)
        if plug:
            plug.close()

    threads = [threading.Thread(target=client) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.wall = time.perf_counter() - start
    if not load.count():
        raise SystemExit(f"port {port} answered nothing with 200, but {load.statuses()}")
    return load


@dataclass
class Server:
    """A server under load."""

    port: int
    process: psutil.Popen
    verify: ssl.SSLContext | None = None  # for HTTPS

    @property
    def url(self) -> str:
        return f"http{'s' if self.verify else ''}://127.0.0.1:{self.port}"

    def rss(self) -> float:
        """Resident memory in MB, of it and its children."""
        everyone = [self.process, *self.process.children(recursive=True)]
        return sum(p.memory_info().rss for p in everyone) / 2**20

    def cpu_seconds(self) -> float:
        """Processor time it and its children have used."""
        everyone = [self.process, *self.process.children(recursive=True)]
        return sum(sum(p.cpu_times()[:2]) for p in everyone)

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            url = f"{self.url}{path}"
            with urllib.request.urlopen(url, timeout=10, context=self.verify) as r:
                return r.status, r.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


@contextmanager
def server(
    command: list[str],
    *,
    ready: str = "/readyz",
    within: float = 120.0,
    log: Path | None = None,
    verify: ssl.SSLContext | None = None,
) -> Iterator[Server]:
    """Run ``command``, in which ``{port}`` is replaced by a free port, until it is ready.

    What it says goes into the file ``log``, if one is given.
    """
    port = free_port()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path}
    with (log or Path(os.devnull)).open("w") as said:
        process = psutil.Popen(
            [part.replace("{port}", str(port)) for part in command],
            cwd=ROOT,
            env=env,
            stdout=said,
            stderr=said,
        )
    found = Server(port, process, verify)
    try:
        end = time.monotonic() + within
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{' '.join(command)} did not start")
            try:
                if found.get(ready)[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.05)
        yield found
    finally:
        stop(process)


def stop(process: psutil.Popen) -> None:
    """End a server and what it started."""
    try:
        family = process.children(recursive=True)
        process.terminate()
        process.wait(20)
    except psutil.TimeoutExpired:
        process.kill()
    except psutil.NoSuchProcess:
        return
    for child in family:
        if child.is_running():
            child.kill()


def ours(bundle: Path, *options: str) -> list[str]:
    """The command that serves a bundle with one thread a run, as all sides here have."""
    return [
        *(sys.executable, "-m", "fdconv_deploy", "serve", str(bundle), "--port", "{port}"),
        *("--threads", "1", "--log-level", "warning", *options),
    ]


def litserve(arguments: argparse.Namespace, bundle: Path, workers: int) -> list[str] | None:
    """The command that serves a bundle with LitServe; None where it is not installed.

    Its Python is that of ``--litserve``: an environment that holds onnxruntime and LitServe, which
    brings torch with it.
    """
    if arguments.litserve is None and importlib.util.find_spec("litserve") is None:
        return None
    python = str(arguments.litserve or sys.executable)
    module = [python, "-m", "benchmarks.serving.baselines", "litserve"]
    return [*module, str(bundle), "{port}", str(workers)]


def litserve_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that :func:`litserve` reads."""
    parser.add_argument(
        "--litserve", type=Path, metavar="PYTHON", help="Of an environment that has LitServe."
    )


class Memory:
    """Samples a server's resident memory, in MB, from a thread while a ``with`` block lasts."""

    def __init__(self, server: Server, every: float = 0.5) -> None:
        self._server, self._every = server, every
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.samples: list[tuple[float, float]] = []  # seconds since the start, MB

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def between(self, start: float, end: float) -> float:
        """The median from ``start`` to ``end``, shares of the whole time."""
        last = self.samples[-1][0]
        return median([mb for at, mb in self.samples if start * last <= at <= end * last])

    def most(self) -> float:
        return max(mb for _, mb in self.samples)

    def series(self, count: int = 30) -> list[list[float]]:
        """About ``count`` of the samples, to be looked at."""
        step = max(len(self.samples) // count, 1)
        return [[round(at, 1), round(mb, 1)] for at, mb in self.samples[::step]]

    def _sample(self) -> None:
        start = time.monotonic()
        while not self._end.is_set():
            self.samples.append((time.monotonic() - start, self._server.rss()))
            self._end.wait(self._every)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def demo_bundle(given: Path | None) -> Path:
    """The bundle to serve: the one given, else the one `make demo` made."""
    path = given or ROOT / "demo-output" / "bundle"
    if not (path / "manifest.json").is_file():
        raise SystemExit(f"There is no bundle at {path}: run `make demo`, or give --bundle.")
    return path


def scene(quality: int = 90) -> bytes:
    """A packaged scene as a JPEG."""
    path = ROOT / "examples" / "assets" / "heldout" / "000.png"
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def image_request() -> Callable[[Connection], int]:
    """Asks for the mask of a scene."""
    body = scene()
    return lambda plug: plug.post("/v1/segment", body, HEADERS)[0]


def tensor_request(bundle: Path) -> Callable[[Connection], int]:
    """Asks for the logits of one random image's tensor."""
    size = json.loads((bundle / "manifest.json").read_text())["input"]
    shape = (1, 3, size["height"], size["width"])
    return kserve(np.random.default_rng(0).normal(size=shape).astype(np.float32), bundle.name)


def kserve(tensor: np.ndarray, model: str) -> Callable[[Connection], int]:
    """Asks for a tensor's logits by KServe v2 with binary tensors both ways."""
    asked = kserve_request(tensor, model)
    return lambda plug: plug.post(*asked)[0]


def in_form(body: bytes) -> tuple[bytes, dict[str, str]]:
    """A body and headers as LitServe takes binary data."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    return head + body + b"\r\n--x--\r\n", headers


def kserve_request(tensor: np.ndarray, model: str) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of :func:`kserve`."""
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
    return f"/v2/models/{model}/infer", body, headers


def machine() -> dict[str, Any]:
    import onnxruntime

    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "load_average_before": os.getloadavg()[0],
    }


def finish(name: str, result: dict[str, Any], held: dict[str, bool], *, keep: bool) -> None:
    """As :func:`write`, with what was to be shown and whether it holds; exit 1 if it does not."""
    write(name, {**result, "held": held}, keep=keep)
    missed = [sentence for sentence, holds in held.items() if not holds]
    if missed:
        raise SystemExit(f"NOT held: {'; '.join(missed)}")


def write(name: str, result: dict[str, Any], *, keep: bool) -> None:
    """Print a result; of the full form, keep it with the date in its name."""
    text = json.dumps(result, indent=2)
    print(text)
    if not keep:
        return
    path = RESULTS / f"{date.today().isoformat()}-serving-{name}.json"
    path.write_text(text + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(ROOT)}", file=sys.stderr)


def median(values: list[float]) -> float:
    return statistics.median(values)


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
