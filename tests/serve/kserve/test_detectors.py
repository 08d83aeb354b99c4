"""A detector's tensors through the protocol."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from fdconv_deploy.runtime import open_session
from fdconv_deploy.serve import Settings, running
from fdconv_deploy.serve.kserve import metadata, tensors
from tests.runtime import toy_detector
from tests.serve.kserve.conftest import free_port
from tests.serve.test_refusals import refused

URL = "/v2/models/things/infer"
SIZES = np.array([[64, 90], [50, 96]], np.float32)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(2, 3, 64, 96)).astype(np.float32)


def tensor(name: str, array: np.ndarray, kind: str = "FP32") -> dict:
    return {
        "name": name, "shape": list(array.shape), "datatype": kind,
        "data": array.reshape(-1).tolist(),
    }  # fmt: skip


def arrays(answer: dict) -> dict[str, np.ndarray]:
    return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in answer["outputs"]}


def test_detector_metadata_has_sizes_and_objects(detecting: TestClient) -> None:
    found = detecting.get("/v2/models/things").json()
    metadata.ModelMetadata.model_validate(found)
    assert [(t["name"], t["shape"]) for t in found["inputs"]] == [
        ("images", [-1, 3, 64, 96]),
        ("sizes", [-1, 2]),
    ]
    assert [(t["name"], t["datatype"], t["shape"]) for t in found["outputs"]] == [
        ("boxes", "FP32", [-1, 7, 4]),
        ("scores", "FP32", [-1, 7]),
        ("labels", "INT64", [-1, 7]),
        ("count", "INT64", [-1]),
        ("masks", "FP32", [-1, 7, 28, 28]),
    ]
    assert len(detecting.get("/v2/models/boxes").json()["outputs"]) == 4


def test_detector_infers_json(detecting: TestClient, images: np.ndarray) -> None:
    call = {"inputs": [tensor("images", images), tensor("sizes", SIZES)]}
    answer = detecting.post(URL, json=call)
    assert answer.status_code == 200, answer.text
    tensors.InferAnswer.model_validate(answer.json())
    expected = toy_detector.reference(images, SIZES)
    found = arrays(answer.json())
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert np.allclose(found[name], value, atol=1e-4), name


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_detector_infers_binary(
    detecting: TestClient, images: np.ndarray, order: tuple[int, int]
) -> None:
    parts = [("images", images), ("sizes", SIZES)]
    told, tail = [], b""
    for name, array in (parts[place] for place in order):
        told.append(
            {
                "name": name, "shape": list(array.shape), "datatype": "FP32",
                "parameters": {"binary_data_size": array.nbytes},
            }
        )  # fmt: skip
        tail += array.tobytes()
    outputs = [{"name": "labels", "parameters": {"binary_data": True}}, {"name": "count"}]
    head = json.dumps({"inputs": told, "outputs": outputs}).encode()
    name = "Inference-Header-Content-Length"
    answer = detecting.post(URL, content=head + tail, headers={name: str(len(head))})
    assert answer.status_code == 200, answer.text
    length = int(answer.headers[name])
    labels = np.frombuffer(answer.content[length:], np.int64).reshape(2, 7)
    expected = toy_detector.reference(images, SIZES)
    assert np.array_equal(labels, expected["labels"])
    assert json.loads(answer.content[:length])["outputs"][1]["data"] == expected["count"].tolist()


def test_detector_without_sizes_takes_the_whole_input(detecting, images: np.ndarray) -> None:
    alone = detecting.post(URL, json={"inputs": [tensor("images", images)]}).json()
    full = np.array([[64, 96]] * 2, np.float32)
    assert np.allclose(arrays(alone)["boxes"], toy_detector.reference(images, full)["boxes"])


def test_detector_pads_pixels_with_zeros(detecting, detectors: list[Path]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    call = {"inputs": [tensor("images", image[None], "UINT8"), tensor("sizes", SIZES[:1])]}
    found = arrays(detecting.post(URL, json=call).json())
    with open_session(detectors[0], threads=1) as session:
        prepared = session.detection.prepare(np.ascontiguousarray(image[:64, :90]))
        inputs = {name: value[None] for name, value in prepared.inputs.items()}
        expected = session.run_batches(inputs)
    assert prepared.covered[1] == 90
    assert np.allclose(found["scores"], expected["scores"], atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "'images' and 'sizes'"),
        (["images", "sizes", "sizes"], "'images' and 'sizes'"),
        (["sizes"], "must have the input 'images'"),
        (["images", "images"], "twice"),
        (["images", "lamps"], "'images' or 'sizes'"),
    ],
)
def test_detector_refuses_wrong_inputs(
    detecting, images: np.ndarray, inputs: list[str], says: str
) -> None:
    made = {"images": tensor("images", images), "sizes": tensor("sizes", SIZES)}
    call = {"inputs": [made.get(n, {**made["sizes"], "name": n}) for n in inputs]}
    assert says in refused(detecting.post(URL, json=call), 400)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (SIZES[:1], "2 images came with 1 sizes"),
        (SIZES * 2, "heights from 1 to 64"),
        (SIZES * 0, "heights from 1 to 64"),
        (SIZES + 0.5, "whole numbers"),
        (SIZES.reshape(4, 1), "shape [N, 2]"),
    ],
)
def test_detector_refuses_wrong_sizes(
    detecting, images: np.ndarray, sizes: np.ndarray, says: str
) -> None:
    call = {"inputs": [tensor("images", images), tensor("sizes", sizes)]}
    assert says in refused(detecting.post(URL, json=call), 400)


def test_detector_refuses_unknown_outputs(detecting, images: np.ndarray) -> None:
    call = {"inputs": [tensor("images", images)], "outputs": [{"name": "logits"}]}
    assert "boxes, scores, labels, count, masks" in refused(detecting.post(URL, json=call), 400)


def test_segmentor_refuses_sizes(client: TestClient) -> None:
    call = {"inputs": [tensor("sizes", SIZES)]}
    answer = client.post("/v2/models/street/infer", json=call)
    assert "called 'images'" in refused(answer, 400)


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_detector_answers_tritonclient(detectors: list[Path], images: np.ndarray, way: str) -> None:
    triton = pytest.importorskip(f"tritonclient.{way}", reason="tritonclient is not installed")
    port = free_port()
    with running(detectors, settings=Settings(threads=1, grpc_port=port)) as url:
        place = url.removeprefix("http://") if way == "http" else f"127.0.0.1:{port}"
        client = triton.InferenceServerClient(place)
        given = []
        for name, array in (("images", images), ("sizes", SIZES)):
            given.append(triton.InferInput(name, list(array.shape), "FP32"))
            given[-1].set_data_from_numpy(array)
        answer = client.infer("things", given)
        for name, value in toy_detector.reference(images, SIZES).items():
            assert np.allclose(answer.as_numpy(name), value, atol=1e-4), name
        client.close()


def test_detector_config_says_which_inputs_may_be_left_out(detecting) -> None:
    """perf_analyzer then takes --input-data without them; else it makes up values."""
    images, sizes = detecting.get("/v2/models/things/config").json()["input"]
    assert "optional" not in images
    assert sizes["name"] == "sizes"
    assert sizes["optional"] is True
