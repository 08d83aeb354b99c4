"""The service behind a proxy that serves it under a prefix, which it takes off or leaves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from fdconv_deploy.serve import Settings, create_app
from tests.serve.conftest import wait_until_ready

PNG = {"Content-Type": "image/png"}


def stripping(app: ASGIApp, prefix: str) -> ASGIApp:
    """As nginx's ``location /seg/ { proxy_pass http://upstream/; }``; 404 beside the prefix."""

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if not scope["path"].startswith(f"{prefix}/"):
                await send({"type": "http.response.start", "status": 404, "headers": []})
                await send({"type": "http.response.body", "body": b"the proxy's"})
                return
            path = scope["path"][len(prefix) :]
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await app(scope, receive, send)

    return proxy


# Whether the service is told of the prefix, and what is in front of it.
WAYS = {
    "taken off, not told": ("", stripping),
    "taken off, told": ("/seg", stripping),
    "left, told": ("/seg", lambda app, prefix: app),
    "two parts, left": ("/team/seg/", lambda app, prefix: app),
    "mounted": ("", lambda app, prefix: Starlette(routes=[Mount(prefix, app=app)])),
    "ASGI's root_path": ("", lambda app, prefix: app),
}


@pytest.fixture(scope="module", params=WAYS, ids=[w.replace(" ", "-") for w in WAYS])
def proxied(request, bundles: list[Path]) -> Iterator[tuple[TestClient, str, bool]]:
    """A client of the proxy, the prefix, and whether the service knows it."""
    told, front = WAYS[request.param]
    prefix = told.rstrip("/") or "/seg"
    app = create_app(bundles, Settings(threads=1, root_path=told))
    root = prefix if request.param == "ASGI's root_path" else ""
    with TestClient(app) as inner:
        wait_until_ready(inner)
        outer = TestClient(front(app, prefix), root_path=root, raise_server_exceptions=False)
        outer.portal = inner.portal  # the event loop that the application was started on
        yield outer, prefix, request.param != "taken off, not told"


def test_every_address_on_the_pages_is_under_the_prefix(proxied) -> None:
    client, prefix, _ = proxied
    for page in (f"{prefix}/", f"{prefix}/docs"):
        answer = client.get(page)
        assert answer.status_code == 200
        found = re.findall(r'(?:src|href)="([^"#]+)"', answer.text)
        assert len(found) >= 5
        for address in found:
            assert client.get(urljoin(page, address)).status_code == 200, address


def test_every_address_in_the_scripts_is_under_the_prefix(proxied) -> None:
    client, prefix, _ = proxied
    asked = set()
    for name in ("page.js", "docs.js"):
        text = client.get(f"{prefix}/static/{name}").text
        asked |= set(re.findall(r'fetch\("([^"]+)"', text))
        # Those that are put together.
        assert not re.findall(r"[\"'`]/(?:v1|v2|samples|static|openapi)", text)
    assert asked == {"v1/models", "samples", "openapi.json"}
    for address in asked:
        assert client.get(urljoin(f"{prefix}/", address)).status_code == 200


def test_the_api_answers_under_the_prefix(proxied, png: bytes, picture: np.ndarray) -> None:
    client, prefix, _ = proxied
    found = client.post(f"{prefix}/v1/segment", content=png, headers=PNG)
    assert found.json()["height"] == picture.shape[0]
    tensor = {"name": "images", "datatype": "FP32", "shape": [1, 3, 32, 48]}
    call = {"inputs": [{**tensor, "data": [0.0] * 4608}]}
    answer = client.post(f"{prefix}/v2/models/street/infer", json=call)
    assert answer.json()["model_name"] == "street"
    metrics = client.get(f"{prefix}/metrics").text
    assert 'route="/v2/models/{name}/infer",status="200"' in metrics


def test_errors_are_what_kserves_clients_read(proxied) -> None:
    client, prefix, _ = proxied
    answer = client.get(f"{prefix}/v2/models/other")
    assert answer.status_code == 404
    assert answer.json()["error"] == answer.json()["detail"]
    assert "error" not in client.get(f"{prefix}/v1/models/other").json()


def test_the_openapi_document_names_the_prefix_where_it_is_known(proxied) -> None:
    client, prefix, known = proxied
    document = client.get(f"{prefix}/openapi.json").json()
    assert document.get("servers") == ([{"url": prefix}] if known else None)
    assert "/v1/segment" in document["paths"]


def test_addresses_beside_the_prefix_are_not_taken_for_it(bundles: list[Path]) -> None:
    with TestClient(create_app(bundles, Settings(threads=1, root_path="/seg"))) as client:
        assert client.get("/segments/v1/models").status_code == 404
        assert client.get("/seg/seg/healthz").status_code == 404
        assert client.get("/healthz").status_code == 200  # a probe that does not pass the proxy


def test_the_prefix_alone_leads_to_the_page(bundles: list[Path]) -> None:
    with TestClient(create_app(bundles, Settings(threads=1, root_path="/seg"))) as client:
        answer = client.get("/seg", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (307, "/seg/")


def test_the_key_is_asked_for_under_the_prefix(bundles: list[Path]) -> None:
    settings = Settings(threads=1, root_path="/seg", api_keys=("k",))
    with TestClient(create_app(bundles, settings)) as client:
        for path in ("/seg/healthz", "/seg/", "/seg/static/page.js", "/seg/openapi.json"):
            assert client.get(path).status_code == 200
        for path in ("/seg/v1/models", "/seg/metrics"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"X-API-Key": "k"}).status_code != 401


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("seg", "a path such as /segmentation"),
        ("/a b", "a path such as /segmentation"),
        ("//", None),
        ("/se%67", "a path such as /segmentation"),
        ("http://host/seg", "a path such as /segmentation"),
        ("/v1", "own addresses begin with v1"),
        ("/v2/seg", "own addresses begin with v1"),
    ],
)
def test_what_is_no_prefix(given: str, says: str | None) -> None:
    if says is None:
        assert Settings(root_path=given).root_path == ""
    else:
        with pytest.raises(ValidationError, match=says):
            Settings(root_path=given)
