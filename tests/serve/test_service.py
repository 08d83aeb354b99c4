"""The service as a whole: readiness, load, cards, a real server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from fdconv_deploy.config import TestMode
from fdconv_deploy.errors import BackendError, BundleError
from fdconv_deploy.runtime import open_session
from fdconv_deploy.serve import Settings, create_app, model_cards, running
from fdconv_deploy.serve.app import ServerError
from tests.runtime import toy
from tests.serve.conftest import wait_until_ready
from tests.serve.test_refusals import refused

ROOT = Path(__file__).resolve().parents[2]
PNG = {"Content-Type": "image/png"}


class TestCards:
    def test_list(self, client: TestClient) -> None:
        found = model_cards.ModelList.model_validate(client.get("/v1/models").json()).models
        assert [(m.name, m.default, m.mode) for m in found] == [
            ("street", True, "whole"),
            ("sliding", False, "slide"),
        ]
        assert found[0].modes == ["whole"]
        assert found[1].modes == ["whole", "slide"]

    def test_one(self, client: TestClient) -> None:
        card = model_cards.ModelCard.model_validate(client.get("/v1/models/street").json())
        assert (card.input.height, card.input.width) == (32, 48)
        assert card.batch_sizes == [1, 4]
        assert [c.name for c in card.classes] == [f"class {i}" for i in range(5)]
        assert {p.batch for p in card.parity} == {1, 4}
        assert card.backend.startswith("onnxruntime")

    def test_names_no_path(self, client: TestClient, bundles: list[Path]) -> None:
        assert str(bundles[0].parent) not in client.get("/v1/models").text


class TestOpenApi:
    def test_is_complete(self, client: TestClient) -> None:
        api = client.get("/openapi.json").json()
        assert set(api["paths"]) == {
            "/v1/segment",
            "/v1/models/{name}/segment",
            "/v1/models",
            "/v1/models/{name}",
            "/healthz",
            "/readyz",
            "/metrics",
            "/v2",
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models/{name}",
            "/v2/models/{name}/versions/{version}",
            "/v2/models/{name}/ready",
            "/v2/models/{name}/versions/{version}/ready",
            "/v2/models/{name}/config",
            "/v2/models/{name}/versions/{version}/config",
            "/v2/models/stats",
            "/v2/models/{name}/stats",
            "/v2/models/{name}/versions/{version}/stats",
            "/v2/models/{name}/infer",
            "/v2/models/{name}/versions/{version}/infer",
            "/v2/repository/index",
            "/v2/repository/models/{name}/load",
            "/v2/repository/models/{name}/unload",
        }
        post = api["paths"]["/v1/segment"]["post"]
        assert {"multipart/form-data", "image/jpeg"} <= set(post["requestBody"]["content"])
        ok = post["responses"]["200"]["content"]
        assert {"application/json", "image/png"} <= set(ok)
        assert {"406", "413", "415", "422", "503"} <= set(post["responses"])
        for status in ("413", "422"):
            assert "application/problem+json" in post["responses"][status]["content"]
        mask = api["components"]["schemas"]["RunLengthMask"]
        assert "row by row" in mask["description"]
        assert "curl" in api["info"]["description"]


class TestReadiness:
    def test_not_before_the_models_are_warm(self, bundles: list[Path], png: bytes) -> None:
        session = open_session(bundles[0], threads=1)
        go_on = threading.Event()
        warm_up = session.warm_up
        session.warm_up = lambda *a: (go_on.wait(60), warm_up(*a))[1]  # type: ignore
        with TestClient(create_app([session])) as client:
            assert client.get("/healthz").json() == {"status": "ok"}
            for answer in (
                client.get("/readyz"),
                client.post("/v1/segment", content=png, headers=PNG),
            ):
                assert "being loaded" in refused(answer, 503)
                assert answer.headers["retry-after"] == "1"
            go_on.set()
            wait_until_ready(client)
            assert client.post("/v1/segment", content=png, headers=PNG).status_code == 200
        session.run(np.zeros((1, 3, 32, 48), np.float32))  # a caller's session stays open
        session.close()

    def test_a_model_that_cannot_start(self, bundles: list[Path], caplog) -> None:
        session = open_session(bundles[0], threads=1)

        def fail() -> float:
            raise BackendError("no memory")

        session.warm_up = fail  # type: ignore[method-assign]
        with TestClient(create_app([session])) as client:
            for _ in range(10_000):
                if "failed to start" in client.get("/readyz").text:
                    break
            assert "server's log" in refused(client.get("/readyz"), 503)
            assert client.get("/healthz").status_code == 200
        assert "no memory" in caplog.text


def test_overload_is_refused_and_recovered_from(bundles: list[Path], png: bytes) -> None:
    """One worker, two waiting: of ten at once, three are answered, the rest told to come back."""
    session = open_session(bundles[0], threads=1)
    started, go_on = threading.Event(), threading.Event()
    run = session.run_batches

    def slow(inputs):
        started.set()
        assert go_on.wait(60)
        return run(inputs)

    app = create_app([session], Settings(threads=1, queue_limit=2, retry_after_seconds=7))

    async def flood() -> None:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)
            session.run_batches = slow  # type: ignore[method-assign]

            def request():
                return asyncio.create_task(client.post("/v1/segment", content=png, headers=PNG))

            admitted = [request() for _ in range(3)]
            while app.state.service.admission.in_hand < 3 or not started.is_set():
                await asyncio.sleep(0.005)
            rejected = await asyncio.gather(*(request() for _ in range(7)))
            for answer in rejected:
                assert "waiting" in refused(answer, 503)
                assert answer.headers["retry-after"] == "7"
            assert (await client.get("/healthz")).status_code == 200  # the loop is free
            go_on.set()
            assert [a.status_code for a in await asyncio.gather(*admitted)] == [200] * 3
            assert app.state.service.admission.in_hand == 0
            assert (await request()).status_code == 200

    asyncio.run(flood())
    session.close()


def test_many_at_once_get_their_own_answers(client: TestClient, bundles: list[Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from tests.serve.conftest import encoded

    images = [
        np.random.default_rng(n).integers(0, 256, (20 + n, 30, 3), dtype=np.uint8)
        for n in range(12)
    ]
    with open_session(bundles[0], threads=1) as session:
        expected = [session.segment(image).areas().tolist() for image in images]

    def ask(image: np.ndarray) -> list[int]:
        answer = client.post("/v1/segment", content=encoded(image, "PNG"), headers=PNG)
        return [c["area"] for c in answer.json()["classes"]]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, images)) == expected


class TestWhatIsServed:
    def test_nothing(self) -> None:
        with pytest.raises(BundleError, match="nothing to serve"):
            create_app([])

    def test_a_damaged_bundle(self, tmp_path: Path) -> None:
        path = toy.make_bundle(tmp_path / "b").path
        (path / "weights.bin").unlink()
        with pytest.raises(BundleError, match="lacks the file"):
            create_app([path])

    def test_a_module(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="does not segment"):
            create_app([toy.make_module_bundle(tmp_path / "m").path])

    def test_slide_mode_that_cannot_slide(self, tmp_path: Path) -> None:
        arch = toy.architecture(test=TestMode(mode="slide", stride=(64, 64)))
        with pytest.raises(BundleError, match="between windows"):
            create_app([toy.make_bundle(tmp_path / "b", arch=arch).path])

    def test_two_of_one_name(self, tmp_path: Path) -> None:
        paths = [toy.make_bundle(tmp_path / n / "street").path for n in "ab"]
        with pytest.raises(BundleError, match="Two bundles are called 'street'"):
            create_app(paths)

    @pytest.mark.parametrize("name", ["a b", "-x", ".hidden", "ä"])
    def test_name_that_is_no_address(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(BundleError, match="Rename the folder"):
            create_app([toy.make_bundle(tmp_path / name).path])

    def test_more_classes_than_a_png_holds(self, tmp_path: Path, png: bytes) -> None:
        path = toy.make_bundle(tmp_path / "b", arch=toy.architecture(300)).path
        with TestClient(create_app([path])) as client:
            wait_until_ready(client)
            masked = client.post("/v1/segment?output=mask", content=png, headers=PNG)
            assert "at most 256" in refused(masked, 406)
            plain = client.post("/v1/segment", content=png, headers=PNG)
            assert len(plain.json()["classes"]) == 300


class TestServer:
    def test_running(self, bundles: list[Path], png: bytes) -> None:
        with running(bundles, settings=Settings(threads=1)) as address:
            assert httpx.get(f"{address}/readyz").status_code == 200
            answer = httpx.post(f"{address}/v1/segment", content=png, headers=PNG)
            assert answer.json()["height"] == 50
            assert "server" not in answer.headers
            too_large = httpx.post(
                f"{address}/v1/segment", content=bytes(70 << 20), headers=PNG, timeout=60
            )
            refused(too_large, 413)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/healthz")

    def test_port_taken(self, bundles: list[Path]) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            server = running(bundles[:1], port=port)
            with pytest.raises(ServerError, match="give another one"):
                server.__enter__()

    def test_host_of_another_machine(self, bundles: list[Path]) -> None:
        with pytest.raises(ServerError, match=r"cannot listen on 192\.0\.2\.1"):
            running(bundles[:1], "192.0.2.1").__enter__()

    def test_a_model_that_never_starts(self, bundles: list[Path]) -> None:
        session = open_session(bundles[0], threads=1)

        def fail() -> float:
            raise BackendError("no memory")

        session.warm_up = fail  # type: ignore[method-assign]
        with pytest.raises(ServerError, match="did not become ready"):
            running([session], ready_within=1).__enter__()

    def test_sigterm_lets_requests_finish(self, bundles: list[Path], png: bytes) -> None:
        code = (
            "import sys, time\n"
            "from fdconv_deploy.serve import Settings, run\n"
            "from fdconv_deploy.runtime import open_session\n"
            "session = open_session(sys.argv[1], threads=1)\n"
            "answer = session.run_batches\n"
            "def slow(inputs):\n"
            "    if inputs['images'].any():  # not those that the service times at its start\n"
            "        print('inside', flush=True); time.sleep(1)\n"
            "    return answer(inputs)\n"
            "session.run_batches = slow\n"
            "run([session], port=int(sys.argv[2]), settings=Settings(threads=1))\n"
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(bundles[0]), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        answers: list[httpx.Response] = []
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(2400):
                try:
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.05)
            asking = threading.Thread(
                target=lambda: answers.append(
                    httpx.post(f"{url}/v1/segment", content=png, headers=PNG, timeout=60)
                )
            )
            asking.start()
            assert process.stdout is not None
            while process.stdout.readline() not in ("inside\n", ""):
                pass  # the access log
            os.kill(process.pid, signal.SIGTERM)
            asking.join(60)
            process.wait(60)
        finally:
            process.kill()
            process.communicate()
        assert [a.status_code for a in answers] == [200]


def test_loads_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, json, fdconv_deploy.runtime, fdconv_deploy.serve\n"
        "print(json.dumps([m for m in ('torch', 'onnx', 'onnxruntime', 'fdconv_deploy.export')"
        " if m in sys.modules]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout) == []
