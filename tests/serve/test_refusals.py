"""What a request that cannot be answered is told."""

from __future__ import annotations

import asyncio
import logging
import struct
import threading
import zlib
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdconv_deploy.serve import Settings, create_app
from fdconv_deploy.serve.errors import Problem
from tests.serve.conftest import encoded, wait_until_ready

PNG = {"Content-Type": "image/png"}


def refused(answer: httpx.Response, status: int, *, allow: str = "") -> str:
    """Check a problem document's shape; give its sentence."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate(answer.json())
    assert problem.status == status
    assert problem.request_id == answer.headers["x-request-id"]
    assert problem.detail.endswith(".")
    assert "\n" not in problem.detail
    for leak in ("/work", "/tmp", ".onnx", "Traceback", "site-packages"):
        assert leak not in answer.text or leak == allow
    return problem.detail


def post(client: TestClient, body: bytes, headers=PNG, path: str = "/v1/segment"):
    return client.post(path, content=body, headers=headers)


class TestImages:
    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
    def test_cut_off(self, client: TestClient, png: bytes, kept: float) -> None:
        assert "cut off or damaged" in refused(post(client, png[: int(len(png) * kept)]), 422)

    def test_empty(self, client: TestClient) -> None:
        assert "empty" in refused(post(client, b""), 422)

    def test_not_an_image(self, client: TestClient) -> None:
        assert "JPEG, PNG, WebP" in refused(post(client, b"<svg/>"), 415)

    def test_format_not_accepted(self, client: TestClient, picture) -> None:
        gif = encoded(picture, "GIF")
        assert "Convert it" in refused(post(client, gif, {"Content-Type": "image/gif"}), 415)

    def test_too_many_pixels(self, client: TestClient) -> None:
        def chunk(kind: bytes, payload: bytes) -> bytes:
            body = kind + payload
            return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))

        header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
        assert "40,000 pixels" in refused(post(client, bomb), 413)


class TestBodies:
    def test_other_content_types(self, client: TestClient, png: bytes) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json", "imag"):
            found = refused(post(client, png, {"Content-Type": kind}), 415)
            assert kind in found
            assert "image/jpeg" in found

    def test_no_content_type(self, client: TestClient, png: bytes) -> None:
        assert "no content type" in refused(post(client, png, {}), 415)

    def test_announced_too_large(self, client: TestClient) -> None:
        assert "200,000 bytes" in refused(post(client, bytes(200_001)), 413)

    @pytest.mark.parametrize("multipart", [False, True])
    def test_too_large_without_announcing_it(self, client: TestClient, multipart: bool) -> None:
        sent = 0

        def body():
            nonlocal sent
            if multipart:
                yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
            for _ in range(100):
                sent += 10_000
                yield bytes(10_000)

        kind = "multipart/form-data; boundary=x" if multipart else "image/png"
        answer = client.post("/v1/segment", content=body(), headers={"Content-Type": kind})
        assert "200,000 bytes" in refused(answer, 413)

    def test_just_small_enough(self, client: TestClient) -> None:
        assert "damaged" in refused(post(client, bytes(200_000)), 415)

    @pytest.mark.parametrize(
        ("files", "says"),
        [
            ({"picture": ("a.png", b"x")}, "no such field"),
            ({"image": (None, b"text")}, "holds text"),
        ],
    )
    def test_form_without_the_field(self, client: TestClient, files, says: str) -> None:
        assert says in refused(client.post("/v1/segment", files=files), 422)

    def test_too_many_images(self, client: TestClient, png: bytes) -> None:
        files = [("image", (f"{n}.png", b"x")) for n in range(17)]
        assert "At most 16 images" in refused(client.post("/v1/segment", files=files), 422)

    @pytest.mark.parametrize(
        ("kind", "body"),
        [
            ("multipart/form-data", b"--x"),
            ("multipart/form-data; boundary=", b"--x"),
            ("multipart/form-data; boundary=x", b""),
            ("multipart/form-data; boundary=x", b"--y\r\n\r\n"),
            ("multipart/form-data; boundary=x", b"--x\r\n\r\nabc"),
            ("multipart/form-data; boundary=x; charset=zlib", b"--x\r\nContent-Disposition: a"),
            ("multipart/form-data; boundary=" + "x" * 5000, b"--x"),
        ],
    )
    def test_broken_forms(self, client: TestClient, kind: str, body: bytes) -> None:
        refused(post(client, body, {"Content-Type": kind}), 422)

    def test_cut_off_form(self, client: TestClient, png: bytes) -> None:
        request = client.build_request("POST", "/v1/segment", files={"image": ("a.png", png)})
        body = request.read()
        answer = post(client, body[:-200], {"Content-Type": request.headers["content-type"]})
        refused(answer, 422)


class TestAddresses:
    def test_unknown(self, client: TestClient) -> None:
        assert "/docs" in refused(client.get("/v1/nothing"), 404)

    def test_unknown_model(self, client: TestClient, png: bytes) -> None:
        for answer in (
            client.get("/v1/models/none"),
            post(client, png, path="/v1/models/none/segment"),
        ):
            assert "street, sliding" in refused(answer, 404)

    @pytest.mark.parametrize("name", ["%2e%2e", "..%2f..%2fetc", "a%00b", "%ff", "x" * 3000])
    def test_paths_as_names(self, client: TestClient, png: bytes, name: str) -> None:
        assert post(client, png, path=f"/v1/models/{name}/segment").status_code in (404, 405)

    def test_other_method(self, client: TestClient) -> None:
        answer = client.get("/v1/segment")
        refused(answer, 405)
        assert answer.headers["allow"] == "POST"

    @pytest.mark.parametrize(
        ("query", "names"),
        [
            ("opacity=2", "opacity"),
            ("opacity=nan", "opacity"),
            ("opacity=x", "opacity"),
            ("output=svg", "output"),
            ("fit=crop", "fit"),
            ("mode=tiles", "mode"),
            ("opacty=0.3", "opacty"),
        ],
    )
    def test_query(self, client: TestClient, png: bytes, query: str, names: str) -> None:
        assert names in refused(post(client, png, path=f"/v1/segment?{query}"), 422)

    def test_mode_the_model_has_not(self, client: TestClient, png: bytes) -> None:
        found = refused(post(client, png, path="/v1/segment?mode=slide"), 422)
        assert "only in whole" in found


class TestRequestId:
    @pytest.mark.parametrize("given", ["abc", "a.b_c-1", "x" * 64])
    def test_the_clients_own(self, client: TestClient, given: str) -> None:
        answer = client.get("/healthz", headers={"X-Request-ID": given})
        assert answer.headers["x-request-id"] == given

    @pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a\tb", "<script>", "é"])
    def test_made_where_it_is_not_sane(self, client: TestClient, given: str) -> None:
        answer = client.get("/healthz", headers={"X-Request-ID": given.encode("latin-1")})
        assert len(answer.headers["x-request-id"]) == 32

    def test_each_has_another(self, client: TestClient) -> None:
        assert len({client.get("/healthz").headers["x-request-id"] for _ in range(5)}) == 5


def test_a_failure_inside_names_no_path(bundles: list[Path], png: bytes, caplog) -> None:
    from fdconv_deploy.errors import BackendError
    from fdconv_deploy.runtime import open_session

    session = open_session(bundles[0], threads=1)
    with TestClient(create_app([session]), raise_server_exceptions=False) as client:
        wait_until_ready(client)

        def fail(*_, **__):
            raise BackendError("/work/secret.onnx exploded")

        session.run_batches = fail  # type: ignore[method-assign]
        with caplog.at_level(logging.ERROR, "fdconv.serve"):
            found = refused(post(client, png, {**PNG, "X-Request-ID": "find-me"}), 500)
    assert "find-me" in found
    assert any("find-me" in record.getMessage() for record in caplog.records)
    session.close()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.binary(max_size=200),
    st.integers(0, 10_000),
    st.sampled_from(["image/png", "multipart/form-data; boundary=b", "image/jpeg"]),
)
def test_mutated_bodies_are_never_the_services_fault(client, png, junk, at, kind) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n" + png + b"\r\n--b--\r\n"
    )
    whole = form if "multipart" in kind else png
    at %= len(whole)
    body = whole[:at] + junk + whole[at + len(junk) :]
    answer = post(client, body, {"Content-Type": kind})
    assert answer.status_code in (200, 413, 415, 422), answer.text


def test_errors_are_answered_by_the_event_loop(bundles: list[Path]) -> None:
    """Not by threads of Starlette's, for which refusals would wait while there is much to do."""
    app = create_app(bundles[:1], Settings(threads=1, max_body_bytes=10))

    async def ask() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            refused(await client.get("/nothing"), 404)
            refused(await client.get("/readyz"), 503)  # models are not even loaded
            refused(await client.post("/v1/segment", content=b"x", headers=PNG), 503)
            refused(await client.post("/v1/segment?size=3", content=b"x", headers=PNG), 422)
        assert not [t.name for t in set(threading.enumerate()) - before if "AnyIO" in t.name]

    before = set(threading.enumerate())
    asyncio.run(ask())


def test_client_that_leaves_while_sending(bundles: list[Path]) -> None:
    app = create_app(bundles[:1], Settings(threads=1))

    async def leave() -> list[dict]:
        sent: list[dict] = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/segment",
            "raw_path": b"/v1/segment",
            "query_string": b"",
            "headers": [(b"content-type", b"image/png")],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
        }
        messages = [
            {"type": "http.request", "body": b"\x89PNG", "more_body": True},
            {"type": "http.disconnect"},
        ]

        async def receive() -> dict:
            return messages.pop(0)

        async def send(message: dict) -> None:
            sent.append(message)

        async with app.router.lifespan_context(app):
            while not app.state.service.ready:
                await asyncio.sleep(0.01)
            await app(scope, receive, send)
            assert app.state.service.admission.in_hand == 0
        return sent

    assert asyncio.run(leave())[0]["status"] == 499
