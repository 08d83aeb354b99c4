"""Image files of any number of bands. tests/real_packages/geotiff wrote the TIFF files."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fdconv_deploy.config import Loading, Preprocessing
from fdconv_deploy.errors import FDConvError, ImageError
from fdconv_deploy.runtime.images import ImageTooLargeError, UnsupportedImageError, load_image
from fdconv_deploy.runtime.preprocessing import check_image, normalise, resize, scene_bands
from fdconv_deploy.runtime.visualization import as_rgb

FILES = Path(__file__).resolve().parents[1] / "real_packages" / "geotiff"
TIFFS = sorted(path.name for path in (FILES / "files").glob("*.tif"))
GDAL = json.loads((FILES / "read_by_gdal.json").read_text())


def of(bands: int, loading: Loading = "bands", **fields: object) -> Preprocessing:
    values = {"mean": (0.0,) * bands, "std": (1.0,) * bands, "loading": loading}
    return Preprocessing.model_validate(values | fields)


def expected(bands: int, kind: str) -> np.ndarray:
    """(H, W, bands), by the rule of tests/real_packages/geotiff/make.py."""
    y, x = np.mgrid[:22, :35]
    found = np.stack([(7 * y + 3 * x + 31 * band) % 251 for band in range(bands)], axis=-1)
    scale = {"uint8": 1, "uint16": 257, "int16": -100, "float32": 0.37}[kind]
    return (found * scale).astype(kind)


def npy(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png(array: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", array)
    assert done
    return data.tobytes()


@pytest.fixture
def tiff_reader() -> None:
    pytest.importorskip("tifffile", reason="TIFF files of bands need tifffile ([bands])")
    pytest.importorskip("imagecodecs", reason="compressed ones need imagecodecs ([bands])")


@pytest.mark.usefixtures("tiff_reader")
@pytest.mark.parametrize("name", TIFFS)
def test_tiff_bands_are_those_that_were_written(name: str) -> None:
    parts = re.fullmatch(r".*-(\d+)-(\w+)\.tif", name)
    assert parts
    bands, kind = int(parts[1]), parts[2]
    found = load_image(FILES / "files" / name, of(bands))
    assert found.dtype == kind
    assert np.array_equal(found, expected(bands, kind))
    if GDAL[name]["shape"] == [bands, 22, 35]:  # those whose bands are no pages
        sums = found.astype(np.float64).sum(axis=(0, 1)).round(3)
        assert np.allclose(sums, GDAL[name]["sums"])


@pytest.mark.usefixtures("tiff_reader")
def test_tiff_bytes_are_read_as_a_path_is() -> None:
    path = FILES / "files" / "gdal-lzw-4-uint16.tif"
    assert np.array_equal(load_image(path.read_bytes(), of(4)), load_image(path, of(4)))


@pytest.mark.usefixtures("tiff_reader")
@pytest.mark.parametrize(
    ("name", "bands", "found"),
    [
        ("gdal-pixel-12-uint8.tif", 4, "has 12 bands"),
        ("gdal-band-1-uint16.tif", 4, "has 1 band "),
        ("tifffile-pages-4-uint16.tif", 12, "has 1 band "),
    ],
)
def test_tiff_of_other_bands_is_refused(name: str, bands: int, found: str) -> None:
    with pytest.raises(ImageError, match=rf"{found}.*the network takes {bands}"):
        load_image(FILES / "files" / name, of(bands))


@pytest.mark.usefixtures("tiff_reader")
def test_tiff_cut_off_is_refused() -> None:
    whole = (FILES / "files" / "gdal-deflate-12-float32.tif").read_bytes()
    for length in (8, 100, 1000, len(whole) // 2, len(whole) - 20):
        with pytest.raises(ImageError):
            load_image(whole[:length], of(12))


@pytest.mark.usefixtures("tiff_reader")
def test_tiff_mutated_is_an_image_or_refused() -> None:
    random = np.random.default_rng(0)
    names = ("gdal-lzw-4-uint16.tif", "tifffile-pages-4-uint16.tif", "gdal-bigendian-4-uint16.tif")
    files = [np.frombuffer((FILES / "files" / name).read_bytes(), np.uint8) for name in names]
    for number in range(300):
        data = files[number % len(files)].copy()
        # The header's and the directories' bytes, where damage does most.
        where = random.integers(0, min(len(data), 500), random.integers(1, 6))
        data[where] = random.integers(0, 256, len(where))
        try:
            assert load_image(data.tobytes(), of(4)).shape[2] == 4
        except ImageError:
            continue


@pytest.mark.usefixtures("tiff_reader")
def test_tiff_too_large_is_refused_before_it_is_decoded() -> None:
    path = FILES / "files" / "gdal-pixel-12-uint8.tif"  # 22 x 35 pixels, four times three bands
    assert load_image(path, of(12), max_pixels=22 * 35 * 4).shape == (22, 35, 12)
    with pytest.raises(ImageTooLargeError, match="35 x 22 pixels of 12 bands"):
        load_image(path, of(12), max_pixels=22 * 35 * 4 - 1)


def test_tiff_without_its_reader_names_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(FDConvError, match="tifffile"):
        load_image(FILES / "files" / "gdal-pixel-4-uint8.tif", of(4))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", ">u2", "float32", "float64", "int64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_bands_are_read(kind: str, order: str, tmp_path: Path) -> None:
    array = np.arange(5 * 6 * 7).reshape(5, 6, 7).astype(kind, order=order)  # type: ignore[call-overload]
    path = tmp_path / "x.npy"
    np.save(path, array)
    for source in (path, path.read_bytes()):
        found = load_image(source, of(7))
        assert np.array_equal(found, array)
        checked = check_image(found, of(7))
        assert checked.dtype in ("uint8", "uint16", "int16", "float32", "float64")
        assert np.array_equal(checked, array)


def test_npy_of_one_band_may_lack_the_axis() -> None:
    assert load_image(npy(np.ones((4, 5), np.float32)), of(1)).shape == (4, 5, 1)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (npy(np.zeros((4, 9, 8))), "has 8 bands.*first axis.*bands last"),
        (npy(np.zeros((9, 8))), "has 1 band "),
        (npy(np.zeros((2, 9, 8, 4))), "Expected \\(H, W, C\\)"),
        (npy(np.zeros((9, 0, 4))), "Expected \\(H, W, C\\)"),
        (npy(np.zeros((9, 8, 4), complex)), "complex128"),
        (npy(np.array([{}, 1], object), allow_pickle=True), "holds an array"),
        (npy(np.zeros((9, 8, 4)))[:-1], "cut off or damaged"),
        (b"\x93NUMPY\x01\x00", "not a .npy file"),
        (b"PK\x03\x04 an archive", "not a .npy file"),
    ],
)
def test_npy_of_something_else_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_image(data, of(4))


def test_npy_that_claims_to_be_huge_is_refused_before_it_is_read() -> None:
    data = npy(np.zeros((9, 8, 4), np.uint8)).replace(b"(9, 8, 4)", b"(90000, 80000, 4)")
    with pytest.raises(ImageError, match="80000 x 90000 pixels"):
        load_image(data, of(4))


def test_npy_is_no_photograph() -> None:
    with pytest.raises(UnsupportedImageError, match=r"preprocessing\.loading=bands"):
        load_image(npy(np.zeros((9, 8, 3), np.uint8)), Preprocessing())


def test_png_channels_are_bands_in_the_files_order() -> None:
    random = np.random.default_rng(0)
    rgba = random.integers(0, 256, (7, 9, 4), np.uint8)
    bgra = rgba[:, :, [2, 1, 0, 3]]
    assert np.array_equal(load_image(png(bgra), of(4)), rgba)
    assert np.array_equal(load_image(png(bgra[:, :, :3]), of(3)), rgba[:, :, :3])
    deep = random.integers(0, 65536, (7, 9, 3), np.uint16)
    assert np.array_equal(load_image(png(deep[:, :, ::-1]), of(3)), deep)
    gray = random.integers(0, 65536, (7, 9, 1), np.uint16)
    assert np.array_equal(load_image(png(gray), of(1)), gray)


def test_png_by_opencv_is_what_mmcv_loads() -> None:
    random = np.random.default_rng(0)
    bgra = random.integers(0, 256, (7, 9, 4), np.uint8)
    assert np.array_equal(load_image(png(bgra), of(4, "unchanged")), bgra)
    # Of three bands, arrays are RGB here, and swapped where the network was trained on BGR.
    assert np.array_equal(load_image(png(bgra[:, :, :3]), of(3, "unchanged")), bgra[:, :, 2::-1])
    found = load_image(png(bgra[:, :, :3]), of(1, "grayscale"))
    decoded = cv2.imdecode(np.frombuffer(png(bgra[:, :, :3]), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert np.array_equal(found[:, :, 0], decoded)


def test_gray_picture_stored_in_colour_is_one_band() -> None:
    gray = np.random.default_rng(0).integers(0, 256, (7, 9, 1), np.uint8)
    colour = gray.repeat(3, axis=2)
    assert np.array_equal(load_image(png(colour), of(1)), gray)
    colour[0, 0] = (1, 2, 3)
    with pytest.raises(ImageError, match="has 3 bands"):
        load_image(png(colour), of(1))


def test_exif_orientation_is_left_to_photographs() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 9), np.uint8)).save(buffer, "PNG", exif=exif)
    assert load_image(buffer.getvalue(), of(1)).shape == (4, 9, 1)
    assert load_image(buffer.getvalue(), Preprocessing()).shape == (9, 4, 3)


def test_array_of_other_bands_is_refused() -> None:
    how = of(4)
    for array, says in (
        (np.zeros((4, 8, 9)), "np.moveaxis"),
        (np.zeros((8, 9, 3), np.uint8), "takes 4 bands"),
        (np.zeros((8, 9)), "takes 4 bands"),
        (np.zeros((8, 9, 4), bool), "real numbers"),
        (np.full((8, 9, 4), np.nan), "not finite"),
    ):
        with pytest.raises(ImageError, match=says):
            check_image(array, how)


@pytest.mark.parametrize("bands", [1, 2, 4, 12, 130])
def test_resize_keeps_bands_and_type(bands: int) -> None:
    random = np.random.default_rng(0)
    for kind in ("uint8", "uint16", "float32"):
        image = (random.random((9, 11, bands)) * 200).astype(kind)
        found = resize(image, 20, 15)
        assert (found.shape, found.dtype) == ((20, 15, bands), kind)
        one = resize(image[:, :, -1:], 20, 15)
        assert np.abs(found[:, :, -1:].astype(float) - one).max() <= 1  # rounding


def test_normalise_swaps_three_bands_of_opencv_alone() -> None:
    image = np.random.default_rng(0).random((3, 4, 3)).astype(np.float32)
    straight, swapped = image.transpose(2, 0, 1), image[:, :, ::-1].transpose(2, 0, 1)
    for loading, bgr_to_rgb, expects in (
        ("unchanged", True, straight),
        ("unchanged", False, swapped),
        ("bands", True, swapped),  # bands as the file has them, then SegDataPreProcessor's swap
        ("bands", False, straight),
    ):
        how = of(3, loading, bgr_to_rgb=bgr_to_rgb)  # type: ignore[arg-type]
        assert np.array_equal(normalise(image, how), expects)
    four = np.random.default_rng(0).random((3, 4, 4)).astype(np.float32)
    assert np.array_equal(normalise(four, of(4, bgr_to_rgb=True)), four.transpose(2, 0, 1))


def test_scene_is_in_the_bands_own_units() -> None:
    scene = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    assert scene_bands(scene, Preprocessing()) is scene
    how = Preprocessing(mean=(1000.0, 0.5), std=(300.0, 0.1), loading="bands")
    found = normalise(scene_bands(scene, how), how)
    assert np.abs(found - normalise(scene, Preprocessing())[:2]).max() <= 1e-5
    assert np.array_equal(scene_bands(scene, of(4)), scene[:, :, [0, 1, 2, 0]])


def test_picture_of_bands_shows_the_first_three() -> None:
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (6, 7, 3), np.uint8)
    assert np.array_equal(as_rgb(rgb), rgb)
    four = random.integers(0, 256, (6, 7, 4), np.uint8)
    assert np.array_equal(as_rgb(four), four[:, :, :3])
    gray = as_rgb(random.integers(0, 256, (6, 7, 1), np.uint8))
    assert (gray == gray[:, :, :1]).all()
    two = as_rgb(random.random((6, 7, 2)).astype(np.float32))
    assert (two == two[:, :, :1]).all()
    assert (two.min(), two.max()) == (0, 255)
    deep = as_rgb((random.random((50, 50, 12)) * 3000 + 500).astype(np.uint16))
    assert (deep.shape, deep.dtype) == ((50, 50, 3), np.uint8)
    assert np.array_equal(as_rgb(np.full((4, 4, 5), 7.5)), np.zeros((4, 4, 3)))
