"""Pasted masks, held against float64 arithmetic and torch's own sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fdconv_deploy.runtime.postprocessing import paste
from tests.reference.masks import pasted_probabilities

SIZE = 37, 45


def whole(mask: np.ndarray, box: np.ndarray, threshold: float, size=SIZE) -> np.ndarray:
    canvas = np.zeros(size, np.bool_)
    part = paste(mask, box, size, threshold)
    part.of(canvas)[:] = part.pixels
    return canvas


def some_mask(seed: int, cells: int = 28) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:cells, :cells] / cells - rng.uniform(0.3, 0.7, (2, 1, 1))
    smooth = 1 / (1 + np.exp(25 * (np.hypot(y, x) - 0.35)))
    return np.clip(smooth + rng.normal(0, 0.1, smooth.shape), 0, 1).astype(np.float32)


def sampled_by_torch(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The whole image through grid_sample."""
    x0, y0, x1, y1 = (torch.tensor(v) for v in box)
    rows = (torch.arange(size[0], dtype=torch.float32) + 0.5 - y0) / (y1 - y0) * 2 - 1
    columns = (torch.arange(size[1], dtype=torch.float32) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)
    sampled = F.grid_sample(torch.tensor(mask)[None, None], grid[None], align_corners=False)
    return sampled[0, 0].numpy()


edges = st.floats(-20, 60, width=32)
sides = st.floats(0.25, 70, width=32)


@given(st.integers(0, 99), edges, edges, sides, sides, st.sampled_from([0.05, 0.3, 0.5, 0.8]))
def test_as_mmdetection_pastes(
    seed: int, x: float, y: float, width: float, height: float, threshold: float
) -> None:
    mask = some_mask(seed)
    box = np.array([x, y, x + width, y + height], np.float32)
    found = whole(mask, box, threshold)
    exact = pasted_probabilities(mask, tuple(box.tolist()), SIZE)
    torchs = sampled_by_torch(mask, box, SIZE)
    assert np.abs(torchs - exact).max() < 1e-3  # tiny boxes magnify float32's rounding
    clear = np.abs(exact - threshold) > 1e-3
    assert np.array_equal(found[clear], (exact >= threshold)[clear])
    assert np.array_equal(found[np.abs(torchs - threshold) > 1e-5], (torchs >= threshold)[
        np.abs(torchs - threshold) > 1e-5])  # fmt: skip


inner, wide = st.floats(0, 20, width=32), st.floats(2, 17, width=32)


@given(inner, inner, wide, wide)
def test_a_full_mask_is_its_box(x: float, y: float, width: float, height: float) -> None:
    """At an edge a full mask's value is one half: rows and columns are in by their centres."""
    box = np.array([x, y, x + width, y + height], np.float32)
    found = whole(np.ones((28, 28), np.float32), box, 0.5)
    for axis, length in ((1, SIZE[0]), (0, SIZE[1])):
        centres = np.arange(length) + 0.5
        clear = np.minimum(abs(centres - box[axis]), abs(centres - box[axis + 2])) > 1e-3
        inside = (centres > box[axis]) & (centres < box[axis + 2])
        assert np.array_equal(found.any(axis=axis)[clear], inside[clear])


def test_a_mask_of_its_boxes_own_size_is_itself() -> None:
    mask = some_mask(3)
    found = whole(mask, np.array([5, 7, 33, 35], np.float32), 0.5)
    expected = np.zeros(SIZE, np.bool_)
    expected[7:35, 5:33] = mask >= 0.5
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "box", [(4, 4, 4, 9), (4, 9, 9, 9), (9, 9, 4, 4), (50, 40, 60, 50), (-9, -9, -5, -5)]
)
def test_without_area_or_outside_there_is_nothing(box: tuple[int, ...]) -> None:
    mask = np.ones((28, 28), np.float32)
    assert not whole(mask, np.array(box, np.float32), 0.5).any()


def test_a_threshold_of_zero_takes_all() -> None:
    assert whole(some_mask(0), np.array([4, 4, 9, 9], np.float32), 0.0).all()


def test_only_about_the_box_is_computed() -> None:
    pasted = paste(some_mask(0), np.array([100, 200, 156, 256], np.float32), (4000, 6000), 0.5)
    assert pasted.pixels.shape[0] <= 64
    assert (pasted.top, pasted.left) >= (196, 96)
