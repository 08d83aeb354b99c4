"""RoIAlign against published numbers and a float64 reference that samples point by point."""

from __future__ import annotations

import numpy as np
import onnx.backend.test.case.node.roialign as onnx_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdconv_deploy.config import RoIConfig
from fdconv_deploy.nn.detection.box_ops import RoIAlign, RoIExtractor, levels_of
from tests.nn.detection.published import node_case
from tests.reference import detection as reference

# mmcv, tests/test_ops/test_roi_align.py: 2×2 bins, 2 samples each way, scale 1, aligned.
# Map, box, bins, and the gradient of their sum.
MMCV = [
    (
        [[[1, 2], [3, 4]]],
        [0, 0, 1, 1],
        [[[1, 1.25], [1.5, 1.75]]],
        [[[3.0625, 0.4375], [0.4375, 0.0625]]],
    ),
    (
        [[[1, 2], [3, 4]], [[4, 3], [2, 1]]],
        [0, 0, 1, 1],
        [[[1, 1.25], [1.5, 1.75]], [[4, 3.75], [3.5, 3.25]]],
        [[[3.0625, 0.4375], [0.4375, 0.0625]]] * 2,
    ),
    (
        [[[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]],
        [0, 0, 3, 3],
        [[[1.9375, 4.75], [7.5625, 10.375]]],
        [
            [
                [0.47265625, 0.4296875, 0.4296875, 0.04296875],
                [0.4296875, 0.390625, 0.390625, 0.0390625],
                [0.4296875, 0.390625, 0.390625, 0.0390625],
                [0.04296875, 0.0390625, 0.0390625, 0.00390625],
            ]
        ],
    ),
]


@pytest.mark.parametrize(("feature", "box", "bins", "gradient"), MMCV)
def test_mmcv_numbers(feature, box, bins, gradient):
    x = torch.tensor([feature], dtype=torch.float32, requires_grad=True)
    y = RoIAlign(2, 1.0, 2)(x, torch.tensor([[box]], dtype=torch.float32))
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([bins], dtype=torch.float32))
    torch.testing.assert_close(x.grad, torch.tensor([gradient], dtype=torch.float32))


def test_detectron2_numbers():
    """tests/layers/test_roi_align.py: 0 to 24 in a square, as many samples as pixels."""
    x = torch.arange(25.0).reshape(1, 1, 5, 5)
    y = RoIAlign(4, 1.0)(x, torch.tensor([[[1.0, 1, 3, 3]]]))
    rows = torch.tensor([4.5, 7.0, 9.5, 12.0])
    torch.testing.assert_close(y[0, 0], rows[:, None] + torch.tensor([0.0, 0.5, 1.0, 1.5]))


def test_onnx_numbers(monkeypatch):
    case = onnx_cases.RoiAlign.export_roialign_aligned_true
    attributes, (x, rois, images), (expected,) = node_case(monkeypatch, onnx_cases, case)
    assert attributes["coordinate_transformation_mode"].s == b"half_pixel"
    assert not images.any()
    layer = RoIAlign(attributes["output_height"].i, attributes["spatial_scale"].f, 2)
    y = layer(torch.from_numpy(x), torch.from_numpy(rois)[None])
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-4)  # printed to four places


coordinates = st.floats(-30, 90, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    box=st.tuples(coordinates, coordinates, coordinates, coordinates),
    bins=st.integers(1, 4),
    scale=st.sampled_from([1.0, 0.25, 1 / 32]),
    ratio=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_equals_the_reference(size, box, bins, scale, ratio, seed):
    feature = np.random.default_rng(seed).normal(size=(2, *size))
    x1, y1, x2, y2 = box
    box = np.array([min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)])
    y = RoIAlign(bins, scale, ratio)(torch.from_numpy(feature)[None], torch.tensor(box)[None, None])
    expected = reference.roi_align(feature, box, bins, scale, ratio)
    np.testing.assert_allclose(y[0].numpy(), expected, atol=1e-12)


def test_regions_see_their_own_image_only():
    x = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    boxes = torch.tensor([[[0.0, 0, 8, 8], [1, 1, 5, 5]], [[0, 0, 8, 8], [2, 2, 2, 2]]])
    y = RoIAlign(2, 1.0)(x, boxes)
    assert y.shape == (4, 3, 2, 2)
    assert [float(region.mean()) for region in y] == [0, 0, 1, 0]  # the last one is empty
    assert RoIAlign(2, 1.0)(x, boxes[:, :0]).shape == (0, 3, 2, 2)


def test_gradient():
    x = torch.randn(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[[1.0, 2, 9, 12]], [[-5, 0, 30, 4]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: RoIAlign(3, 0.5)(x, boxes), (x,))


def test_levels():
    sizes = [0, 30, 111.9, 112.1, 223, 225, 447, 449, 5000]
    boxes = torch.tensor([[10.0, 20, 10 + s, 20 + s] for s in sizes])
    levels = levels_of(boxes, RoIConfig())
    assert levels.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert levels[1:].tolist() == [reference.level(box.numpy()) for box in boxes[1:]]


@pytest.mark.parametrize("ratio", [0, 2])
def test_each_region_comes_from_its_level(ratio):
    """With a fixed number of samples, too, where an empty region is not empty by itself."""
    strides = (4, 8)
    levels = [torch.randn(1, 3, 64 // s, 64 // s, dtype=torch.float64) for s in strides]
    config = RoIConfig(featmap_strides=strides, output_size=3, finest_scale=8, sampling_ratio=ratio)
    boxes = torch.tensor([[3.0, 4, 15, 11], [5, 6, 60, 33], [0, 0, 64, 64]], dtype=torch.float64)
    y = RoIExtractor(config)(levels, boxes[None])
    for region, box in zip(y, boxes, strict=True):
        level = reference.level(box.numpy(), finest=8, levels=2)
        expected = reference.roi_align(
            levels[level][0].numpy(), box.numpy(), 3, 1 / strides[level], ratio
        )
        np.testing.assert_allclose(region.numpy(), expected, atol=1e-12)
