"""Pages of other origins, which browsers let in by the headers of CORS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from fdconv_deploy.serve import Settings, create_app
from tests.serve.conftest import wait_until_ready

ORIGIN, OTHER = "https://maps.example", "https://evil.example"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "x-api-key, content-type, inference-header-content-length",
}


@pytest.fixture(scope="module")
def shared(bundles: list[Path]) -> Iterator[TestClient]:
    settings = Settings(threads=1, cors_origins=(ORIGIN,), api_keys=("k",))
    with TestClient(create_app(bundles, settings)) as client:
        wait_until_ready(client)
        yield client


def test_preflight_needs_no_key_and_allows_what_requests_carry(shared: TestClient) -> None:
    answer = shared.options("/v1/segment", headers={"Origin": ORIGIN, **PREFLIGHT})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = answer.headers["access-control-allow-headers"].lower()
    assert all(name in allowed for name in PREFLIGHT["Access-Control-Request-Headers"].split(", "))
    assert "access-control-allow-credentials" not in answer.headers


def test_answers_and_refusals_can_be_read(shared: TestClient, png: bytes) -> None:
    headers = {"Origin": ORIGIN, "Content-Type": "image/png"}
    refused = shared.post("/v1/segment", content=png, headers=headers)
    answered = shared.post("/v1/segment", content=png, headers={**headers, "X-API-Key": "k"})
    assert (refused.status_code, answered.status_code) == (401, 200)
    for answer in (refused, answered):
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        assert "Origin" in answer.headers["vary"]


def test_other_origins_are_not_let_in(shared: TestClient) -> None:
    answer = shared.get("/healthz", headers={"Origin": OTHER})
    assert "access-control-allow-origin" not in answer.headers
    assert shared.options("/v1/segment", headers={"Origin": OTHER, **PREFLIGHT}).status_code == 400


def test_nobody_is_let_in_by_default(client: TestClient) -> None:
    answer = client.get("/healthz", headers={"Origin": ORIGIN})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_all_origins_may_be_let_in(bundles: list[Path]) -> None:
    with TestClient(create_app(bundles, Settings(threads=1, cors_origins=("*",)))) as client:
        answer = client.get("/healthz", headers={"Origin": OTHER})
        assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("given", ["maps.example", "https://maps.example/", "https://a b", "null"])
def test_what_is_no_origin(given: str) -> None:
    with pytest.raises(ValidationError, match="is no origin"):
        Settings(cors_origins=(given,))
