from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.images import read_image
from fdconv_deploy.runtime.preprocessing import (
    check_image,
    keep_ratio_size,
    normalise,
    place,
    published_size,
    resize,
)

SIZES = st.integers(1, 3000)


@pytest.fixture(scope="module")
def reference(oracle: Path) -> dict[str, np.ndarray]:
    return load_file(oracle / "segmentor" / "B_reference.safetensors")


@pytest.fixture(scope="module")
def published(oracle: Path) -> Preprocessing:
    told = json.loads((oracle / "segmentor" / "index.json").read_text())["preprocess"]
    told.pop("note")
    return Preprocessing(**told, scale=(256, 128))


class TestAgainstThePublishedPipeline:
    @pytest.mark.parametrize(
        ("file", "key"),
        [("B_image.png", "image_bgr_u8"), ("B_pipeline_image.png", "pipeline.image_bgr_u8")],
    )
    def test_decoding(self, oracle: Path, reference, file: str, key: str) -> None:
        assert np.array_equal(read_image(oracle / "segmentor" / file)[:, :, ::-1], reference[key])

    def test_resize(self, reference, published) -> None:
        image = reference["pipeline.image_bgr_u8"]
        size = published_size(*image.shape[:2], published)
        assert size == (128, 175)
        assert np.array_equal(resize(image, *size), reference["pipeline.resized_bgr_u8"])

    @pytest.mark.parametrize(
        ("image", "tensor"),
        [("image_bgr_u8", "input"), ("pipeline.resized_bgr_u8", "pipeline.input")],
    )
    def test_normalise_bit_for_bit(self, reference, published, image: str, tensor: str) -> None:
        rgb = reference[image][:, :, ::-1]
        assert np.array_equal(normalise(rgb, published), reference[tensor][0])

    def test_placement(self, published) -> None:
        assert place((90, 123), (128, 175), published, "stretch")[0] == "resized"


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        # as mmcv.rescale_size gives them
        ((90, 123), (256, 128), (128, 175)),
        ((90, 123), (128, 256), (128, 175)),
        ((123, 90), (256, 128), (175, 128)),
        ((1024, 2048), (2048, 1024), (1024, 2048)),
        ((500, 375), (2048, 512), (683, 512)),
        ((1000, 1000), (2048, 512), (512, 512)),
        ((100, 5000), (2048, 512), (41, 2048)),
        ((1, 5000), (100, 100), (1, 100)),  # mmcv would make it 0 rows high
    ],
)
def test_keep_ratio_size(size, scale, expected) -> None:
    assert keep_ratio_size(*size, scale) == expected


def test_published_size_without_scale_or_ratio() -> None:
    assert published_size(7, 9, Preprocessing()) == (7, 9)
    assert published_size(7, 9, Preprocessing(scale=(20, 10), keep_ratio=False)) == (10, 20)


@given(SIZES, SIZES, st.integers(1, 800), st.integers(1, 800), st.sampled_from(["stretch", "pad"]))
def test_a_placement_lies_inside_and_says_what_it_did(h, w, big, small, fit) -> None:
    found, (height, width) = place((h, w), (big, small), Preprocessing(), fit)
    assert 1 <= height <= big
    assert 1 <= width <= small
    assert height == big or width == small
    done = {"stretch": "stretched", "pad": "letterboxed"}[fit]
    assert found == done if found != "resized" else (height, width) == (big, small)
    if found != "stretched":  # proportions kept to within the rounding of a pixel
        factor = min(big / h, small / w)
        assert abs(height - max(h * factor, 1)) <= 1
        assert abs(width - max(w * factor, 1)) <= 1


def test_same_proportions_are_exact_at_any_scale() -> None:
    for factor in (0.25, 0.5, 2, 7):
        size = (int(64 * factor), int(96 * factor))
        assert place(size, (64, 96), Preprocessing(), "pad")[0] == "resized"
    assert place((64, 97), (64, 96), Preprocessing(), "stretch")[0] == "stretched"
    assert place((64, 120), (64, 96), Preprocessing(), "pad")[1][0] < 64


def test_normalise_pads_with_the_mean_colour() -> None:
    image = np.full((2, 3, 3), 200, np.uint8)
    found = normalise(image, Preprocessing(), (4, 5))
    assert found.shape == (3, 4, 5)
    assert (found[:, 2:] == 0).all()
    assert (found[:, :, 3:] == 0).all()
    assert np.array_equal(found[:, :2, :3], normalise(image, Preprocessing()))


def test_normalise_for_a_network_trained_on_bgr() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    settings = Preprocessing(bgr_to_rgb=False, mean=(1, 2, 3), std=(4, 5, 6))
    expected = (image[:, :, ::-1].astype(np.float32) - np.float32([1, 2, 3])) / np.float32(
        [4, 5, 6]
    )
    assert np.array_equal(normalise(image, settings), expected.transpose(2, 0, 1))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_normalise_is_the_plain_formula(h: int, w: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    settings = Preprocessing()
    mean, std = np.float32(settings.mean), np.float32(settings.std)
    expected = ((image.astype(np.float32) - mean) / std).transpose(2, 0, 1)
    assert np.array_equal(normalise(image, settings), expected)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        "image.png",
        None,
    ],
)
def test_check_image_refuses(bad) -> None:
    with pytest.raises(ImageError, match=r"\(H, W, 3\) uint8"):
        check_image(bad)


@pytest.mark.parametrize(
    ("scale", "size", "network", "expected"),
    [
        (None, (97, 131), (128, 160), ("resized", 97, 131)),
        ((192, 96), (90, 123), (96, 160), ("resized", 96, 131)),
        (None, (64, 96), (64, 96), ("resized", 64, 96)),
        (None, (200, 131), (128, 160), ("stretched", 128, 160)),
    ],
)
def test_images_are_padded_to_multiples_as_published(scale, size, network, expected) -> None:
    """Those of ``size_divisor`` lie at their own size, the mean colour beside them."""
    how = Preprocessing(scale=scale, size_divisor=32)
    fit, covered = place(size, network, how, "stretch")
    assert (fit, *covered) == expected


def test_pillow_averages_where_an_image_shrinks() -> None:
    """As detectron2 resizes: each pixel here is the mean of about four."""
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    found = resize(image, 32, 48, "pillow").astype(float)
    kernel = np.array([1, 3, 3, 1]) / 8  # of Pillow's triangle, twice as wide as a step
    rows = np.apply_along_axis(np.convolve, 0, image.astype(float), kernel, "valid")[1::2]
    inner = np.apply_along_axis(np.convolve, 1, rows, kernel, "valid")[:, 1::2]
    assert np.abs(found[1:-1, 1:-1] - inner).max() <= 1.5  # rounded to whole numbers twice
    assert np.abs(resize(image, 32, 48).astype(float)[1:-1, 1:-1] - inner).max() > 10
