"""Plain tensor requests, which the connection and an idle inference thread answer by themselves.

Whatever way a request goes, it must be answered as on the general way, which an
``Expect: 100-continue`` chooses.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fdconv_deploy.serve import Settings, running
from fdconv_deploy.serve.kserve import at_once
from fdconv_deploy.serve.kserve.at_once import AtOnce
from fdconv_deploy.serve.kserve.direct import DirectCall
from hypothesis import given, settings
from hypothesis import strategies as st

from fdconv_deploy.runtime import Session, open_session
from tests.runtime import toy
from tests.serve.test_receiving import place, read_answer, wait_for

HEIGHT, WIDTH = 64, 96
GENERAL = "Expect: 100-continue\r\n"
LOGITS = ({"name": "logits", "parameters": {"binary_data": True}},)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose images take 74 kB, enough to be answered at once."""
    return toy.make_bundle(
        tmp_path_factory.mktemp("direct") / "street", height=HEIGHT, width=WIDTH
    ).path


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    with open_session(bundle, threads=1) as opened:
        opened.warm_up()
        yield opened


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    with running([bundle], settings=Settings(threads=1)) as address:
        yield address


def image(seed: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, HEIGHT, WIDTH)).astype(np.float32)


def asked(
    tensor: np.ndarray, *, headers: str = "", outputs: Any = LOGITS, named: str = "", **more: Any
) -> bytes:
    given = {
        "name": "images",
        "datatype": {"float32": "FP32", "uint8": "UINT8"}[str(tensor.dtype)],
        "shape": tensor.shape,
        "parameters": {"binary_data_size": tensor.nbytes},
    }
    told = {"inputs": [given], "outputs": list(outputs), **more}
    head = json.dumps({**told, "id": named} if named else told).encode()
    lines = "POST /v2/models/street/infer HTTP/1.1\r\nHost: x\r\n"
    lines += f"Content-Length: {len(head) + tensor.nbytes}\r\n"
    lines += f"Inference-Header-Content-Length: {len(head)}\r\n{headers}\r\n"
    return lines.encode() + head + tensor.tobytes()


def answer(plug: socket.socket, request: bytes) -> tuple[int, dict[str, str], bytes]:
    plug.sendall(request)
    if GENERAL.encode() in request:
        assert plug.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    return read_answer(plug)


def logits(found: tuple[int, dict[str, str], bytes]) -> np.ndarray:
    status, headers, body = found
    assert status == 200, body
    start = int(headers["inference-header-content-length"])
    shape = json.loads(body[:start])["outputs"][0]["shape"]
    return np.frombuffer(body, np.float32, offset=start).reshape(shape)


def connected(url: str) -> socket.socket:
    return socket.create_connection(place(url), timeout=20)


class Results(list):
    """What became of the requests that inference threads took at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        work = AtOnce.__call__

        def watched(call: AtOnce) -> at_once.Result:
            found = work(call)
            self.append(type(found).__name__)
            return found

        monkeypatch.setattr(AtOnce, "__call__", watched)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Results:
    return Results(monkeypatch)


def test_one_after_another(url: str, session: Session, results: Results) -> None:
    with connected(url) as plug:
        for seed in range(12):
            found = answer(plug, asked(image(seed), named="n" if seed % 3 == 0 else ""))
            assert np.array_equal(logits(found), session.run(image(seed)))
            assert json.loads(found[2][: int(found[1]["inference-header-content-length"])]).get(
                "id", ""
            ) == ("n" if seed % 3 == 0 else "")
    assert results.count("Sent") >= 10  # an unlucky one's body came slowly


@pytest.mark.parametrize("what", ["labels", "both", "text", "bytes", "four", "late"])
def test_what_is_not_plain_is_answered_as_ever(url: str, results: Results, what: str) -> None:
    tensor, more = image(1), {}
    if what == "bytes":
        tensor = np.random.default_rng(0).integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8)
        tensor = np.concatenate([tensor] * 4)  # as many bytes as one image in float32
    if what == "four":
        tensor = image(1, 4)
    if what == "late":
        more["parameters"] = {"timeout": 10_000_000}
    outputs = {
        "labels": [{"name": "labels", "parameters": {"binary_data": True}}],
        "both": [{"name": n, "parameters": {"binary_data": True}} for n in ("labels", "logits")],
        "text": [{"name": "labels"}],
    }.get(what, LOGITS)
    with connected(url) as plug:
        for _ in range(2):
            own = answer(plug, asked(tensor, outputs=outputs, **more))
            general = answer(plug, asked(tensor, outputs=outputs, headers=GENERAL, **more))
            assert own[0] == general[0] == 200
            assert own[2] == general[2]
            assert set(own[1]) == set(general[1])
    assert "Sent" not in results


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.replace(b'"FP32"', b'"FP64"'),
        lambda r: r.replace(b'"images"', b'"imagez"'),
        lambda r: r.replace(b'"logits"', b'"logitz"'),
        lambda r: r.replace(b'{"inputs"', b'["inputs"'),
        lambda r: r.replace(b"/street/", b"/nobody/"),
        lambda r: r.replace(b"street/infer", b"street/versions/7/infer"),
    ],
)
def test_what_is_wrong_is_refused_as_ever(url: str, spoil) -> None:
    with connected(url) as plug:
        own = answer(plug, spoil(asked(image(0))))
        general = answer(plug, asked(image(0)))
        assert general[0] == 200
        plug.sendall(spoil(asked(image(0), headers=GENERAL)))
        found = plug.recv(25)
        assert found.startswith(b"HTTP/1.1 100" if own[0] == 400 else b"HTTP/1.1 404")
    assert own[0] in (400, 404)
    assert json.loads(own[2])["request_id"] == own[1]["x-request-id"]


@given(cuts=st.lists(st.integers(1, 74_000), max_size=4, unique=True), wait=st.sampled_from([0, 5]))
@settings(max_examples=15, deadline=None)
def test_in_pieces(url: str, session: Session, cuts: list[int], wait: int) -> None:
    request, expected = asked(image(3)), session.run(image(3))
    with connected(url) as plug:
        plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            edges = [0, *sorted(cuts), len(request)]
            for start, end in pairwise(edges):
                plug.sendall(request[start:end])
                time.sleep(wait / 1e3)
            assert np.array_equal(logits(read_answer(plug)), expected)


def test_pipelined(url: str, session: Session) -> None:
    health = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(url) as plug:
        plug.sendall(asked(image(0)) + health + asked(image(1)) + asked(image(2)))
        file = plug.makefile("rb")
        like = type("Plug", (), {"makefile": lambda self, mode: file})()
        assert np.array_equal(logits(read_answer(like)), session.run(image(0)))
        assert json.loads(read_answer(like)[2]) == {"status": "ok"}
        for seed in (1, 2):
            assert np.array_equal(logits(read_answer(like)), session.run(image(seed)))


def test_many_clients(url: str, session: Session) -> None:
    """Whoever is first is answered at once, the others by way of the queue."""
    wrong: list[int] = []
    expected = {seed: session.run(image(seed)) for seed in range(6)}

    def client(seed: int) -> None:
        with connected(url) as plug:
            for _ in range(30):
                found = answer(plug, asked(image(seed)))
                if not np.allclose(logits(found), expected[seed], atol=1e-5):
                    wrong.append(seed)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    text = httpx.get(f"{url}/metrics").text
    assert "fdconv_in_hand_images 0.0" in text
    assert "fdconv_body_bytes 0.0" in text


def test_an_answer_written_by_halves(url: str, session: Session, monkeypatch) -> None:
    """What the socket does not take at once, the event loop sends."""
    monkeypatch.setattr(at_once.os, "writev", lambda fd, parts: os.write(fd, parts[0][:100]))
    with connected(url) as plug:
        for seed in range(3):
            assert np.array_equal(
                logits(answer(plug, asked(image(seed)))), session.run(image(seed))
            )


def test_it_is_counted(bundle: Path) -> None:
    with running([bundle], settings=Settings(threads=1)) as url, connected(url) as plug:
        for seed in range(5):
            answer(plug, asked(image(seed)))
        text = httpx.get(f"{url}/metrics").text
        route = '{route="/v2/models/{name}/infer"'
        assert f'fdconv_requests_total{route},status="200"}} 5.0' in text
        assert 'fdconv_images_total{model="street"} 5.0' in text
        assert 'fdconv_batch_size_count{model="street"} 5.0' in text
        assert 'fdconv_stage_seconds_count{model="street",stage="inference"} 5.0' in text


def test_keys(bundle: Path, results: Results) -> None:
    with running([bundle], settings=Settings(threads=1, api_keys=["one"])) as url:
        for headers, status in [
            ("", 401),
            ("X-API-Key: two\r\n", 401),
            ("X-API-Key: one\r\n", 200),
        ]:
            with connected(url) as plug:
                assert answer(plug, asked(image(0), headers=headers))[0] == status
    assert results.count("Sent") <= 1


class Held:
    """A session's runs, each of which waits until it may go on, and may fail."""

    def __init__(self, session: Session) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self._run = session.run
        session.run = self  # type: ignore[method-assign, assignment]

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        self.started.set()
        assert self.go_on.wait(20)
        if self.error is not None:
            raise self.error
        return self._run(inputs)


@pytest.fixture
def held(bundle: Path) -> Iterator[tuple[str, Held, Session]]:
    with (
        open_session(bundle, threads=1) as session,
        running([session], settings=Settings(threads=1, deadline_ms=300)) as url,
    ):
        run = session.run
        yield url, Held(session), session
        session.run = run  # type: ignore[method-assign]


def test_one_too_late(held: tuple[str, Held, Session]) -> None:
    url, runs, _ = held
    with connected(url) as plug:
        assert answer(plug, asked(image(0)))[0] == 504
        runs.go_on.set()
        # Its own answer, which comes now, is not sent: the next one is the next request's.
        for name in "abc":
            status, headers, body = answer(plug, asked(image(1), named=name))
            told = json.loads(body[: int(headers["inference-header-content-length"])])
            assert (status, told["id"]) == (200, name)
    wait_for(url, "fdconv_in_hand_images 0.0")


def test_a_client_that_leaves(held: tuple[str, Held, Session]) -> None:
    url, runs, _ = held
    with connected(url) as plug:
        plug.sendall(asked(image(0)))
        assert runs.started.wait(20)
    wait_for(url, "fdconv_in_hand_images 0.0")
    wait_for(url, 'fdconv_requests_total{route="/v2/models/{name}/infer",status="499"} 1.0')
    runs.go_on.set()
    with connected(url) as plug:
        assert answer(plug, asked(image(1)))[0] == 200


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("broken"), 500), (SystemExit("worker"), 503)]
)
def test_a_run_that_fails(held: tuple[str, Held, Session], error, status: int) -> None:
    url, runs, _ = held
    runs.go_on.set()
    runs.error = error
    with connected(url) as plug:
        found, headers, body = answer(plug, asked(image(0)))
        assert (found, headers["content-type"]) == (status, "application/problem+json")
        assert json.loads(body)["request_id"] == headers["x-request-id"]
        assert ("retry-after" in headers) == (status == 503)
        runs.error = None
        assert answer(plug, asked(image(0)))[0] == 200
    wait_for(url, "fdconv_in_hand_images 0.0")


def test_descriptors_are_not_kept(url: str) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    with connected(url) as plug:
        answer(plug, asked(image(0)))
        time.sleep(0.05)
        before = descriptors()
        for seed in range(50):
            answer(plug, asked(image(seed % 3)))
        time.sleep(0.05)
        assert descriptors() <= before


def test_nothing_is_left_to_be_collected(url: str) -> None:
    """Neither requests nor their tensors wait for the garbage collector."""

    def calls() -> int:
        return sum(isinstance(found, DirectCall | AtOnce) for found in gc.get_objects())

    with connected(url) as plug:
        gc.collect()
        gc.disable()
        try:
            before = calls()
            for seed in range(20):
                answer(plug, asked(image(seed)))
                answer(plug, asked(image(seed), outputs=[{"name": "labels"}]))
            time.sleep(0.05)
            assert calls() <= before + 4  # the connection's and the worker's last
        finally:
            gc.enable()
