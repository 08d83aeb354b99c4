"""What a client can do with a socket by hand: bodies in pieces, slow, large, broken, unread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from fdconv_deploy.runtime import open_session
from fdconv_deploy.serve import Settings, create_app, http_limits, running
from fdconv_deploy.serve.errors import Problem
from tests.serve.conftest import encoded, wait_until_ready
from tests.serve.test_api_keys import authority  # noqa: F401 - a fixture
from tests.serve.test_refusals import refused

COUNT = 8
PNG = {"Content-Type": "image/png"}
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def tensor() -> np.ndarray:
    """(8, 3, 32, 48) float32: 147 kB."""
    return np.random.default_rng(8).normal(size=(COUNT, 3, 32, 48)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(bundles: list[Path], tensor: np.ndarray) -> np.ndarray:
    with open_session(bundles[0], threads=1) as session:
        return session.run(tensor)


@pytest.fixture(scope="module")
def request_(tensor: np.ndarray) -> bytes:
    return asked(tensor)


def asked(tensor: np.ndarray, *, headers: str = "") -> bytes:
    """A whole inference request, tensors in binary both ways."""
    given = {
        "name": "images",
        "datatype": "FP32",
        "shape": tensor.shape,
        "parameters": {"binary_data_size": tensor.nbytes},
    }
    wanted = {"name": "logits", "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [given], "outputs": [wanted]}).encode()
    size = len(head) + tensor.nbytes
    lines = f"POST /v2/models/street/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n"
    lines += f"Inference-Header-Content-Length: {len(head)}\r\n{headers}\r\n"
    return lines.encode() + head + tensor.tobytes()


@pytest.fixture(scope="module")
def address(bundles: list[Path]) -> Iterator[tuple[str, int]]:
    with running(bundles, settings=Settings(threads=1)) as url:
        yield place(url)


def place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


def read_answer(plug: socket.socket | IO[bytes]) -> tuple[int, dict[str, str], bytes]:
    file = plug.makefile("rb") if isinstance(plug, socket.socket) else plug
    status = int(file.readline().split()[1])
    headers = {}
    while (line := file.readline()) != b"\r\n":
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, file.read(int(headers["content-length"]))


def logits(answer: tuple[int, dict[str, str], bytes], shape: tuple[int, ...]) -> np.ndarray:
    status, headers, body = answer
    assert status == 200, body
    start = int(headers["inference-header-content-length"])
    return np.frombuffer(body, np.float32, offset=start).reshape(shape)


@pytest.mark.parametrize("cut", [[], [40], [400], [60_000], [300, 400, 20_000, 100_000], [-1]])
def test_in_pieces(address, request_: bytes, expected: np.ndarray, cut: list[int]) -> None:
    edges = [0, *(at % len(request_) for at in cut), len(request_)]
    with socket.create_connection(address, timeout=60) as plug:
        for start, end in pairwise(edges):
            plug.sendall(request_[start:end])
            time.sleep(0.02)
        assert np.array_equal(logits(read_answer(plug), expected.shape), expected)


def test_one_after_another_on_a_connection(address, tensor: np.ndarray) -> None:
    small, large = asked(tensor[:1]), asked(tensor)
    with socket.create_connection(address, timeout=60) as plug:
        for request, kept in [(large, COUNT), (HEALTH, 0), (small, 1), (large, COUNT), (HEALTH, 0)]:
            plug.sendall(request)
            status, _, body = read_answer(plug)
            assert status == 200
            assert len(body) > kept * 4


def test_pipelined(address, request_: bytes, expected: np.ndarray) -> None:
    """Sent without waiting for answers: they come in order."""
    with socket.create_connection(address, timeout=60) as plug:
        plug.sendall(request_ + HEALTH + request_)
        answers = plug.makefile("rb")
        assert np.array_equal(logits(read_answer(answers), expected.shape), expected)
        assert json.loads(read_answer(answers)[2]) == {"status": "ok"}
        assert np.array_equal(logits(read_answer(answers), expected.shape), expected)


def test_expect_continue(address, tensor: np.ndarray, expected: np.ndarray) -> None:
    request = asked(tensor, headers="Expect: 100-continue\r\n")
    head = request.index(b"\r\n\r\n") + 4
    with socket.create_connection(address, timeout=60) as plug:
        plug.sendall(request[:head])
        assert plug.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        plug.sendall(request[head:])
        assert np.array_equal(logits(read_answer(plug), expected.shape), expected)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_over_tls(
    bundles,
    authority: Path,  # noqa: F811
    request_: bytes,
    expected: np.ndarray,
    loop: str,
    monkeypatch,
) -> None:
    """What TLS delivers in parts of its own, in whichever event loop, is whole and right."""
    if loop == "asyncio":
        monkeypatch.setitem(sys.modules, "uvloop", None)
    picture = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    png = encoded(picture, "PNG")
    image = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: {len(png)}\r\n"
    image += "Content-Type: image/png\r\nAccept: image/png\r\n\r\n"
    with open_session(bundles[0], threads=1) as session:
        mask = session.segment(picture).mask_png()
    settings = Settings(
        threads=1, tls_certificate=authority / "127.0.0.1.pem", tls_key=authority / "127.0.0.1.key"
    )
    context = ssl.create_default_context(cafile=str(authority / "ca.pem"))
    with running(bundles, settings=settings) as url:
        for _ in range(2):
            with (
                socket.create_connection(place(url), timeout=60) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1") as plug,
            ):
                for _ in range(4):
                    plug.sendall(request_)
                    assert np.array_equal(logits(read_answer(plug), expected.shape), expected)
                    plug.sendall(image.encode() + png)
                    status, _, body = read_answer(plug)
                    assert (status, body) == (200, mask)


def test_a_body_that_stops_coming(impatient, request_: bytes) -> None:
    with socket.create_connection(impatient, timeout=60) as plug:
        plug.sendall(request_[:-1])
        status, headers, body = read_answer(plug)
        assert status == 408
        assert headers["content-type"] == "application/problem+json"
        problem = Problem.model_validate_json(body)
        assert problem.request_id == headers["x-request-id"]
        assert plug.recv(1) == b""


def test_a_client_that_leaves_half_way(address, request_: bytes) -> None:
    url = f"http://{address[0]}:{address[1]}/metrics"
    before = left(httpx.get(url).text)
    for _ in range(20):
        with socket.create_connection(address, timeout=60) as plug:
            plug.sendall(request_[: len(request_) // 2])
    until(lambda: left(httpx.get(url).text) >= before + 20)
    text = httpx.get(url).text
    assert "fdconv_body_bytes 0.0" in text
    assert "fdconv_in_hand_images 0.0" in text


def left(metrics: str) -> int:
    """How many clients left before their answer."""
    lines = [line for line in metrics.splitlines() if 'infer",status="499"} ' in line]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("Content-Encoding: zstd\r\n", 415),
        ("Inference-Header-Content-Length: x\r\n" + "X: y\r\n" * 200, 431),
        ("Y: " + "z" * 40_000 + "\r\n", 431),
    ],
)
def test_one_refused_while_it_still_sends_gets_to_read_why(
    address, tensor: np.ndarray, line: str, status: int
) -> None:
    """Closing on unread data would reset the connection, and the answer with it."""
    request = asked(np.concatenate([tensor] * 20), headers=line)
    for _ in range(10):
        with socket.create_connection(address, timeout=60) as plug:
            plug.sendall(request)
            found, headers, _ = read_answer(plug)
            assert found == status
            if headers.get("connection") == "close":
                assert plug.recv(1) == b""
            else:  # what was sent is read to its end, and the connection is in step
                plug.sendall(HEALTH)
                assert read_answer(plug)[0] == 200


@pytest.mark.parametrize("what", ["health", "infer", "wrong", "segment", "unknown"])
def test_garbage_after_a_whole_request(
    address, request_: bytes, png: bytes, what: str, caplog
) -> None:
    """The request has its answer, and the garbage its own, which is the last."""
    whole, status = {
        "health": (HEALTH, 200),
        "infer": (request_, 200),
        "wrong": (request_.replace(b"FP32", b"FP64"), 400),
        "segment": (
            b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(png), png),
            200,
        ),
        "unknown": (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    }[what]
    for garbage in (b"\x01\x02\r\n\r\n", b"\x00" * 70_000):
        with socket.create_connection(address, timeout=60) as plug:
            plug.sendall(whole + garbage)
            answers = plug.makefile("rb")
            found, _, body = read_answer(answers)
            assert found == status, body
            found, headers, _ = read_answer(answers)
            assert (found // 100, headers["connection"]) == (4, "close")
            with contextlib.suppress(ConnectionResetError):
                assert plug.recv(1) == b""
    assert "Traceback" not in caplog.text
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


@pytest.mark.parametrize("path", ["infer", "segment"])
def test_a_refusal_is_counted_and_logged_once_under_the_clients_id(
    bundles, request_: bytes, path: str, caplog
) -> None:
    """As one that the service got as far as answering."""
    named = b"X-Request-ID: mine\r\n"
    image = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    sent = {
        "infer": request_.replace(b"Host: x\r\n", b"Host: x\r\n" + named, 1)[:-10],
        "segment": image + named + b"Content-Length: 90\r\n\r\nabc",
    }[path]
    settings = Settings(threads=1, body_seconds=0.3, header_seconds=0.3)
    with running(bundles, settings=settings) as url:
        logging.getLogger("fdconv.access").setLevel(logging.INFO)
        with socket.create_connection(place(url), timeout=60) as plug:
            plug.sendall(sent)
            status, headers, body = read_answer(plug)
            assert (status, headers["x-request-id"]) == (408, "mine")
            assert json.loads(body)["request_id"] == "mine"
            assert plug.recv(1) == b""
        until(lambda: 'status="408"' in httpx.get(f"{url}/metrics").text)
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        found = [line for line in lines if 'status="408"' in line and "_total{" in line]
        assert len(found) == 1
        assert found[0].endswith(" 1.0")
        assert not [line for line in lines if 'status="499"' in line]
    logged = [r.getMessage() for r in caplog.records if '"mine"' in r.getMessage()]
    assert len(logged) == 1
    assert "status=408" in logged[0]


@pytest.mark.parametrize("path", ["/v1/segment", "/v2/models/street/infer"])
def test_the_deadline_covers_the_body(address, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    head += "X-Timeout-Ms: 200\r\nContent-Length: 900\r\n\r\nabc"
    with socket.create_connection(address, timeout=60) as plug:
        plug.sendall(head.encode())
        assert read_answer(plug)[0] == 504


def test_a_request_after_a_refused_one_is_answered(address, request_: bytes) -> None:
    refused = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\n"
    refused += b"Content-Length: 3\r\n\r\nabc"
    with socket.create_connection(address, timeout=60) as plug:
        plug.sendall(refused + request_)
        answers = plug.makefile("rb")
        assert [read_answer(answers)[0] for _ in range(2)] == [415, 200]


def test_a_body_that_nobody_reads_is_not_waited_for(address, monkeypatch) -> None:
    """Refused before its body came, which then never comes: the connection ends."""
    monkeypatch.setattr(http_limits, "LINGER_SECONDS", 0.1)
    refused = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\n"
    with socket.create_connection(address, timeout=60) as plug:
        plug.sendall(refused + b"Content-Length: 3000\r\n\r\nabc")
        assert read_answer(plug)[0] == 415
        with contextlib.suppress(ConnectionResetError):
            assert plug.recv(1) == b""


@pytest.mark.parametrize("version", ["h2c", "websocket"])
def test_an_offer_to_change_the_protocol_is_declined(
    address, request_: bytes, expected: np.ndarray, version: str, caplog
) -> None:
    """As Java's HttpClient and ``curl --http2`` offer: the body is read, the connection in step."""
    offer = f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {version}\r\n".encode()
    offer += b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    offering = request_.replace(b"Host: x\r\n", b"Host: x\r\n" + offer, 1)
    with socket.create_connection(address, timeout=60) as plug:
        for request in (offering, offering, request_):
            plug.sendall(request)
            assert np.array_equal(logits(read_answer(plug), expected.shape), expected)
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_keep_alive_of_http_1_0_is_answered_and_declined(address) -> None:
    """As ``ab -k`` asks: one answer, which says that the connection ends, and that is so."""
    old = b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    with socket.create_connection(address, timeout=60) as plug:
        plug.sendall(old)
        status, headers, body = read_answer(plug)
        assert (status, headers["connection"], body) == (200, "close", b'{"status":"ok"}')
        assert plug.recv(1) == b""


def test_more_than_may_be_in_hand(bundles: list[Path], request_: bytes) -> None:
    settings = Settings(threads=1, max_bytes_in_hand=100_000)
    with running(bundles, settings=settings) as url:
        with socket.create_connection(place(url), timeout=60) as plug:
            plug.sendall(request_[:50_000])
            time.sleep(0.1)
            plug.sendall(request_[50_000:110_000])
            status, headers, _ = read_answer(plug)
            assert (status, headers["retry-after"]) == (503, "1")
        text = httpx.get(f"{url}/metrics").text
        assert "fdconv_body_bytes 0.0" in text
        assert 'fdconv_requests_total{route="/v2/models/{name}/infer",status="503"} 1.0' in text


@pytest.mark.parametrize("path", ["infer", "segment"])
def test_a_client_that_leaves_while_it_waits(
    bundles: list[Path], request_: bytes, png: bytes, path: str
) -> None:
    """Its place is free at once, and the model never runs for it."""
    image = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: {len(png)}\r\n"
    request = request_ if path == "infer" else f"{image}Content-Type: image/png\r\n\r\n".encode()
    request += b"" if path == "infer" else png
    started, go_on, ran = threading.Event(), threading.Event(), []
    with open_session(bundles[0], threads=1) as session:
        run = session.run_batches

        def held(inputs):
            ran.append(len(inputs["images"]))
            started.set()
            assert go_on.wait(60)
            return run(inputs)

        with running([session], settings=Settings(threads=1)) as url:
            session.run_batches = held  # type: ignore[method-assign]
            stays = socket.create_connection(place(url), timeout=60)
            stays.sendall(request)
            assert started.wait(60)
            with socket.create_connection(place(url), timeout=60) as leaves:
                leaves.sendall(request)
                both = 2 * (COUNT if path == "infer" else 1)
                wait_for(url, f"fdconv_in_hand_images {both}.0")
            wait_for(url, "fdconv_queue_images 0.0" if path == "segment" else 'status="499"} 1.0')
            wait_for(url, f"fdconv_in_hand_images {both // 2}.0")
            before = sum(ran)
            go_on.set()
            assert read_answer(stays)[0] == 200
            stays.close()
            wait_for(url, "fdconv_in_hand_images 0.0")
            assert sum(ran) == max(before, both // 2)


def wait_for(url: str, line: str) -> None:
    until(lambda: line in httpx.get(f"{url}/metrics").text)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_held(address: tuple[str, int], plug: socket.socket) -> bool:
    """Whether the service still has its end of the connection."""
    ends = f":{address[1]:04X}", f":{plug.getsockname()[1]:04X}"
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()]
    found = [row[9] for row in rows if row[1].endswith(ends[0]) and row[2].endswith(ends[1])]
    return any(inode != "0" for inode in found)


@pytest.fixture(scope="module")
def impatient(bundles: list[Path]) -> Iterator[tuple[str, int]]:
    settings = Settings(threads=1, header_seconds=0.4, body_seconds=0.6, write_seconds=0.6)
    with running(bundles, settings=settings) as url:
        yield place(url)


class TestConnections:
    """What a client can do with a socket by hand."""

    def say(self, address: tuple[str, int], *sent: bytes, pause: float = 0.0) -> bytes | None:
        """Send the parts; read until the service closes. None when it cuts the sending short."""
        with socket.create_connection(address, timeout=60) as plug:
            received = b""
            try:
                for part in sent:
                    plug.sendall(part)
                    time.sleep(pause)
                while chunk := plug.recv(65536):
                    received += chunk
            except (ConnectionResetError, BrokenPipeError):
                return received or None
            return received

    def problem(self, answer: bytes | None, status: int) -> str:
        """Check that the answer is a problem document; give its sentence."""
        assert answer is not None
        head, _, body = answer.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = httpx.Headers([tuple(line.split(": ", 1)) for line in lines[1:]])
        return refused(httpx.Response(status, headers=headers, content=body), int(lines[0][9:12]))

    def test_nothing_sent(self, impatient) -> None:
        assert self.say(impatient) == b""

    def test_headers_that_never_end(self, impatient) -> None:
        found = self.say(impatient, b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        assert "within 0.4 s" in self.problem(found, 408)

    def test_headers_in_drops(self, impatient) -> None:
        drops = [b"GET /healthz HTTP/1.1\r\n", *[b"X: y\r\n"] * 20]
        found = self.say(impatient, *drops, pause=0.05)
        assert found is None or found.startswith(b"HTTP/1.1 408 ")

    def test_a_body_that_never_comes(self, impatient) -> None:
        head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        found = self.say(impatient, head + b"Content-Length: 1000\r\n\r\nabc")
        assert "within 0.6 s" in self.problem(found, 408)

    def test_too_many_headers(self, address) -> None:
        head = (
            b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            + b"X: y\r\n" * 200
            + b"\r\n"
        )
        assert "headers" in self.problem(self.say(address, head), 431)

    def test_a_header_too_long(self, address) -> None:
        head = (
            b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: "
            + b"y" * 300_000
            + b"\r\n\r\n"
        )
        assert "headers" in self.problem(self.say(address, head), 431)

    def test_an_address_too_long(self, address) -> None:
        head = b"GET /" + b"y" * 10_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert "address" in self.problem(self.say(address, head), 414)

    @pytest.mark.parametrize(
        "sent",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET / HTTX/1.1\r\n\r\n",
            b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
            b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ],
    )
    def test_no_http(self, address, sent: bytes) -> None:
        assert "HTTP/1.1 request" in self.problem(self.say(address, sent), 400)

    @pytest.mark.parametrize(
        "path",
        [b"/static/../app.py", b"/static/%2e%2e/app.py", b"//etc/passwd", b"/samples/..%2f"],
    )
    def test_paths_that_lead_elsewhere(self, address, path: bytes) -> None:
        head = b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert self.say(address, head).startswith(b"HTTP/1.1 404 ")

    def test_an_answer_that_is_not_read(self, impatient) -> None:
        """Requests are sent and sent, answers never read: the service cuts the connection."""
        request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        with socket.create_connection(impatient, timeout=60) as plug:
            plug.sendall(request * 400)
            until(lambda: not is_held(impatient, plug))
        with socket.create_connection(impatient, timeout=60) as plug:
            plug.sendall(request)  # others are answered
            assert read_answer(plug)[0] == 200

    def test_others_are_served_meanwhile(self, address) -> None:
        slow = [socket.create_connection(address) for _ in range(50)]
        try:
            for plug in slow:
                plug.sendall(b"GET /healthz HTTP/1.1\r\n")
            assert httpx.get(f"http://{address[0]}:{address[1]}/healthz").status_code == 200
        finally:
            for plug in slow:
                plug.close()


def test_bytes_in_hand_are_bounded(bundles: list[Path], png: bytes) -> None:
    settings = Settings(threads=1, max_bytes_in_hand=1000)
    app = create_app(bundles, settings)
    with TestClient(app) as client:
        wait_until_ready(client)
        answer = client.post("/v1/segment", content=png, headers=PNG)
        assert "bytes of requests" in refused(answer, 503)
        assert app.state.service.admission.body_bytes == 0


def test_connections_are_bounded(bundles: list[Path]) -> None:
    """The one too many is told so while all are at work; health is answered all the same."""
    with (
        running(bundles, settings=Settings(threads=1, max_connections=3)) as url,
        ExitStack() as held,
    ):
        for _ in range(3):
            plug = held.enter_context(socket.create_connection(place(url)))
            head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
            plug.sendall(head + b"Content-Type: image/png\r\nExpect: 100-continue\r\n\r\n")
            assert plug.recv(12) == b"HTTP/1.1 100"
        assert httpx.get(f"{url}/healthz").status_code == 200
        answer = httpx.get(f"{url}/v1/models")
        assert "3 connections" in refused(answer, 503)
        assert answer.headers["retry-after"] == "1"
        held.close()
        until(lambda: httpx.get(f"{url}/v1/models").status_code == 200)


@pytest.mark.parametrize("sent", [b"", HEALTH, HEALTH[:20]])
def test_idle_connections_keep_nobody_out(bundles: list[Path], sent: bytes) -> None:
    """Of those that wait for a request the longest is closed for another that comes."""
    settings = Settings(threads=1, max_connections=3, header_seconds=600)
    with running(bundles, settings=settings) as url, ExitStack() as held:
        plugs = [held.enter_context(socket.create_connection(place(url), 60)) for _ in range(9)]
        for plug in plugs:
            with contextlib.suppress(ConnectionError):
                plug.sendall(sent)
        for _ in range(3):  # some may still be at work
            until(lambda: httpx.get(f"{url}/v1/models").status_code == 200)


def test_answers_that_wait_for_clients_are_bounded_together(bundles: list[Path]) -> None:
    """Past that the one that waits longest is given up, not the newest."""
    settings = Settings(threads=1, max_bytes_in_hand=1_000_000, write_seconds=600)
    request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 200
    with running(bundles, settings=settings) as url, ExitStack() as held:
        plugs = []
        while len(plugs) < 40 and all(is_held(place(url), plug) for plug in plugs):
            plug = held.enter_context(socket.socket())
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plug.connect(place(url))
            plug.sendall(request)
            plugs.append(plug)
            httpx.get(f"{url}/v1/models")
        # One of the first, by when the service began to wait for it: not always by their order.
        until(lambda: not all(is_held(place(url), plug) for plug in plugs))
        assert is_held(place(url), plugs[-1])
        assert httpx.get(f"{url}/v1/models").status_code == 200


@pytest.mark.parametrize("kind", ["unread answer", "TLS", "TLS handshake"])
def test_a_client_that_does_nothing_does_not_keep_the_service_from_stopping(
    bundles: list[Path],
    authority: Path,  # noqa: F811
    kind: str,
) -> None:
    settings = Settings(threads=1, drain_seconds=600, write_seconds=600, header_seconds=0.5)
    if kind != "unread answer":
        settings = settings.model_copy(
            update={
                "tls_certificate": authority / "127.0.0.1.pem",
                "tls_key": authority / "127.0.0.1.key",
            }
        )
    stopped, service = threading.Event(), ExitStack()
    url = service.enter_context(running(bundles, settings=settings))
    with socket.socket() as plug:
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plug.connect(place(url))
        if kind == "TLS":
            context = ssl.create_default_context(cafile=str(authority / "ca.pem"))
            plug = context.wrap_socket(plug, server_hostname="127.0.0.1")
            plug.sendall(HEALTH)
            assert read_answer(plug)[0] == 200  # and then the client lets it be
        elif kind == "unread answer":
            plug.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
            wait_for(url, 'fdconv_requests_total{route="/openapi.json"')
        threading.Thread(target=lambda: (service.close(), stopped.set())).start()
        assert stopped.wait(100)


def test_what_is_not_done_when_the_service_ends_is_told_so(bundles: list[Path], caplog) -> None:
    head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with ExitStack() as stack:
        with running(bundles, settings=Settings(threads=1, drain_seconds=1)) as url:
            plug = stack.enter_context(socket.create_connection(place(url), timeout=60))
            plug.sendall(head + b"Content-Length: 900\r\n\r\nabc")
            time.sleep(0.2)
        status, headers, body = read_answer(plug)
    assert (status, headers["retry-after"]) == (503, "1")
    assert "stopped" in json.loads(body)["detail"]
    assert not [record for record in caplog.records if record.exc_info]


def test_a_tls_handshake_has_to_begin_in_time(
    bundles: list[Path],
    authority: Path,  # noqa: F811
) -> None:
    settings = Settings(
        threads=1,
        tls_certificate=authority / "127.0.0.1.pem",
        tls_key=authority / "127.0.0.1.key",
        header_seconds=0.3,
    )
    with (
        running(bundles, settings=settings) as url,
        socket.create_connection(place(url), timeout=55) as plug,  # uvicorn leaves it 60
        contextlib.suppress(ConnectionError),
    ):
        assert plug.recv(1) == b""


def test_health_does_not_wait_for_hundreds(bundles: list[Path]) -> None:
    """Of the requests that came before it in one go, only some are begun before health is."""
    app = create_app(bundles[:1], Settings(threads=1))
    order = []

    async def flood() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def ask(path: str) -> None:
                await client.get(path)
                order.append(path)

            paths = [*["/v1/models"] * 200, "/healthz"]
            await asyncio.gather(*map(ask, paths))

    asyncio.run(flood())
    assert order.index("/healthz") < 50
