"""Who asks: one identity over HTTP and gRPC, from the peer, trusted proxies and keys."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from fdconv_deploy.runtime import open_session
from fdconv_deploy.serve import Settings, create_app, running
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.middleware import Clients
from tests.serve.conftest import wait_until_ready
from tests.serve.kserve.conftest import free_port

PNG = {"Content-Type": "image/png"}
PROXIES = ("10.0.0.0/8", "127.0.0.1", "fd00::/8")


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.5", (), "203.0.113.5"),
        ("203.0.113.5", ("198.51.100.1",), "203.0.113.5"),  # no proxy of ours
        ("10.1.2.3", (), "10.1.2.3"),
        ("10.1.2.3", ("198.51.100.1",), "198.51.100.1"),
        ("::ffff:10.1.2.3", ("198.51.100.1",), "198.51.100.1"),
        ("fd00::1", ("2001:DB8::0:1",), "2001:db8::1"),
        # What a client wrote itself stands before what proxies appended.
        ("10.1.2.3", ("1.1.1.1, 198.51.100.1",), "198.51.100.1"),
        ("10.1.2.3", ("1.1.1.1, 198.51.100.1, 10.9.9.9",), "198.51.100.1"),
        ("10.1.2.3", ("1.1.1.1", "198.51.100.1,10.9.9.9"), "198.51.100.1"),
        ("10.1.2.3", ("10.7.7.7, 10.9.9.9",), "10.7.7.7"),
        ("10.1.2.3", ("198.51.100.1:4711",), "198.51.100.1"),
        ("10.1.2.3", ("[2001:db8::1]:4711",), "2001:db8::1"),
        ("10.1.2.3", ("1.1.1.1, unknown",), "10.1.2.3"),
        ("10.1.2.3", ('evil"\nline',), "10.1.2.3"),
        ("10.1.2.3", ("",), "10.1.2.3"),
        ("10.1.2.3", ("1" * 20_000 + ", 198.51.100.1",), "198.51.100.1"),
        ("10.1.2.3", ("1" * 20_000,), "10.1.2.3"),
        ("10.1.2.3", ("198.51.100.1" + ", 10.9.9.9" * 3_000,), "10.9.9.9"),
        ("testclient", ("198.51.100.1",), "testclient"),
    ],
)
def test_the_last_address_that_a_trusted_proxy_vouches_for(
    peer: str, forwarded: tuple[str, ...], address: str
) -> None:
    clients = Clients(Settings(trusted_proxies=PROXIES))
    found = clients.identify(peer, [("x-forwarded-for", value) for value in forwarded])
    assert (found.address, found.name, found.key) == (address, address, "")


def test_nobody_is_trusted_by_default() -> None:
    found = Clients(Settings()).identify("127.0.0.1", [("x-forwarded-for", "1.1.1.1")])
    assert found.name == "127.0.0.1"


def test_a_key_stands_for_its_client_wherever_it_comes_from() -> None:
    clients = Clients(Settings(api_keys=("first", "second")))
    bearer, header = [("authorization", "Bearer first")], [("x-api-key", "first")]
    names = {clients.identify(peer, bearer).name for peer in ("10.0.0.1", "10.0.0.2")}
    assert len(names) == 1
    assert names == {clients.identify("::1", header).name}
    assert names != {clients.identify("::1", [("x-api-key", "second")]).name}
    wrong = clients.identify("10.0.0.1", [("x-api-key", "third"), ("x-api-key", "first")])
    assert (wrong.name, wrong.key) == ("10.0.0.1", "")
    with pytest.raises(RefusedError, match="API key"):
        clients.check(wrong)


@pytest.mark.parametrize("given", ["10.0.0.1/8", "proxy.example", ""])
def test_what_is_no_proxy(given: str) -> None:
    with pytest.raises(ValidationError, match="trusted_proxies"):
        Settings(trusted_proxies=(given,))


def test_http_and_grpc_log_and_count_the_same_client(bundles: list[Path], caplog) -> None:
    grpc = pytest.importorskip("tritonclient.grpc")
    port = free_port()
    settings = Settings(threads=1, grpc_port=port, api_keys=("k",), trusted_proxies=("127.0.0.1",))
    forwarded = {"x-forwarded-for": "198.51.100.7"}
    with (
        running(bundles, settings=settings) as address,
        caplog.at_level("INFO", "fdconv.access"),
        grpc.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        httpx.get(f"{address}/v2/models/street", headers=forwarded)
        with pytest.raises(grpc.InferenceServerException, match="API key"):
            client.get_model_metadata("street", headers=forwarded)
        known = {**forwarded, "x-api-key": "k"}
        httpx.get(f"{address}/v2/models/street", headers=known)
        client.get_model_metadata("street", headers=known)
        counted = httpx.get(f"{address}/metrics", headers={"x-api-key": "k"}).text
    names = [record.fields["client"] for record in caplog.records]
    assert names[:2] == ["198.51.100.7"] * 2
    assert names[2] == names[3]
    assert f'fdconv_key_requests_total{{key="{names[2]}"}} 2.0' in counted
    assert "198.51.100.7" not in counted


def test_http_and_grpc_share_one_clients_limit(bundles: list[Path], png: bytes) -> None:
    grpc = pytest.importorskip("tritonclient.grpc")
    port = free_port()
    settings = Settings(threads=1, grpc_port=port, client_limit=1, trusted_proxies=("127.0.0.1",))
    other = {"x-forwarded-for": "198.51.100.7"}
    with open_session(bundles[0], threads=1) as session:
        run, begun, go_on = session.run_batches, threading.Event(), threading.Event()

        def held(inputs):
            begun.set()
            go_on.wait(60)
            return run(inputs)

        session.run_batches = held  # type: ignore[method-assign]
        go_on.set()
        with (
            running([session], settings=settings) as address,
            grpc.InferenceServerClient(f"127.0.0.1:{port}") as client,
        ):
            begun.clear()
            go_on.clear()
            x = grpc.InferInput("images", (1, 3, 32, 48), "FP32")
            x.set_data_from_numpy(np.zeros((1, 3, 32, 48), np.float32))
            done = threading.Event()
            client.async_infer("street", [x], callback=lambda result, error: done.set())
            assert begun.wait(60)
            answer = httpx.post(f"{address}/v1/segment", content=png, headers=PNG)
            assert answer.status_code == 429
            with pytest.raises(grpc.InferenceServerException, match="one client may"):
                client.infer("street", [x])
            threading.Timer(0.2, go_on.set).start()
            answer = httpx.post(
                f"{address}/v1/segment", content=png, headers={**PNG, **other}, timeout=60
            )
            assert answer.status_code == 200
            assert done.wait(60)


def test_forwarded_addresses_are_ignored_from_others(bundles: list[Path], caplog) -> None:
    """uvicorn by itself would believe whoever connects from this machine."""
    with (
        running(bundles, settings=Settings(threads=1)) as address,
        caplog.at_level("INFO", "fdconv.access"),
    ):
        httpx.get(f"{address}/v1/models", headers={"X-Forwarded-For": "198.51.100.7"})
        httpx.get(f"{address}/v1/models")  # the first one's line comes after its answer
    assert caplog.records[0].fields["client"] == "127.0.0.1"


def test_what_is_no_http_is_logged_with_its_address(bundles: list[Path], caplog) -> None:
    with (
        running(bundles, settings=Settings(threads=1)) as address,
        caplog.at_level("INFO", "fdconv.access"),
    ):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as plug:
            plug.sendall(b"no HTTP\r\n\r\n")
            assert plug.recv(100).startswith(b"HTTP/1.1 400")
    fields = caplog.records[-1].fields
    assert (fields["client"], fields["status"]) == ("127.0.0.1", 400)


def test_settings_hold_networks_from_a_file() -> None:
    given = json.loads('{"trusted_proxies": ["10.0.0.0/8", "::1"], "cors_origins": ["*"]}')
    assert len(Settings(**given).trusted_proxies) == 2


def test_a_refused_request_is_logged_by_its_address(bundles: list[Path], caplog) -> None:
    with (
        caplog.at_level("INFO", "fdconv.access"),
        TestClient(create_app(bundles, Settings(threads=1, api_keys=("k",)))) as client,
    ):
        wait_until_ready(client)
        assert client.get("/v1/models", headers={"X-API-Key": "wrong"}).status_code == 401
    assert caplog.records[-1].fields["client"] == "testclient"
