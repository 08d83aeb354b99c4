"""Delta coding and anchors against published numbers and a float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.instances.targets import encode
from fdconv_deploy.config import BoxCoderConfig, RPNHeadConfig
from fdconv_deploy.nn.detection.box_ops import anchors_at, clip, decode
from tests.reference import detection as reference

RCNN = BoxCoderConfig(stds=(0.1, 0.1, 0.2, 0.2))


def test_mmdetection_numbers():
    """tests/test_utils/test_coder.py of 2.28: decoded and clipped to 32×32."""
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [5, 5, 5, 5]])
    deltas = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 2, -1], [0.7, -1.9, -0.5, 0.3]])
    expected = torch.tensor(
        [
            [0.0, 0, 1, 1],
            [0.1409, 0.1409, 2.8591, 2.8591],
            [0, 0.3161, 4.1945, 0.6839],
            [5, 5, 5, 5],
        ]
    )
    found = clip(decode(boxes, deltas, BoxCoderConfig())[None], torch.tensor([[32.0, 32.0]]))
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)


numbers = st.floats(-9, 9, allow_nan=False)
positive = st.floats(0.5, 300, allow_nan=False)


@settings(max_examples=100, deadline=None)
@given(
    corner=st.tuples(numbers, numbers),
    size=st.tuples(positive, positive),
    delta=st.tuples(numbers, numbers, numbers, numbers),
    coder=st.sampled_from([BoxCoderConfig(), RCNN, BoxCoderConfig(means=(0.1, -0.2, 0.3, 0))]),
)
def test_decode_equals_the_reference(corner, size, delta, coder):
    box = np.array([*corner, corner[0] + size[0], corner[1] + size[1]])
    found = decode(torch.tensor(box), torch.tensor(delta, dtype=torch.float64), coder)
    # The coder's numbers are Python's, so float64 holds them as the reference does.
    expected = reference.decode(box, np.array(delta), np.array(coder.means), np.array(coder.stds))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    one=st.tuples(numbers, numbers, positive, positive),
    other=st.tuples(numbers, numbers, positive, positive),
)
def test_encode_is_undone_by_decode(one, other):
    pair = torch.tensor([one, other], dtype=torch.float64)
    boxes = torch.cat([pair[:, :2], pair[:, :2] + pair[:, 2:]], dim=1)
    deltas = encode(boxes[0], boxes[1], RCNN)
    ratio = pair[1, 2:] / pair[0, 2:]
    if ((ratio < 60) & (ratio > 1 / 60)).all():  # growth is limited to 62.5
        torch.testing.assert_close(decode(boxes[0], deltas, RCNN), boxes[1])


def test_growth_is_limited():
    boxes = torch.tensor([0.0, 0, 2, 2])
    grown = decode(boxes, torch.tensor([0.0, 0, 50, -50]), BoxCoderConfig())
    assert (grown[2] - grown[0]).item() == pytest.approx(2 * 62.5)
    assert (grown[3] - grown[1]).item() == pytest.approx(2 / 62.5)


def test_clip_is_of_each_image():
    boxes = torch.tensor([[[-5.0, 3, 70, 40]], [[-5, 3, 70, 40]]])
    sizes = torch.tensor([[32.0, 64.0], [128.0, 50.0]])  # height, width
    assert clip(boxes, sizes).tolist() == [[[0, 3, 64, 32]], [[0, 3, 50, 40]]]


def test_anchors_of_mmdetections_example():
    """The docstring of its AnchorGenerator: stride 16, base size 9, two by two positions."""
    config = RPNHeadConfig(scales=(9 / 16,), ratios=(1.0,), strides=(16,))
    assert anchors_at(torch.arange(4), config, 0, 2).tolist() == [
        [-4.5, -4.5, 4.5, 4.5],
        [11.5, -4.5, 20.5, 4.5],
        [-4.5, 11.5, 4.5, 20.5],
        [11.5, 11.5, 20.5, 20.5],
    ]


def test_published_anchors():
    config = RPNHeadConfig(scales=(8.0,), ratios=(0.5, 1.0, 2.0), strides=(4,))
    anchors = anchors_at(torch.arange(3), config, 0, 1).numpy()
    assert anchors.dtype == np.float32
    sizes = anchors[:, 2:] - anchors[:, :2]
    np.testing.assert_allclose(sizes.prod(1), 32 * 32, rtol=1e-6)
    np.testing.assert_allclose(sizes[:, 1] / sizes[:, 0], [0.5, 1, 2], rtol=1e-6)
    # Positions row by row, and at each position all ratios; scales within ratios.
    wide = RPNHeadConfig(scales=(1.0, 2.0), ratios=(1.0, 4.0), strides=(8,))
    grid = anchors_at(torch.arange(24), wide, 0, 3).reshape(2, 3, 4, 4).numpy()
    np.testing.assert_array_equal(grid[1, 2] - grid[0, 0], np.tile([16, 8, 16, 8], (4, 1)))
    assert (grid[0, 0, :, 2] - grid[0, 0, :, 0]).tolist() == [8, 16, 4, 8]
