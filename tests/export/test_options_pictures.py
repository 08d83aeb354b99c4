"""Folders of images."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from PIL import Image

from fdconv_deploy.demo import held_out
from fdconv_deploy.errors import ImageError
from fdconv_deploy.export.options import Pictures


def write(path, size=(6, 4), mode="RGB"):
    Image.new(mode, size, 3 if mode in "LP" else (1, 2, 3)).save(path)


def test_the_packaged_folder():
    found = Pictures(held_out()[0][0].parent)
    assert found.paths == [image for image, _ in held_out()]
    for place, (image, _) in enumerate(held_out()):
        np.testing.assert_array_equal(found[place], np.asarray(Image.open(image)))


def test_masks_are_left_out(tmp_path):
    write(tmp_path / "a.jpg")
    write(tmp_path / "a_labels.png", mode="L")
    write(tmp_path / "b.png")
    write(tmp_path / "c_labels.png")  # an image of that name
    (tmp_path / "notes.txt").write_text("not an image")
    found = Pictures(tmp_path)
    assert [path.name for path in found.paths] == ["a.jpg", "b.png", "c_labels.png"]
    assert [picture.shape for picture in found[1:]] == [(4, 6, 3)] * 2


def _with_a_short_header(whole: bytes) -> bytes:
    header = b"IHDR" + whole[16:21]
    chunk = (5).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    return whole[:8] + chunk + whole[33:]


def test_damaged_headers_are_refused_before_any_image_is_read(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(_with_a_short_header((tmp_path / "a.png").read_bytes()))
    with pytest.raises(ImageError, match=r"a\.png cannot be decoded"):
        Pictures(tmp_path)


def test_images_too_large_are_refused_before_any_is_read(tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png has .* pixels"):
        Pictures(tmp_path)


def test_what_is_no_folder_of_images(tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        Pictures(tmp_path / "none")
    with pytest.raises(ImageError, match="holds no images"):
        Pictures(tmp_path)
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"a\.png is not a JPEG"):
        Pictures(tmp_path)
    with pytest.raises(ImageError, match="is a file"):
        Pictures(tmp_path / "a.png")
    write(tmp_path / "a.png", (300, 300))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match="cut off"):
        Pictures(tmp_path)[0]
