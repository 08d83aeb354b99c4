"""Folders of images and their masks."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from export.folders import Pictures
from fdconv_deploy.demo import held_out
from fdconv_deploy.errors import ImageError


def write(path, size=(6, 4), mode="RGB"):
    Image.new(mode, size, 3 if mode in "LP" else (1, 2, 3)).save(path)


def test_the_packaged_folder():
    found = Pictures(held_out()[0][0].parent)
    assert found.paths == [image for image, _ in held_out()]
    masks = found.masks()
    for place, (image, labels) in enumerate(held_out()):
        np.testing.assert_array_equal(found[place], np.asarray(Image.open(image)))
        np.testing.assert_array_equal(masks[place], np.asarray(Image.open(labels)))


def test_masks_belong_to_an_image(tmp_path):
    write(tmp_path / "a.jpg")
    write(tmp_path / "a_labels.png", mode="L")
    write(tmp_path / "b.png")
    write(tmp_path / "c_labels.png")  # an image of that name
    (tmp_path / "notes.txt").write_text("not an image")
    found = Pictures(tmp_path)
    assert [path.name for path in found.paths] == ["a.jpg", "b.png", "c_labels.png"]
    first, *others = found.masks()
    assert first.shape == (4, 6)
    assert others == [None, None]
    assert [picture.shape for picture in found[1:]] == [(4, 6, 3)] * 2


@pytest.mark.parametrize(("size", "mode"), [((5, 4), "L"), ((6, 4), "RGB")])
def test_masks_that_do_not_fit(tmp_path, size, mode):
    write(tmp_path / "a.png")
    write(tmp_path / "a_labels.png", size, mode)
    with pytest.raises(ImageError, match=r"one class index for each pixel of its image, 4x6"):
        Pictures(tmp_path).masks()


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
