from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime import Segmentation
from fdconv_deploy.runtime.visualization import (
    default_palette,
    encode,
    mask_png,
    overlay,
)


@pytest.mark.parametrize("classes", [1, 2, 7, 150, 256])
def test_mask_png_round_trip(classes: int) -> None:
    labels = np.random.default_rng(0).integers(0, classes, (33, 47)).astype(np.uint8)
    palette = default_palette(classes)
    image = Image.open(io.BytesIO(mask_png(labels, palette)))
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), labels)
    assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(palette)[labels])


def test_mask_png_leaves_the_labels_alone() -> None:
    labels = np.arange(4, dtype=np.uint8).reshape(2, 2)
    labels.setflags(write=False)
    mask_png(labels, default_palette(4))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_mask_png_of_too_many_classes(dtype) -> None:
    with pytest.raises(ImageError, match="256 classes"):
        mask_png(np.zeros((2, 2), dtype), default_palette(257))


def test_default_palette() -> None:
    colours = default_palette(256)
    assert len(set(colours)) == 256
    assert colours[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))  # PASCAL VOC's
    assert default_palette(1000)[:256] == colours
    assert default_palette(0) == ()


@given(st.floats(0, 1), st.integers(0, 99))
def test_overlay_is_the_blend(opacity: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    labels = rng.integers(0, 5, (9, 11)).astype(np.uint8)
    palette = default_palette(5)
    expected = (1 - opacity) * image + opacity * np.asarray(palette)[labels]
    found = overlay(image, labels, palette, opacity)
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 0.5 + 1e-3


def test_overlay_at_its_ends() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    labels = np.ones((4, 5), np.uint8)
    assert np.array_equal(overlay(image, labels, default_palette(2), 0), image)
    assert (overlay(image, labels, default_palette(2), 1) == (128, 0, 0)).all()


@pytest.mark.parametrize("opacity", [-0.1, 1.1, float("nan")])
def test_overlay_refuses_opacity(opacity: float) -> None:
    with pytest.raises(ImageError, match="0 to 1"):
        overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8), ((0, 0, 0),), opacity)


def test_overlay_refuses_other_sizes() -> None:
    with pytest.raises(ImageError, match="differ in size"):
        overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3), np.uint8), ((0, 0, 0),))


def test_class_areas() -> None:
    labels = np.array([[0, 2], [2, 2]], np.uint8)
    found = Segmentation(labels, ("a", "b", "c", "d"), default_palette(4), "resized", "whole", {})
    assert found.areas().tolist() == [1, 0, 3, 0]
    assert found.as_dict()["classes"] == {"a": 0.25, "c": 0.75}


def test_encode_jpeg_quality() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert len(encode(image, "JPEG", quality=20)) < len(encode(image, "JPEG"))
