"""HEAD, as `curl -I` and `wget --spider` send it: GET's status and headers, and no body."""

from __future__ import annotations

import http.client
import re
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from fdconv_deploy.serve import Settings, create_app, running
from fdconv_deploy.serve.routes import kserve, segment, status
from tests.serve.conftest import wait_until_ready

# Every address that answers GET, of the model that is served.
PATHS = sorted(
    path.replace("{version}", "1").replace("/samples/{name}", "/samples/0.jpg")
    for group in (segment, kserve, status)
    for route in group.router.routes
    if isinstance(route, APIRoute) and "GET" in route.methods
    for path in [re.sub(r"(models|static)/{name}", r"\1/<\1>", route.path)]
)
NAMES = {"<models>": "street", "<static>": "page.js"}


def named(path: str) -> str:
    for name, value in NAMES.items():
        path = path.replace(name, value)
    return path


@pytest.mark.parametrize("path", [*map(named, PATHS), "/openapi.json"])
def test_head_has_gets_headers_and_no_body(client: TestClient, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    assert whole.status_code == head.status_code == 200
    assert head.content == b""
    varying = {"x-request-id", "content-length"} if path == "/metrics" else {"x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in varying} == {
        k: v for k, v in whole.headers.items() if k not in varying
    }


def test_head_of_what_is_not_there(client: TestClient) -> None:
    assert client.head("/v1/models/none").status_code == 404
    assert client.head("/nowhere").status_code == 404


def test_head_of_what_only_takes_post(client: TestClient) -> None:
    answer = client.head("/v1/segment")
    assert (answer.status_code, answer.headers["allow"], answer.content) == (405, "POST", b"")


def test_head_needs_the_key_as_get_does(bundles: list[Path]) -> None:
    app = create_app(bundles, Settings(threads=1, api_keys=("k",)))
    with TestClient(app) as client:
        wait_until_ready(client)
        assert client.head("/healthz").status_code == 200
        assert client.head("/v1/models").status_code == 401
        assert client.head("/v1/models", headers={"X-API-Key": "k"}).status_code == 200


def test_head_over_a_connection_that_is_kept(bundles: list[Path]) -> None:
    """A body sent all the same would be read as the next answer's head."""
    with running(bundles, settings=Settings(threads=1)) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        for path in ("/healthz", "/v1/models", "/", "/v2/health/ready"):
            connection.request("HEAD", path)
            head = connection.getresponse()
            assert (head.status, head.read()) == (200, b"")
            connection.request("GET", path)
            whole = connection.getresponse()
            assert len(whole.read()) == int(head.headers["content-length"])
        connection.close()
