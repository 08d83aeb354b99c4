"""Keys, TLS, and clients that take their time or send too much of something."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

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


def test_formats_may_be_fewer(bundles: list[Path], png: bytes) -> None:
    with TestClient(create_app(bundles, Settings(threads=1, formats=("JPEG",)))) as client:
        wait_until_ready(client)
        answer = client.post("/v1/segment", content=png, headers=PNG)
        assert "(JPEG)" in refused(answer, 415)
    with pytest.raises(ValueError, match="formats are some of"):
        Settings(formats=("GIF",))
