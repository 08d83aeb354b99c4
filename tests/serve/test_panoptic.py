"""A panoptic network's segments and instances over HTTP."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fdconv_deploy.runtime import open_session
from fdconv_deploy.runtime.panoptic import PanopticSegmentation
from fdconv_deploy.serve import Settings, create_app
from fdconv_deploy.serve.routes.segment import Segmentation
from tests.runtime import toy_panoptic
from tests.serve.conftest import wait_until_ready

IMAGE = np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return toy_panoptic.make_bundle(tmp_path_factory.mktemp("served") / "rooms").path


@pytest.fixture(scope="module")
def expected(bundle) -> PanopticSegmentation:
    with open_session(bundle) as session:
        found = session.segment(IMAGE)
    assert isinstance(found, PanopticSegmentation)
    assert {segment.is_thing for segment in found.segments} == {True, False}
    return found


@pytest.fixture(scope="module")
def client(bundle) -> Iterator[TestClient]:
    app = create_app([bundle], Settings(threads=1))
    with TestClient(app, raise_server_exceptions=False) as opened:
        wait_until_ready(opened)
        yield opened


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, "PNG")
    return buffer.getvalue()


def ask(client: TestClient, **options: str):
    files = {"image": ("a.png", png(), "image/png")}
    return client.post("/v1/segment", files=files, params=options)


def test_json_holds_segments_and_instances(client, expected):
    answer = ask(client, min_score="0").json()
    Segmentation.model_validate(answer)
    assert answer["segments"] == expected.segments_info()
    mask = answer["segments_mask"]
    ids = np.repeat(mask["values"], mask["counts"]).reshape(mask["size"])
    assert np.array_equal(ids, expected.ids)
    scores = [one["score"] for one in answer["instances"]]
    np.testing.assert_allclose(scores, expected.instances.scores, atol=1e-6)
    assert answer["classes"][-1]["name"] == "void"
    areas = [entry["area"] for entry in answer["classes"]]
    assert areas == expected.areas().tolist()


def test_instances_that_score_too_little_are_left_out(client):
    answer = ask(client, min_score="0.5", mask="none").json()
    assert answer["instances"]
    assert all(one["score"] >= 0.5 and one["mask"] is None for one in answer["instances"])
    assert answer["segments_mask"] is None


def test_mask_png_holds_classes(client, expected):
    answer = ask(client, output="mask")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), expected.labels)


def test_logits_are_refused(client):
    answer = ask(client, output="logits")
    assert answer.status_code == 406
    assert "no logits of pixels" in answer.text


def test_open_inference_gives_queries(client):
    card = client.get("/v2/models/rooms").json()
    assert [output["name"] for output in card["outputs"]] == ["classes", "masks", "labels"]
    body = {
        "inputs": [
            {
                "name": "images",
                "datatype": "UINT8",
                "shape": [1, 32, 48, 3],
                "data": IMAGE[:32, :48].ravel().tolist(),
            }
        ]
    }
    found = client.post("/v2/models/rooms/infer", json=body).json()["outputs"]
    assert [(one["name"], one["shape"]) for one in found] == [
        ("classes", [1, toy_panoptic.QUERIES, toy_panoptic.CLASSES + 1]),
        ("masks", [1, toy_panoptic.QUERIES, 8, 12]),
        ("labels", [1, 32, 48]),
    ]
