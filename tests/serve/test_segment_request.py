"""What a request for a segmentation is answered with."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fdconv_deploy.runtime import Segmentation, open_session, read_image
from fdconv_deploy.serve.routes import segment as schemas
from tests.serve.conftest import encoded

PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def expected(bundles: list[Path], picture: np.ndarray) -> Segmentation:
    with open_session(bundles[0], threads=1) as session:
        return session.segment(picture)


def decode(mask: dict) -> np.ndarray:
    return np.repeat(mask["values"], mask["counts"]).reshape(mask["size"])


class TestJson:
    def test_raw_body(self, client: TestClient, png: bytes, expected) -> None:
        answer = client.post("/v1/segment", content=png, headers=PNG)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        found = answer.json()
        assert schemas.Segmentation.model_validate(found, strict=False)
        assert (found["height"], found["width"]) == (50, 70)
        assert found["model"] == "street"
        assert (found["fit"], found["mode"]) == ("stretched", "whole")
        assert np.array_equal(decode(found["mask"]), expected.labels)

    def test_areas(self, client: TestClient, png: bytes, expected) -> None:
        found = client.post("/v1/segment", content=png, headers=PNG).json()["classes"]
        assert [c["id"] for c in found] == [0, 1, 2, 3, 4]
        assert [c["name"] for c in found] == list(expected.classes)
        assert [tuple(c["color"]) for c in found] == list(expected.palette)
        assert [c["area"] for c in found] == expected.areas().tolist()
        assert sum(c["share"] for c in found) == pytest.approx(1)

    def test_timings(self, client: TestClient, png: bytes) -> None:
        answer = client.post("/v1/segment", content=png, headers=PNG)
        stages = {"decode", "queue", "preprocess", "inference", "postprocess"}
        assert set(answer.json()["timings_ms"]) == stages
        assert all(v >= 0 for v in answer.json()["timings_ms"].values())
        for stage in (*stages, "encode"):
            assert f"{stage};dur=" in answer.headers["server-timing"]

    def test_multipart_is_the_same(self, client: TestClient, png: bytes, expected) -> None:
        answer = client.post("/v1/segment", files={"image": ("a.png", png, "image/png")})
        assert np.array_equal(decode(answer.json()["mask"]), expected.labels)

    def test_octet_stream(self, client: TestClient, png: bytes) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        assert client.post("/v1/segment", content=png, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("accept", "query", "kind"),
    [
        (None, "", "application/json"),
        ("*/*", "", "application/json"),
        ("application/json", "", "application/json"),
        ("image/png", "", "image/png"),
        ("image/*", "", "image/png"),
        ("image/png, application/json;q=0.5", "", "image/png"),
        ("application/json;q=0.1, image/png;q=0.2", "", "image/png"),
        ("*/*", "?output=mask", "image/png"),
        ("*/*", "?output=overlay", "image/png"),
        ("image/jpeg", "?output=overlay", "image/jpeg"),
        ("image/jpeg;q=0.5, image/png;q=0.4", "?output=overlay", "image/jpeg"),
        ("*/*", "?output=json", "application/json"),
    ],
)
def test_answer_has_the_accepted_type(client, png, accept, query, kind) -> None:
    headers = PNG if accept is None else {**PNG, "Accept": accept}
    answer = client.post(f"/v1/segment{query}", content=png, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == kind
    assert answer.headers["vary"] == "Accept"


@pytest.mark.parametrize(
    ("accept", "query"),
    [
        ("text/html", ""),
        ("image/gif", ""),
        ("application/json", "?output=mask"),
        ("image/png", "?output=json"),
        ("image/png;q=0", ""),
        ("image/png;q=x", ""),
    ],
)
def test_answer_of_no_accepted_type_is_refused(client, png, accept, query) -> None:
    headers = {**PNG, "Accept": accept}
    answer = client.post(f"/v1/segment{query}", content=png, headers=headers)
    assert answer.status_code == 406
    assert "Accept header" in answer.json()["detail"]


def test_mask_png_holds_the_labels(client: TestClient, png: bytes, expected) -> None:
    answer = client.post("/v1/segment", content=png, headers={**PNG, "Accept": "image/png"})
    image = Image.open(io.BytesIO(answer.content))
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), expected.labels)
    assert np.array_equal(
        np.asarray(image.convert("RGB")), np.asarray(expected.palette)[expected.labels]
    )
    assert answer.headers["x-model"] == "street"
    assert answer.headers["x-fit"] == "stretched"
    assert answer.headers["x-mode"] == "whole"


def test_overlay_is_the_sessions(
    client: TestClient, picture: np.ndarray, png: bytes, expected
) -> None:
    for opacity in (0, 0.3, 1):
        url = f"/v1/segment?output=overlay&opacity={opacity}"
        answer = client.post(url, content=png, headers=PNG)
        assert np.array_equal(read_image(answer.content), expected.overlay(picture, opacity))


def test_options_reach_the_session(client: TestClient, bundles, picture, png: bytes) -> None:
    with open_session(bundles[0], threads=1) as session:
        padded = session.segment(picture, fit="pad")
    found = client.post("/v1/segment?fit=pad", content=png, headers=PNG).json()
    assert found["fit"] == "letterboxed"
    assert np.array_equal(decode(found["mask"]), padded.labels)


def test_model_is_chosen_by_name(client: TestClient, bundles, picture, png: bytes) -> None:
    with open_session(bundles[1], threads=1) as session:
        slid = session.segment(picture)
    found = client.post("/v1/models/sliding/segment", content=png, headers=PNG).json()
    assert (found["model"], found["mode"], found["fit"]) == ("sliding", "slide", "resized")
    assert np.array_equal(decode(found["mask"]), slid.labels)
    whole = client.post("/v1/models/sliding/segment?mode=whole", content=png, headers=PNG)
    assert whole.json()["mode"] == "whole"


def test_image_is_read_rotated_gray_and_cmyk(client: TestClient, picture: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture, "JPEG", exif=exif)
    found = client.post("/v1/segment", content=turned, headers={"Content-Type": "image/jpeg"})
    assert (found.json()["height"], found.json()["width"]) == (70, 50)
    for mode, kind in (("L", "PNG"), ("CMYK", "JPEG"), ("P", "PNG"), ("LA", "PNG")):
        buffer = io.BytesIO()
        Image.fromarray(picture).convert(mode).save(buffer, kind)
        headers = {"Content-Type": f"image/{kind.lower()}"}
        answer = client.post("/v1/segment", content=buffer.getvalue(), headers=headers)
        assert answer.status_code == 200, (mode, answer.text)
