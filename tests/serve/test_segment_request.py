"""What a request for a segmentation may ask, and what it is answered with."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fdconv_deploy.runtime import Segmentation, open_session, read_image
from fdconv_deploy.serve import Settings, create_app
from fdconv_deploy.serve.routes import segment as schemas
from tests.serve.conftest import encoded, wait_until_ready
from tests.serve.test_refusals import refused
from tests.serve.test_responses import filled

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


def ask(client: TestClient, body: bytes, query: str, **headers: str):
    answer = client.post(f"/v1/segment?{query}", content=body, headers={**PNG, **headers})
    assert answer.status_code == 200, answer.text
    return answer


class TestMaskForms:
    def test_polygons(self, client: TestClient, png: bytes, expected) -> None:
        found = ask(client, png, "mask=polygons").json()
        assert schemas.Segmentation.model_validate(found)
        mask = found["mask"]
        assert mask["size"] == [50, 70]
        for entry in mask["polygons"]:
            inside = filled(entry["rings"], 50, 70)
            assert np.array_equal(inside, expected.labels == entry["id"])

    def test_none(self, client: TestClient, png: bytes, expected) -> None:
        found = ask(client, png, "mask=none").json()
        assert found["mask"] is None
        assert [c["area"] for c in found["classes"]] == expected.areas().tolist()


class TestClasses:
    @pytest.mark.parametrize(
        "query", ["classes=1,3", "classes=class 1&classes=3", "classes=class 3,class 1"]
    )
    def test_json(self, client: TestClient, png: bytes, expected, query: str) -> None:
        found = ask(client, png, query).json()
        assert [c["id"] for c in found["classes"]] == [1, 3]
        keeps = np.isin(expected.labels, [1, 3])
        assert np.array_equal(
            decode(found["mask"]), np.where(keeps, expected.labels.astype(int), -1)
        )

    def test_mask(self, client: TestClient, png: bytes, expected) -> None:
        image = Image.open(io.BytesIO(ask(client, png, "classes=2&output=mask").content))
        keeps = expected.labels == 2
        assert np.array_equal(np.asarray(image), np.where(keeps, 2, 255))
        assert np.array_equal(np.asarray(image.convert("RGBA"))[..., 3] > 0, keeps)

    def test_overlay(self, client: TestClient, picture, png: bytes, expected) -> None:
        found = read_image(ask(client, png, "classes=2&output=overlay&opacity=1").content)
        keeps = (expected.labels == 2)[..., None]
        assert np.array_equal(found, np.where(keeps, expected.overlay(picture, 1), picture))

    def test_polygons(self, client: TestClient, png: bytes) -> None:
        found = ask(client, png, "classes=2&mask=polygons").json()["mask"]["polygons"]
        assert [entry["id"] for entry in found] == [2]

    @pytest.mark.parametrize("name", ["cat", "5", "-1", "1.0", "999999999", "²", ""])
    def test_unknown(self, client: TestClient, png: bytes, name: str) -> None:
        answer = client.post(f"/v1/segment?classes={name}", content=png, headers=PNG)
        assert "no class" in refused(answer, 422)


class TestSize:
    def test_network(self, client: TestClient, png: bytes) -> None:
        found = ask(client, png, "size=network").json()
        assert (found["height"], found["width"]) == (32, 48)

    def test_network_padded_is_what_the_image_covers(self, client: TestClient, png: bytes) -> None:
        found = ask(client, png, "size=network&fit=pad").json()
        assert (found["height"], found["width"]) == (32, 45)

    def test_overlay(self, client: TestClient, png: bytes) -> None:
        answer = ask(client, png, "size=network&output=overlay")
        assert read_image(answer.content).shape == (32, 48, 3)

    def test_not_when_sliding(self, client: TestClient, png: bytes) -> None:
        for query in ("size=network", "output=logits"):
            answer = client.post(f"/v1/models/sliding/segment?{query}", content=png, headers=PNG)
            assert "crops" in refused(answer, 422)


class TestLogits:
    def test_as_the_network_gives_them(
        self, client: TestClient, bundles, picture, png: bytes
    ) -> None:
        answer = ask(client, png, "", Accept="application/x-npz")
        assert answer.headers["content-type"] == "application/x-npz"
        found = np.load(io.BytesIO(answer.content))
        with open_session(bundles[0], threads=1) as session:
            prepared = session.segmentation.prepare(picture)
            logits = session.run(prepared.inputs["images"][None])[0]
        assert np.array_equal(found["logits"], logits)
        assert found["classes"].tolist() == [f"class {n}" for n in range(5)]
        assert found["image_size"].tolist() == [50, 70]

    def test_at_the_images_size(self, client: TestClient, png: bytes, expected) -> None:
        answer = ask(client, png, "output=logits&size=original")
        found = np.load(io.BytesIO(answer.content))["logits"]
        assert found.shape == (5, 50, 70)
        assert np.array_equal(found.argmax(axis=0), expected.labels)

    def test_of_some_classes(self, client: TestClient, png: bytes) -> None:
        whole = np.load(io.BytesIO(ask(client, png, "output=logits").content))
        some = np.load(io.BytesIO(ask(client, png, "output=logits&classes=3,1").content))
        assert some["class_ids"].tolist() == [1, 3]
        assert np.array_equal(some["logits"], whole["logits"][[1, 3]])

    def test_more_than_is_answered(self, bundles, png: bytes) -> None:
        settings = Settings(threads=1, max_answer_bytes=10_000)
        with TestClient(create_app(bundles[:1], settings)) as client:
            wait_until_ready(client)
            url = "/v1/segment?output=logits&size=original"
            found = refused(client.post(url, content=png, headers=PNG), 413)
            assert "70,000 bytes" in found


class TestSeveralImages:
    @pytest.fixture
    def files(self) -> list:
        images = [
            np.random.default_rng(n).integers(0, 256, (20 + n, 30, 3), dtype=np.uint8)
            for n in range(3)
        ]
        return [("image", (f"s/{n}.png", encoded(i, "PNG"))) for n, i in enumerate(images)]

    def test_json(self, client: TestClient, files) -> None:
        found = client.post("/v1/segment", files=files)
        results = schemas.Segmentations.model_validate(found.json()).results
        assert [(r.file, r.height) for r in results] == [
            ("0.png", 20),
            ("1.png", 21),
            ("2.png", 22),
        ]
        alone = client.post("/v1/segment", files=files[2:]).json()
        assert alone["mask"] == found.json()["results"][2]["mask"]
        assert found.headers["x-fit"] == "resized, stretched"

    @pytest.mark.parametrize(
        ("output", "suffix"), [("mask", "png"), ("overlay", "png"), ("logits", "npz")]
    )
    def test_zip(self, client: TestClient, files, output: str, suffix: str) -> None:
        answer = client.post(f"/v1/segment?output={output}", files=files)
        assert answer.headers["content-type"] == "application/zip"
        archive = zipfile.ZipFile(io.BytesIO(answer.content))
        assert archive.namelist() == [f"{n:03d}-{n}.{suffix}" for n in range(3)]
        alone = client.post(f"/v1/segment?output={output}", files=files[1:2])
        if output != "logits":  # a zip in itself, with a date
            assert archive.read(archive.namelist()[1]) == alone.content

    def test_a_png_cannot_hold_them(self, client: TestClient, files) -> None:
        answer = client.post("/v1/segment", files=files, headers={"Accept": "image/png"})
        assert "application/zip" in refused(answer, 406)

    def test_one_in_a_zip(self, client: TestClient, files) -> None:
        answer = client.post("/v1/segment", files=files[:1], headers={"Accept": "application/zip"})
        assert zipfile.ZipFile(io.BytesIO(answer.content)).namelist() == ["000-0.png"]

    def test_a_bad_one_is_named(self, client: TestClient, files) -> None:
        files[1] = ("image", ("broken.png", files[1][1][1][:100]))
        found = refused(client.post("/v1/segment", files=files), 422)
        assert found.startswith("Image 2 (broken.png): ")

    def test_hostile_names(self, client: TestClient, files) -> None:
        files = [("image", (name, files[0][1][1])) for name in ("../../x.png", "a\\b.png", ".png")]
        answer = client.post("/v1/segment?output=mask", files=files)
        names = zipfile.ZipFile(io.BytesIO(answer.content)).namelist()
        assert names == ["000-x.png", "001-b.png", "002-.png.png"]


class TestCompressedBodies:
    @pytest.mark.parametrize(
        ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
    )
    def test_read(self, client: TestClient, png: bytes, expected, encoding: str, pack) -> None:
        found = ask(client, pack(png), "", **{"Content-Encoding": encoding}).json()
        assert np.array_equal(decode(found["mask"]), expected.labels)

    def test_a_bomb(self, client: TestClient) -> None:
        packed = gzip.compress(bytes(50_000_000))
        assert len(packed) < 100_000
        headers = {**PNG, "Content-Encoding": "gzip"}
        answer = client.post("/v1/segment", content=packed, headers=headers)
        assert "200,000 bytes" in refused(answer, 413)

    @pytest.mark.parametrize("body", [b"", b"not gzip", gzip.compress(b"x" * 500, mtime=0)[:-12]])
    def test_damaged(self, client: TestClient, body: bytes) -> None:
        headers = {**PNG, "Content-Encoding": "gzip"}
        refused(client.post("/v1/segment", content=body, headers=headers), 422)

    def test_unknown(self, client: TestClient, png: bytes) -> None:
        headers = {**PNG, "Content-Encoding": "br"}
        answer = client.post("/v1/segment", content=png, headers=headers)
        assert "'br'" in refused(answer, 415)


def test_a_parameter_that_does_not_exist(client: TestClient, png: bytes) -> None:
    answer = client.post("/v1/segment?clases=road", content=png, headers=PNG)
    assert refused(answer, 422) == ("There is no parameter 'clases'; /docs lists which there are.")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wrkers": 2}, "there is no setting wrkers; did you mean workers?"),
        ({"colour": 1}, "there is no setting colour; docs/serving.md lists those there are."),
        ({"api_keys": "k"}, "the setting api_keys cannot be what was given: it should be a list."),
        ({"api_keys": [""]}, "the setting api_keys.0 cannot be what was given"),
    ],
)
def test_a_setting_that_does_not_exist(
    bundles: list[Path], tmp_path: Path, settings: dict, said: str
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "fdconv_deploy", "serve", str(bundles[0])]
    ended = subprocess.run([*command, "--settings", str(file)], capture_output=True, text=True)
    assert ended.returncode == 1
    assert said in " ".join(ended.stderr.split())
