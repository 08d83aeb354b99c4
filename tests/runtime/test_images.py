from __future__ import annotations

import contextlib
import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.images import (
    MAX_PIXELS,
    PICTURE_FORMATS,
    ImageFile,
    ImageTooLargeError,
    UnsupportedImageError,
    image_cost,
    image_size,
    read_image,
)


def picture(height: int = 61, width: int = 83) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def as_published(data: bytes) -> np.ndarray:
    """The pixels mmcv's cv2 backend sees, in RGB order."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]


RGBA = np.dstack([picture(), np.random.default_rng(1).integers(0, 256, (61, 83), dtype=np.uint8)])
CASES = {
    "jpeg 4:4:4": (picture(), "JPEG", {"subsampling": 0}),
    "jpeg 4:2:2": (picture(), "JPEG", {"subsampling": 1}),
    "jpeg 4:2:0": (picture(), "JPEG", {"subsampling": 2, "quality": 60}),
    "jpeg progressive": (picture(), "JPEG", {"progressive": True}),
    "jpeg gray": (Image.fromarray(picture()).convert("L"), "JPEG", {}),
    "png": (picture(), "PNG", {}),
    "png gray": (Image.fromarray(picture()).convert("L"), "PNG", {}),
    "png bilevel": (Image.fromarray(picture()).convert("1"), "PNG", {}),
    "png palette": (Image.fromarray(picture()).convert("P"), "PNG", {}),
    "png palette, transparent": (
        Image.fromarray(picture()).convert("P"),
        "PNG",
        {"transparency": 3},
    ),
    "png gray, alpha": (Image.fromarray(RGBA).convert("LA"), "PNG", {}),
    "png alpha": (RGBA, "PNG", {}),
    "webp": (picture(), "WEBP", {"quality": 80}),
    "webp lossless": (picture(), "WEBP", {"lossless": True}),
    "webp alpha": (RGBA, "WEBP", {"lossless": True, "exact": True}),
    "bmp": (picture(), "BMP", {}),
    "tiff": (picture(), "TIFF", {}),
    "tiff lzw": (picture(), "TIFF", {"compression": "tiff_lzw"}),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_the_published_pipeline(case: str) -> None:
    image, kind, options = CASES[case]
    data = encoded(image, kind, **options)
    assert np.array_equal(read_image(data), as_published(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_published(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif)
    found = read_image(data)
    assert found.shape == ((83, 61, 3) if orientation > 4 else (61, 83, 3))
    assert np.array_equal(found, as_published(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_a_header_is_that_of_the_pixels(
    kind: str, orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "a"
    file.write_bytes(encoded(picture(), kind, exif=exif))
    assert image_size(file) == read_image(file).shape[:2]


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_keep_the_upper_eight(suffix: str, channels: int) -> None:
    deep = np.random.default_rng(2).integers(0, 65536, (21, 34, channels), dtype=np.uint16)
    data = cv2.imencode(suffix, deep)[1].tobytes()
    difference = read_image(data).astype(int) - as_published(data)
    # OpenCV rounds 16-bit colour TIFF where it cuts 16-bit PNG; one step of 256 either way.
    assert np.abs(difference).max() <= (1 if (suffix, channels) == (".tiff", 3) else 0)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    data = encoded(Image.fromarray(picture()).convert("CMYK"), kind)
    assert np.abs(read_image(data).astype(int) - as_published(data)).max() <= 1
    if kind == "TIFF":  # lossless: the colours come back
        assert np.abs(read_image(data).astype(int) - picture()).max() <= 1


def test_alpha_is_dropped_not_blended() -> None:
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[..., :3] = (10, 20, 30)
    assert np.array_equal(read_image(encoded(clear, "PNG")), clear[..., :3])


def test_a_path_and_its_bytes_read_alike(tmp_path: Path) -> None:
    data = encoded(picture(), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    assert np.array_equal(read_image(tmp_path / "a.jpg"), read_image(data))
    assert np.array_equal(read_image(str(tmp_path / "a.jpg")), read_image(data))


def test_result_is_a_writable_array_of_its_own() -> None:
    found = read_image(encoded(picture(), "PNG"))
    assert found.dtype == np.uint8
    assert found.flags.owndata or found.base is None or found.flags.writeable
    found[0, 0] = 0


def sentence(caught) -> str:
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


class TestRefused:
    @pytest.mark.parametrize(
        "data", [b"", b"x", b"\xff\xd8\xff", b"GIF89a" + bytes(40), b"%PDF-1.4"]
    )
    def test_not_an_image(self, data: bytes) -> None:
        with pytest.raises(ImageError) as caught:
            read_image(data)
        sentence(caught)

    def test_other_formats(self) -> None:
        for kind in ("GIF", "PPM", "ICO", "TGA"):
            with pytest.raises(UnsupportedImageError, match="JPEG, PNG, WebP, BMP or TIFF"):
                read_image(encoded(picture(), kind))

    @pytest.mark.parametrize("kind", PICTURE_FORMATS)
    @pytest.mark.parametrize("kept", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
    def test_cut_off(self, kind: str, kept: float) -> None:
        data = encoded(picture(), kind)
        with pytest.raises(ImageError) as caught:
            read_image(data[: int(len(data) * kept)])
        sentence(caught)

    def test_missing_empty_folder_and_pipe(self, tmp_path: Path) -> None:
        (tmp_path / "empty.png").touch()
        os.mkfifo(tmp_path / "pipe.png")
        for name, says in (
            ("none.png", "does not exist"),
            ("empty.png", "empty"),
            ("pipe.png", "is not a file"),
            ("", "is not a file"),
        ):
            with pytest.raises(ImageError, match=says) as caught:
                read_image(tmp_path / name)
            sentence(caught)

    @pytest.mark.parametrize("chunk", [b"IHDR", b"tEXt", b"IDAT", b"IEND"])
    def test_a_length_that_a_file_has_not_takes_no_memory(
        self, chunk: bytes, tmp_path: Path
    ) -> None:
        notes = PngInfo()
        notes.add_text("a", "b")
        data = bytearray(encoded(picture(), "PNG", pnginfo=notes))
        at = data.index(chunk)
        data[at - 4 : at] = (0xFFFFFFFF).to_bytes(4, "big")
        file = tmp_path / "a.png"
        file.write_bytes(data)
        for read in (read_image, image_size):
            tracemalloc.start()
            with contextlib.suppress(ImageError):
                read(file)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 50e6

    def test_pixel_cap_is_met_before_decoding(self) -> None:
        def chunk(kind: bytes, payload: bytes) -> bytes:
            body = kind + payload
            return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))

        # A bomb: its header promises 10 gigapixels, and there is no data at all.
        header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
        with pytest.raises(ImageTooLargeError) as caught:
            read_image(bomb)
        assert "64,000,000" in sentence(caught)

    def test_pixel_cap_is_an_argument(self) -> None:
        data = encoded(picture(10, 20), "PNG")
        assert read_image(data, max_pixels=200).shape == (10, 20, 3)
        with pytest.raises(ImageTooLargeError, match="20 x 10 pixels"):
            read_image(data, max_pixels=199)
        assert MAX_PIXELS == 64_000_000

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_32_bit_pixels(self, mode: str) -> None:
        with pytest.raises(UnsupportedImageError, match="32-bit"):
            read_image(encoded(Image.fromarray(picture()).convert("L").convert(mode), "TIFF"))

    def test_broken_exif_is_ignored_as_published(self) -> None:
        data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
        assert np.array_equal(read_image(data), as_published(data))


WHOLE = [encoded(picture(20, 30), kind) for kind in PICTURE_FORMATS]


@given(st.sampled_from(WHOLE), st.integers(0, 5000), st.binary(min_size=1, max_size=40))
def test_damage_gives_an_image_or_an_image_error(whole: bytes, at: int, junk: bytes) -> None:
    at %= len(whole)
    try:
        found = read_image(whole[:at] + junk + whole[at + len(junk) :], max_pixels=1_000_000)
    except ImageError:
        return
    assert found.dtype == np.uint8
    assert found.shape[2] == 3


def test_of_a_jpeg_of_several_pictures_the_first_is_taken() -> None:
    """As phones write them, with a smaller one or a map of depths behind."""
    image = Image.fromarray(picture())
    alone = encoded(image, "JPEG")
    several = encoded(image, "MPO", save_all=True, append_images=[image.resize((8, 6))])
    assert Image.open(io.BytesIO(several)).format == "MPO"
    assert np.array_equal(read_image(several), read_image(alone))
    cost, expected = (image_cost(ImageFile.of(data), Preprocessing()) for data in (several, alone))
    assert cost == expected
