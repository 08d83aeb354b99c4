"""A service of models of other bands than red, green and blue, and of heads with one output."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fdconv_deploy.config import Preprocessing, TestMode
from fdconv_deploy.runtime import open_session
from fdconv_deploy.serve import Settings, create_app
from tests.runtime import toy
from tests.serve.conftest import encoded, wait_until_ready

FILES = Path(__file__).resolve().parents[1] / "real_packages" / "geotiff" / "files"
FOUR = Preprocessing(
    mean=(900.0, 800.0, 700.0, 600.0), std=(300.0,) * 4, loading="bands", to_float32=True
)
GRAY = Preprocessing(mean=(110.0,), std=(60.0,), loading="grayscale")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bands")
    slide = TestMode(mode="whole", crop_size=(32, 48), stride=(20, 30))
    architectures = {
        "four": toy.architecture(2, preprocessing=FOUR, threshold=0.4, test=slide),
        "gray": toy.architecture(1, preprocessing=GRAY, threshold=0.3),
        "twelve": toy.architecture(
            preprocessing=Preprocessing(mean=(0.0,) * 12, std=(1.0,) * 12, loading="bands")
        ),
    }
    return {
        name: toy.make_bundle(folder / name, arch=arch).path for name, arch in architectures.items()
    }


@pytest.fixture(scope="module")
def service(models: dict[str, Path]) -> Iterator[TestClient]:
    app = create_app(list(models.values()), Settings(threads=1, max_pixels=40_000))
    with TestClient(app, raise_server_exceptions=False) as opened:
        wait_until_ready(opened)
        yield opened


def bands(count: int, kind: str = "uint16", seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.random((50, 70, count)) * 2000).astype(kind)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def labels_of(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    mask = answer.json()["mask"]
    return np.repeat(mask["values"], mask["counts"]).reshape(mask["size"])


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_npy_of_four_bands_is_labelled(
    kind: str, mode: str, service: TestClient, models: dict[str, Path]
) -> None:
    image = bands(4, kind)
    path = f"/v1/models/four/segment?mode={mode}"
    plain = service.post(path, content=npy(image), headers={"Content-Type": "application/x-npy"})
    form = service.post(path, files={"image": ("x.npy", npy(image), "application/octet-stream")})
    with open_session(models["four"], threads=1) as session:
        expected = session.segment(image, mode=mode).labels  # type: ignore[arg-type]
    assert np.array_equal(labels_of(plain), expected)
    assert np.array_equal(labels_of(form), expected)
    assert [entry["id"] for entry in plain.json()["classes"]] == [0, 1]
    assert sum(entry["area"] for entry in plain.json()["classes"]) == expected.size


@pytest.mark.parametrize(
    ("model", "name"),
    [("four", "gdal-lzw-4-uint16.tif"), ("twelve", "gdal-band-12-float32.tif")],
)
def test_tiff_of_bands_is_labelled(
    model: str, name: str, service: TestClient, models: dict[str, Path]
) -> None:
    pytest.importorskip("imagecodecs", reason="TIFF files of bands need tifffile and imagecodecs")
    data = (FILES / name).read_bytes()
    found = service.post(f"/v1/models/{model}/segment", files={"image": (name, data, "image/tiff")})
    with open_session(models[model], threads=1) as session:
        expected = session.segment(session.read_image(FILES / name)).labels
    assert np.array_equal(labels_of(found), expected)


def test_gray_png_is_labelled(service: TestClient, models: dict[str, Path]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70), np.uint8)
    found = service.post("/v1/models/gray/segment", files={"image": encoded(image, "PNG")})
    with open_session(models["gray"], threads=1) as session:
        expected = session.segment(image).labels
    assert np.array_equal(labels_of(found), expected)
    names = [entry["name"] for entry in found.json()["classes"]]
    assert names == ["background", "class 0"]  # the one name there is, is label 1's


@pytest.mark.parametrize(
    ("model", "data", "status", "says"),
    [
        ("four", npy(bands(3)), 422, "has 3 bands (50x70 pixels), and the network takes 4"),
        ("four", npy(bands(12)), 422, "has 12 bands"),
        ("four", npy(np.moveaxis(bands(4), -1, 0)), 422, "save it with the bands last"),
        ("four", encoded(np.zeros((9, 9, 3), np.uint8), "PNG"), 422, "has 3 bands"),
        ("four", npy(np.full((9, 9, 4), np.nan)), 422, "not finite"),
        ("four", npy(bands(4))[:-9], 422, "cut off or damaged"),
        ("four", npy(np.zeros((9, 9, 4), complex)), 415, "Expected (H, W, C) real numbers"),
        ("four", npy(np.zeros((300, 200, 4))), 413, "200 x 300 pixels of 4 bands"),
        ("four", b"\x93NUMPY", 415, "not a .npy file"),
        ("gray", npy(bands(3)), 422, "takes 1"),
        ("four", b"nothing known", 415, "is not a JPEG"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:12],
)
def test_image_of_other_bands_is_refused(
    model: str, data: bytes, status: int, says: str, service: TestClient
) -> None:
    found = service.post(f"/v1/models/{model}/segment", files={"image": data})
    assert found.status_code == status
    assert says in found.json()["detail"]


def test_overlay_shows_the_first_bands(service: TestClient) -> None:
    path = "/v1/models/four/segment?output=overlay&opacity=0"
    image = bands(4, "uint8")
    found = service.post(path, files={"image": npy(image)})
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found.content))), image[:, :, :3])
    kept = service.post(f"{path}&classes=1&size=network", files={"image": npy(bands(4))})
    assert Image.open(io.BytesIO(kept.content)).size == (48, 32)


@pytest.mark.parametrize("classes", ["", "&classes=0", "&classes=1"])
def test_logits_of_one_output_are_class_1s(classes: str, service: TestClient) -> None:
    path = f"/v1/models/four/segment?output=logits{classes}"
    found = service.post(path, files={"image": npy(bands(4))})
    with np.load(io.BytesIO(found.content)) as arrays:
        assert arrays["logits"].shape == (1, 8, 12)
        assert arrays["class_ids"].tolist() == [1]
        assert arrays["classes"].tolist() == ["class 1"]
    original = service.post(f"{path}&size=original", files={"image": npy(bands(4))})
    with np.load(io.BytesIO(original.content)) as arrays:
        assert arrays["logits"].shape == (1, 50, 70)


def test_card_says_bands_and_threshold(service: TestClient) -> None:
    card = service.get("/v1/models/four").json()
    assert card["input"] == {"channels": 4, "height": 32, "width": 48}
    assert card["output"] == {"channels": 1, "height": 8, "width": 12}
    assert card["threshold"] == 0.4
    assert card["preprocessing"]["loading"] == "bands"
    assert card["preprocessing"]["mean"] == [900, 800, 700, 600]
    assert len(card["classes"]) == 2
    assert service.get("/v1/models/twelve").json()["threshold"] is None


def test_kserve_tensors_have_the_models_bands(service: TestClient, models: dict[str, Path]) -> None:
    described = service.get("/v2/models/four").json()
    assert described["inputs"][0]["shape"] == [-1, 4, 32, 48]
    assert described["outputs"][0]["shape"] == [-1, 1, 8, 12]
    raw = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 4), np.uint8)
    with open_session(models["four"], threads=1) as session:
        expected = session.run(raw)
        labels = np.stack([session.segment(image).labels for image in raw])
    assert np.array_equal(infer(service, raw, "UINT8", "logits"), expected)
    assert np.array_equal(infer(service, raw, "UINT8", "labels"), labels)
    normalised = ((raw - np.float32(FOUR.mean)) / np.float32(300)).transpose(0, 3, 1, 2)
    found = infer(service, np.ascontiguousarray(normalised, np.float32), "FP32", "logits")
    assert np.abs(found - expected).max() <= 1e-4
    three = np.zeros((1, 32, 48, 3), np.uint8)
    refused = post(service, three, "UINT8", "logits")
    assert refused.status_code == 400
    assert "[N, 32, 48, 4]" in refused.json()["detail"]


def post(service: TestClient, array: np.ndarray, kind: str, output: str):
    given = {
        "name": "images",
        "datatype": kind,
        "shape": list(array.shape),
        "parameters": {"binary_data_size": array.nbytes},
    }
    wanted = {"name": output, "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [given], "outputs": [wanted]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return service.post("/v2/models/four/infer", content=head + array.tobytes(), headers=headers)


def infer(service: TestClient, array: np.ndarray, kind: str, output: str) -> np.ndarray:
    found = post(service, array, kind, output)
    assert found.status_code == 200, found.text
    length = int(found.headers["Inference-Header-Content-Length"])
    (described,) = json.loads(found.content[:length])["outputs"]
    dtype = {"FP32": "<f4", "UINT8": "u1"}[described["datatype"]]
    return np.frombuffer(found.content, dtype, offset=length).reshape(described["shape"])


def test_formats_may_leave_arrays_out(models: dict[str, Path]) -> None:
    app = create_app([models["four"]], Settings(threads=1, formats=("PNG", "TIFF")))
    with TestClient(app, raise_server_exceptions=False) as opened:
        wait_until_ready(opened)
        found = opened.post("/v1/segment", files={"image": npy(bands(4))})
        assert found.status_code == 415
        assert "accepted here (PNG, TIFF)" in found.json()["detail"]
        rgba = np.random.default_rng(0).integers(0, 256, (9, 8, 4), np.uint8)
        assert opened.post("/v1/segment", files={"image": encoded(rgba, "PNG")}).status_code == 200
