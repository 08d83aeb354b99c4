"""A served bundle of several input sizes: images take the nearest, tensors the first."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from fdconv_deploy.runtime import open_session
from fdconv_deploy.serve import Settings, create_app
from tests.runtime import toy
from tests.serve.conftest import encoded, wait_until_ready
from tests.serve.test_segment_request import decode

PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32×48 and 48×32."""
    path = tmp_path_factory.mktemp("sizes") / "turned"
    return toy.make_bundle(path, other_sizes=((48, 32),)).path


@pytest.fixture(scope="module", params=["thread", "process"])
def client(bundle: Path, request: pytest.FixtureRequest) -> Iterator[TestClient]:
    settings = Settings(threads=1, isolation=request.param, backend="onnxruntime-cpu")
    with TestClient(create_app([bundle], settings), raise_server_exceptions=False) as opened:
        wait_until_ready(opened)
        yield opened


def test_images_of_both_proportions_at_a_time(client: TestClient, bundle: Path) -> None:
    random = np.random.default_rng(0)
    shapes = [(50, 75, 3), (75, 50, 3), (48, 32, 3), (32, 48, 3)] * 4
    images = [random.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]

    def ask(image: np.ndarray) -> np.ndarray:
        answer = client.post("/v1/segment", content=encoded(image, "PNG"), headers=PNG)
        assert answer.status_code == 200, answer.text
        assert answer.json()["fit"] == "resized"
        return decode(answer.json()["mask"])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, images))
    with open_session(bundle, threads=1) as session:
        for image, mask in zip(images, found, strict=True):
            assert np.array_equal(mask, session.segment(image).labels)


@pytest.mark.parametrize("size", [None, "original"])
def test_logits_are_of_the_images_own_input(client: TestClient, bundle: Path, size) -> None:
    image = np.random.default_rng(0).integers(0, 256, (75, 50, 3), dtype=np.uint8)
    answer = client.post(
        "/v1/segment",
        params={} if size is None else {"size": size},
        content=encoded(image, "PNG"),
        headers=PNG | {"Accept": "application/x-npz"},
    )
    assert answer.status_code == 200, answer.text
    found = np.load(io.BytesIO(answer.content))["logits"]
    with open_session(bundle, threads=1) as session:
        if size is None:
            prepared = session.segmentation.prepare(image)
            expected = session.run(prepared.inputs["images"][None])[0]
            np.testing.assert_allclose(found, expected, atol=1e-5)
        else:
            assert np.array_equal(found.argmax(axis=0), session.segment(image).labels)


def test_the_card_lists_them(client: TestClient) -> None:
    card = client.get("/v1/models/turned").json()
    assert (card["input"]["height"], card["input"]["width"]) == (32, 48)
    assert [(s["height"], s["width"]) for s in card["other_sizes"]] == [(48, 32)]


def test_tensors_are_of_the_first(client: TestClient) -> None:
    metadata = client.get("/v2/models/turned").json()
    assert metadata["inputs"][0]["shape"] == [-1, 3, 32, 48]
    for shape, status in (([1, 3, 32, 48], 200), ([1, 3, 48, 32], 400)):
        tensor = {"name": "images", "datatype": "FP32", "shape": shape, "data": [0.0] * 4608}
        answer = client.post("/v2/models/turned/infer", json={"inputs": [tensor]})
        assert answer.status_code == status, answer.text
    assert "further sizes (48x32) are for images" in answer.json()["error"]
