"""What a request for a detector's objects is answered with."""

from __future__ import annotations

import io
import json
import re
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from fdconv_deploy.client import Client, ServiceError
from fdconv_deploy.runtime import Detection, open_session
from fdconv_deploy.serve import Settings, create_app, running
from fdconv_deploy.serve.routes import segment as schemas
from tests.runtime import toy, toy_detector
from tests.serve.conftest import wait_until_ready
from tests.serve.test_refusals import refused

PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def expected(detectors: list[Path], picture: np.ndarray) -> Detection:
    with open_session(detectors[0], threads=1) as session:
        return session.detect(picture)


def ask(client: TestClient, png: bytes, query: str = "", **headers: str):
    answer = client.post(f"/v1/segment{query}", content=png, headers={**PNG, **headers})
    assert answer.status_code == 200, answer.text
    return answer


class TestJson:
    def test_objects(self, detecting: TestClient, png: bytes, expected: Detection) -> None:
        answer = ask(detecting, png)
        found = answer.json()
        schemas.Detection.model_validate(found, strict=False)
        shown = expected.kept(0.3)
        assert 0 < len(shown) <= len(expected)
        assert (found["model"], found["height"], found["width"]) == ("things", 50, 70)
        assert (found["fit"], found["resized_to"]) == (expected.fit, list(expected.resized_to))
        assert answer.headers["x-fit"] == expected.fit
        assert [o["id"] for o in found["instances"]] == list(range(1, len(shown) + 1))
        assert [o["class"] for o in found["instances"]] == [shown.classes[n] for n in shown.labels]
        assert np.allclose([o["score"] for o in found["instances"]], shown.scores, atol=1e-5)
        assert np.allclose([o["box"] for o in found["instances"]], shown.boxes, atol=1e-2)
        masks = shown.masks
        assert masks is not None
        for entry, mask in zip(found["instances"], masks, strict=True):
            assert np.array_equal(coco.decode(entry["mask"]).astype(bool), mask)
            assert entry["area"] == int(mask.sum())
        counts = np.bincount(shown.labels, minlength=3).tolist()
        assert [c["count"] for c in found["classes"]] == counts

    def test_min_score(self, detecting: TestClient, png: bytes, expected: Detection) -> None:
        assert len(ask(detecting, png, "?min_score=0").json()["instances"]) == len(expected)
        some = ask(detecting, png, "?min_score=0.7").json()["instances"]
        assert len(some) == int((expected.scores >= 0.7).sum())
        assert ask(detecting, png, "?min_score=1").json()["instances"] == []

    def test_classes(self, detecting: TestClient, png: bytes, expected: Detection) -> None:
        name = expected.classes[int(expected.labels[0])]
        found = ask(detecting, png, f"?classes={name}").json()
        assert {o["class"] for o in found["instances"]} == {name}
        assert [c["name"] for c in found["classes"]] == [name]

    def test_without_masks(self, detecting: TestClient, png: bytes) -> None:
        for entry in ask(detecting, png, "?mask=none").json()["instances"]:
            assert entry["mask"] is entry["area"] is None

    def test_polygons(self, detecting: TestClient, png: bytes, expected: Detection) -> None:
        masks = expected.masks
        assert masks is not None
        found = ask(detecting, png, "?mask=polygons&min_score=0").json()
        schemas.Detection.model_validate(found, strict=False)
        for entry, mask in zip(found["instances"], masks, strict=True):
            (ring,) = entry["mask"]["rings"]
            # Drawn in units of half pixels, so that pixels' centres are points of the grid.
            canvas = Image.new("1", (2 * 70 + 1, 2 * 50 + 1))
            ImageDraw.Draw(canvas).polygon([2 * v for v in ring], fill=1)
            assert np.array_equal(np.asarray(canvas)[1::2, 1::2], mask)
            assert entry["area"] == int(mask.sum())

    def test_boxes_alone(self, detecting: TestClient, png: bytes) -> None:
        for query in ("", "?mask=polygons"):
            answer = detecting.post(f"/v1/models/boxes/segment{query}", content=png, headers=PNG)
            found = answer.json()
            schemas.Detection.model_validate(found, strict=False)
            assert found["instances"]
            assert all(o["mask"] is o["area"] is None for o in found["instances"])

    def test_timings(self, detecting: TestClient, png: bytes) -> None:
        answer = ask(detecting, png)
        stages = {"decode", "queue", "preprocess", "inference", "postprocess"}
        assert set(answer.json()["timings_ms"]) == stages
        for stage in (*stages, "encode"):
            assert f"{stage};dur=" in answer.headers["server-timing"]


class TestPictures:
    def test_mask(self, detecting: TestClient, png: bytes, expected: Detection) -> None:
        answer = ask(detecting, png, Accept="image/png")
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(answer.content))), expected.kept(0.3).instance_map()
        )

    def test_overlay(self, detecting, png: bytes, picture, expected: Detection) -> None:
        answer = ask(detecting, png, "?output=overlay&opacity=0.3&min_score=0")
        drawn = np.asarray(Image.open(io.BytesIO(answer.content)))
        assert np.array_equal(drawn, expected.overlay(picture, 0.3))
        jpeg = ask(detecting, png, "?output=overlay", Accept="image/jpeg")
        assert Image.open(io.BytesIO(jpeg.content)).format == "JPEG"

    def test_several(self, detecting: TestClient, png: bytes) -> None:
        files = [("image", (f"{n}.png", png, "image/png")) for n in range(5)]
        found = detecting.post("/v1/segment", files=files).json()
        schemas.Detections.model_validate(found, strict=False)
        first = found["results"][0]["instances"]
        assert len(found["results"]) == 5
        assert all(result["instances"] == first for result in found["results"])
        zipped = detecting.post("/v1/segment?output=mask", files=files, headers={
            "Accept": "application/zip"})  # fmt: skip
        assert len(zipfile.ZipFile(io.BytesIO(zipped.content)).namelist()) == 5


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "query", "accept", "status", "says"),
        [
            ("things", "?output=logits", "*/*", 406, "no logits"),
            ("things", "", "application/x-npz", 406, "no logits"),
            ("boxes", "?output=mask", "*/*", 406, "boxes and no masks"),
            ("boxes", "", "image/png", 406, "boxes and no masks"),
            ("things", "?size=network", "*/*", 422, "pixels of the image"),
            ("things", "?fit=stretch", "*/*", 422, "aspect ratio"),
            ("things", "?mode=slide", "*/*", 422, "slide"),
            ("things", "?min_score=1.5", "*/*", 422, "min_score"),
            ("things", "?min_score=nan", "*/*", 422, "min_score"),
            ("things", "?classes=lamp", "*/*", 422, "no class"),
        ],
    )
    def test_what_it_cannot(self, detecting, png, model, query, accept, status, says) -> None:
        answer = detecting.post(
            f"/v1/models/{model}/segment{query}", content=png, headers={**PNG, "Accept": accept}
        )
        assert says in refused(answer, status)

    def test_a_segmentor_has_no_scores(self, client: TestClient, png: bytes) -> None:
        answer = client.post("/v1/segment?min_score=0.5", content=png, headers=PNG)
        assert "no min_score" in refused(answer, 422)


def test_card(detecting: TestClient) -> None:
    things, boxes = detecting.get("/v1/models").json()["models"]
    assert things["kind"] == boxes["kind"] == "detector"
    assert things["output"] is None
    assert things["instances"] == {
        "masks": True, "mask_size": 28, "most": 7, "lowest_score": 0.05, "min_score": 0.3
    }  # fmt: skip
    assert not boxes["instances"]["masks"]
    assert [c["name"] for c in things["classes"]] == ["person", "car", "sign"]
    assert (things["mode"], things["modes"], things["fit"]) == ("whole", ["whole"], "pad")
    assert [b["batch"] for b in things["benchmark"]] == [1, 4]


def test_beside_a_segmentor(detectors: list[Path], bundles: list[Path], png: bytes) -> None:
    with TestClient(create_app([detectors[0], bundles[0]], Settings(threads=1))) as client:
        wait_until_ready(client)
        kinds = [model["kind"] for model in client.get("/v1/models").json()["models"]]
        assert kinds == ["detector", "segmentor"]
        for name, key in (("things", "instances"), ("street", "mask")):
            answer = client.post(f"/v1/models/{name}/segment", content=png, headers=PNG)
            assert key in answer.json()


def test_in_worker_processes(detectors: list[Path], detecting: TestClient, png: bytes) -> None:
    settings = Settings(threads=1, isolation="process", backend="onnxruntime-cpu")
    with TestClient(create_app(detectors, settings)) as isolated:
        wait_until_ready(isolated)
        for name in ("things", "boxes"):
            url = f"/v1/models/{name}/segment"
            here, there = (
                client.post(url, content=png, headers=PNG).json()
                for client in (detecting, isolated)
            )
            assert there["instances"] == here["instances"] != []


def test_many_at_once_are_batched_and_not_mixed_up(detectors: list[Path]) -> None:
    rng = np.random.default_rng(8)
    pictures = [
        rng.integers(0, 60 + 12 * n, (30 + n, 80 - n, 3), dtype=np.uint8) for n in range(16)
    ]
    with open_session(detectors[0], threads=1) as session:
        alone = [session.detect(picture) for picture in pictures]

    def asked(url: str, picture: np.ndarray):
        with Client(url) as client:
            return client.detect(picture, min_score=0)

    settings = Settings(threads=1, batch_delay_ms=20, queue_limit=32)
    with running(detectors, settings=settings) as url, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(asked, [url] * 16, pictures))
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
    for answer, expected in zip(answers, alone, strict=True):
        assert np.allclose(answer.boxes, expected.boxes, atol=1e-2)
        assert np.allclose(answer.scores, expected.scores, atol=1e-5)
        assert np.array_equal(answer.masks, expected.masks)
    runs = re.search(r'fdconv_batch_size_count\{model="things"\} (\S+)', metrics)
    assert runs is not None
    assert float(runs[1]) < 16


def test_a_module_is_not_served(tmp_path: Path) -> None:
    bundle = toy.make_module_bundle(tmp_path / "m")
    with pytest.raises(Exception, match="segmentor's or a detector's bundle"):
        create_app([bundle.path])


def test_documented(detecting: TestClient) -> None:
    schemas_ = detecting.get("/openapi.json").json()["components"]["schemas"]
    assert {"Detection", "Detections", "Instance", "CocoMask"} <= set(schemas_)
    assert "class" in schemas_["Instance"]["properties"]
    assert json.dumps(schemas_)


@pytest.fixture(scope="module")
def python(detectors: list[Path], bundles: list[Path]) -> Iterator[Client]:
    settings = Settings(threads=1)
    with running([*detectors, bundles[0]], settings=settings) as url, Client(url) as opened:
        yield opened


class TestPythonClient:
    def test_detect(self, python: Client, picture, expected: Detection) -> None:
        found = python.detect(picture, min_score=0)
        assert len(found) == len(expected)
        assert np.allclose(found.boxes, expected.boxes, atol=1e-2)
        assert np.allclose(found.scores, expected.scores, atol=1e-5)
        assert np.array_equal(found.labels, expected.labels)
        assert found.names == tuple(expected.classes[label] for label in expected.labels)
        assert np.array_equal(found.masks, expected.masks)
        assert (found.fit, found.model) == (expected.fit, "things")
        assert python.detect(picture, min_score=1).boxes.shape == (0, 4)
        assert python.detect(picture, masks=False).masks is None
        assert python.detect(picture, "boxes").masks is None
        assert set(python.detect(picture, classes=["car"]).names) <= {"car"}

    def test_the_other_kind(self, python: Client, picture) -> None:
        with pytest.raises(ServiceError, match=r"is a detector: use detect\(\)"):
            python.segment(picture)
        with pytest.raises(ServiceError, match=r"is a segmentor: use segment\(\)"):
            python.detect(picture, "street")

    def test_infer(self, python: Client) -> None:
        images = np.random.default_rng(0).normal(size=(2, 3, 64, 96)).astype(np.float32)
        sizes = np.array([[64, 90], [32, 96]])
        told = toy_detector.reference(images, sizes.astype(np.float32))
        for name in ("boxes", "labels", "count", "masks"):
            found = python.infer("things", images, name, sizes=sizes)
            assert np.allclose(found, told[name], atol=1e-4)
