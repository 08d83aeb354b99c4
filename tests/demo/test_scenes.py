"""Drawn streets: the same from the same seed, valid at any size, with every class in them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.streets import textures
from examples.streets.classes import BUILDING, CAR, FENCE, ROAD, SIDEWALK, SKY
from examples.streets.scenes import CLASSES, PALETTE, draw_scene
from examples.streets.stage import Camera, Canvas


def test_same_seed_same_scene():
    first, second = draw_scene(7), draw_scene(7)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_other_seed_other_scene():
    first, second = draw_scene(7), draw_scene(8)
    assert (first[1] != second[1]).mean() > 0.1
    assert np.abs(first[0].astype(int) - second[0]).mean() > 5


def test_every_class_occurs_and_none_swallows_the_rest():
    labels = np.stack([draw_scene(seed, 96, 128)[1] for seed in range(40)])
    share = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
    assert share.min() > 0.002, dict(zip(CLASSES, share, strict=True))
    assert share.max() < 0.5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), height=st.integers(16, 300), width=st.integers(16, 300))
def test_valid_at_any_size(seed, height, width):
    rgb, labels = draw_scene(seed, height, width)
    assert rgb.shape == (height, width, 3)
    assert rgb.dtype == np.uint8
    assert labels.shape == (height, width)
    assert labels.dtype == np.uint8
    assert labels.max() < len(CLASSES)


@pytest.mark.parametrize("size", [(15, 64), (64, 15), (0, 0)])
def test_too_small_is_refused(size):
    with pytest.raises(ValueError, match="at least 16×16"):
        draw_scene(0, *size)


def test_palette_tells_classes_apart():
    assert len(set(PALETTE)) == len(CLASSES) == len(PALETTE)


def test_sky_above_road_below():
    labels = np.stack([draw_scene(seed)[1] for seed in range(12)])
    rows = np.arange(labels.shape[1])[None, :, None]
    centre = {c: (rows * (labels == c)).sum() / (labels == c).sum() for c in (SKY, ROAD)}
    assert centre[SKY] < 60 < 120 < centre[ROAD]


def test_mean_colour_does_not_tell_the_class():
    """Over many scenes, classes' mean colours overlap: no threshold on grey separates them."""
    greys: dict[int, list[float]] = {c: [] for c in (ROAD, SIDEWALK, BUILDING, FENCE, CAR)}
    for seed in range(40):
        rgb, labels = draw_scene(seed, 96, 128)
        grey = rgb.mean(2)
        for label, found in greys.items():
            if (labels == label).sum() > 20:
                found.append(float(grey[labels == label].mean()))
    for first in greys:
        for second in greys:
            low = np.percentile(greys[first], 80)
            assert low > np.percentile(greys[second], 20), (CLASSES[first], CLASSES[second])


def test_a_fence_is_a_fence_between_its_bars():
    canvas, camera = Canvas(64, 64), Camera(60.0, 32.0, 30.0, 1.5)
    canvas.rgb[:] = 200
    quad = [camera.point(x, y, 4) for x, y in [(-1, 2), (1, 2), (1, 0.5), (-1, 0.5)]]
    cover = np.zeros((20, 20), np.float32)
    cover[:, ::4] = 1
    canvas.surface(quad, np.zeros((20, 20, 3), np.float32), FENCE, 4.0, cover)
    inside = canvas.labels == FENCE
    assert inside.sum() > 400
    assert canvas.rgb[inside].min() < 60
    assert canvas.rgb[inside].max() > 140


def test_perspective_depth_of_a_side_plane_is_that_of_its_points():
    canvas, camera = Canvas(100, 100), Camera(50.0, 50.0, 50.0, 1.5)
    x, near, far = -2.0, 3.0, 20.0
    corners = [camera.point(x, y, z) for y, z in [(1.5, near), (1.5, far), (0, far), (0, near)]]
    canvas.surface(corners, np.zeros((8, 8, 3), np.float32), BUILDING, (near, far))
    for z in (4.0, 7.0, 12.0):
        column, row = camera.point(x, 0.9, z)
        assert canvas.depth[int(row), int(column)] == pytest.approx(z, rel=0.15)


@pytest.mark.parametrize("function", [textures.white, textures.fractal])
def test_noise_has_unit_size_and_repeats_with_its_seed(function):
    extra = () if function is textures.white else (16.0,)
    first = function(np.random.default_rng(3), 300, 700, *extra)
    second = function(np.random.default_rng(3), 300, 700, *extra)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (300, 700)
    assert 0.6 < first.std() < 1.5
