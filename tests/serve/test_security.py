"""Keys, TLS, and clients that take their time or send too much of something."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.testclient import TestClient
from fdconv_deploy.serve import Settings, create_app, running
from fdconv_deploy.serve.app import ServerError

from tests.serve.conftest import wait_until_ready
from tests.serve.kserve.conftest import free_port
from tests.serve.test_refusals import refused

PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def guarded(bundles: list[Path]) -> Iterator[TestClient]:
    settings = Settings(threads=1, api_keys=("first-key", "second-key"))
    with TestClient(create_app(bundles, settings)) as client:
        wait_until_ready(client)
        yield client


class TestKeys:
    @pytest.mark.parametrize(
        "headers",
        [
            {"Authorization": "Bearer first-key"},
            {"authorization": "bearer second-key"},
            {"X-API-Key": "second-key"},
        ],
    )
    def test_let_in(self, guarded: TestClient, png: bytes, headers: dict[str, str]) -> None:
        answer = guarded.post("/v1/segment", content=png, headers={**PNG, **headers})
        assert answer.status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer first-ke"},
            {"Authorization": "Basic first-key"},
            {"Authorization": "Bearer wrong", "X-API-Key": "first-key"},
            {"X-API-Key": ""},
            {"X-API-Key": "first-key,second-key"},
        ],
    )
    @pytest.mark.parametrize("path", ["/v1/segment", "/v1/models", "/metrics", "/v2", "/none"])
    def test_kept_out(self, guarded: TestClient, path: str, headers: dict[str, str]) -> None:
        answer = guarded.post(path, content=b"", headers=headers)
        assert "API key" in refused(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize(
        "path",
        ["/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/", "/docs", "/samples"],
    )
    def test_open_to_all(self, guarded: TestClient, path: str) -> None:
        assert guarded.get(path).status_code == 200

    def test_are_documented(self, guarded: TestClient) -> None:
        api = guarded.get("/openapi.json").json()
        assert set(api["components"]["securitySchemes"]) == {"bearer", "key"}
        assert "security" in api["paths"]["/v1/segment"]["post"]
        assert "security" not in api["paths"]["/healthz"]["get"]

    def test_are_not_printed(self) -> None:
        assert "first-key" not in repr(Settings(api_keys=("first-key",)))

    def test_over_grpc(self, bundles: list[Path]) -> None:
        grpc = pytest.importorskip("tritonclient.grpc")
        port = free_port()
        settings = Settings(threads=1, api_keys=("k",), grpc_port=port)
        with running(bundles, settings=settings):
            client = grpc.InferenceServerClient(f"127.0.0.1:{port}")
            assert client.is_server_ready()
            with pytest.raises(grpc.InferenceServerException, match="API key"):
                client.get_model_metadata("street")
            headers = {"authorization": "Bearer k"}
            assert client.get_model_metadata("street", headers=headers).name == "street"
            client.close()

    def test_one_client_does_not_take_it_all(self, bundles: list[Path], png: bytes) -> None:
        settings = Settings(threads=1, client_limit=2)
        with TestClient(create_app(bundles, settings)) as client:
            wait_until_ready(client)
            files = [("image", ("a.png", png))] * 3
            answer = client.post("/v1/segment", files=files)
            assert "one client may (2)" in refused(answer, 429)
            assert answer.headers["retry-after"] == "1"
            assert client.post("/v1/segment", files=files[:2]).status_code == 200


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory):
    trustme = pytest.importorskip("trustme")
    folder = tmp_path_factory.mktemp("tls")
    made = trustme.CA()
    made.cert_pem.write_to_path(str(folder / "ca.pem"))
    for who in ("127.0.0.1", "client"):
        cert = made.issue_cert(who)
        cert.cert_chain_pems[0].write_to_path(str(folder / f"{who}.pem"))
        cert.private_key_pem.write_to_path(str(folder / f"{who}.key"))
    return folder


class TestTls:
    def test_https(self, bundles: list[Path], authority: Path, png: bytes) -> None:
        settings = Settings(
            threads=1,
            tls_certificate=authority / "127.0.0.1.pem",
            tls_key=authority / "127.0.0.1.key",
        )
        with running(bundles, settings=settings) as address:
            assert address.startswith("https://")
            context = ssl.create_default_context(cafile=str(authority / "ca.pem"))
            answer = httpx.post(f"{address}/v1/segment", content=png, headers=PNG, verify=context)
            assert answer.status_code == 200

    def test_a_key_of_another(self, bundles: list[Path], authority: Path) -> None:
        settings = Settings(
            threads=1,
            tls_certificate=authority / "127.0.0.1.pem",
            tls_key=authority / "client.key",
        )
        with pytest.raises(ServerError, match="matching pair"):
            running(bundles, settings=settings).__enter__()

    def test_a_file_that_is_not_there(self, bundles: list[Path], tmp_path: Path) -> None:
        settings = Settings(tls_certificate=tmp_path / "c.pem", tls_key=tmp_path / "k.pem")
        with pytest.raises(ServerError, match=r"c\.pem, which does not exist"):
            running(bundles, settings=settings).__enter__()

    def test_settings_that_do_not_go_together(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="together"):
            Settings(tls_certificate=tmp_path / "c.pem")
        with pytest.raises(ValueError, match="needs tls_certificate"):
            Settings(tls_client_ca=tmp_path / "c.pem")


@pytest.fixture(scope="module")
def address(bundles: list[Path]) -> Iterator[tuple[str, int]]:
    settings = Settings(threads=1, header_seconds=0.4, body_seconds=0.6, write_seconds=0.6)
    with running(bundles, settings=settings) as url:
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        yield parts.hostname, parts.port


class TestConnections:
    """What a client can do with a socket by hand."""

    def say(self, address: tuple[str, int], *sent: bytes, pause: float = 0.0) -> bytes | None:
        """Send the parts; read until the service closes. None when it cuts the sending short."""
        with socket.create_connection(address, timeout=20) as plug:
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

    def test_nothing_sent(self, address) -> None:
        start = time.monotonic()
        assert self.say(address) == b""
        assert time.monotonic() - start < 10

    def test_headers_that_never_end(self, address) -> None:
        found = self.say(address, b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        assert "within 0.4 s" in self.problem(found, 408)

    def test_headers_in_drops(self, address) -> None:
        drops = [b"GET /healthz HTTP/1.1\r\n", *[b"X: y\r\n"] * 20]
        found = self.say(address, *drops, pause=0.05)
        assert found is None or found.startswith(b"HTTP/1.1 408 ")

    def test_a_body_that_never_comes(self, address) -> None:
        head = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        found = self.say(address, head + b"Content-Length: 1000\r\n\r\nabc")
        assert "within 0.6 s" in self.problem(found, 408)

    def test_too_many_headers(self, address) -> None:
        head = b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 200 + b"\r\n"
        assert "headers" in self.problem(self.say(address, head), 431)

    def test_a_header_too_long(self, address) -> None:
        head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n"
        assert "headers" in self.problem(self.say(address, head), 431)

    def test_an_address_too_long(self, address) -> None:
        head = b"GET /" + b"y" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
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

    def test_an_answer_that_is_not_read(self, address, bundles: list[Path]) -> None:
        """Requests are sent and sent, answers never read: the service cuts the connection."""
        request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        size = len(httpx.get(f"http://{address[0]}:{address[1]}/openapi.json").content)
        with socket.create_connection(address, timeout=20) as plug:
            plug.sendall(request * 400)
            time.sleep(1.5)
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while chunk := plug.recv(1 << 20):
                    received += len(chunk)
        assert received < 400 * size
        assert httpx.get(f"http://{address[0]}:{address[1]}/healthz").status_code == 200

    def test_others_are_served_meanwhile(self, address) -> None:
        slow = [socket.create_connection(address) for _ in range(50)]
        try:
            for plug in slow:
                plug.sendall(b"GET /healthz HTTP/1.1\r\n")
            assert httpx.get(f"http://{address[0]}:{address[1]}/healthz").status_code == 200
        finally:
            for plug in slow:
                plug.close()


def test_formats_may_be_fewer(bundles: list[Path], png: bytes) -> None:
    with TestClient(create_app(bundles, Settings(threads=1, formats=("JPEG",)))) as client:
        wait_until_ready(client)
        answer = client.post("/v1/segment", content=png, headers=PNG)
        assert "(JPEG)" in refused(answer, 415)
    with pytest.raises(ValueError, match="formats are some of"):
        Settings(formats=("GIF",))


def test_bytes_in_hand_are_bounded(bundles: list[Path], png: bytes) -> None:
    settings = Settings(threads=1, max_bytes_in_hand=1000)
    app = create_app(bundles, settings)
    with TestClient(app) as client:
        wait_until_ready(client)
        answer = client.post("/v1/segment", content=png, headers=PNG)
        assert "bytes of requests" in refused(answer, 503)
        assert app.state.service.budget.used == 0


def test_connections_are_bounded(bundles: list[Path]) -> None:
    """The one too many is told so; health is answered all the same."""
    with running(bundles, settings=Settings(threads=1, max_connections=3)) as url:
        parts = urlsplit(url)
        held = [socket.create_connection((parts.hostname, parts.port)) for _ in range(3)]
        try:
            assert httpx.get(f"{url}/healthz").status_code == 200
            answer = httpx.get(f"{url}/v1/models")
            assert "3 connections" in refused(answer, 503)
            assert answer.headers["retry-after"] == "1"
        finally:
            for plug in held:
                plug.close()
        time.sleep(0.2)
        assert httpx.get(f"{url}/v1/models").status_code == 200
        assert 'status="503"} 1.0' in httpx.get(f"{url}/metrics").text
