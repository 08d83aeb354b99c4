"""Non-maximum suppression against published numbers and a float64 reference."""

from __future__ import annotations

import numpy as np
import onnx.backend.test.case.node.nonmaxsuppression as onnx_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdconv_deploy.nn.detection.box_ops import EXCLUDED, BestScores, NonMaxSuppression, set_apart
from tests.nn.detection.published import node_case
from tests.reference import detection as reference


def kept(boxes, scores, threshold, limit=1000):
    """Indices that stay, best first, of one image."""
    boxes, scores = torch.as_tensor(boxes)[None], torch.as_tensor(scores)[None]
    keep = NonMaxSuppression(threshold, limit)(boxes, scores)
    best, indices = BestScores(limit)(torch.where(keep, scores, EXCLUDED))
    return indices[best > EXCLUDED].tolist()


def test_mmcv_numbers():
    """tests/test_ops/test_nms.py."""
    boxes = np.float32([[6, 3, 8, 7], [3, 6, 9, 11], [3, 7, 10, 12], [1, 4, 13, 7]])
    assert kept(boxes, np.float32([0.6, 0.9, 0.7, 0.2]), 0.3) == [1, 0, 3]


def test_mmcv_example():
    """The docstring of mmcv.ops.nms: three of seven stay."""
    boxes = np.float32(
        [
            [49.1, 32.4, 51.0, 35.9],
            [49.3, 32.9, 51.0, 35.3],
            [49.2, 31.8, 51.0, 35.4],
            [35.1, 11.5, 39.1, 15.7],
            [35.6, 11.8, 39.3, 14.2],
            [35.3, 11.5, 39.9, 14.5],
            [35.2, 11.7, 39.7, 15.7],
        ]
    )
    scores = np.float32([0.9, 0.9, 0.5, 0.5, 0.5, 0.4, 0.3])
    assert len(kept(boxes, scores, 0.6)) == 3


CASES = [
    "suppress_by_IOU",
    "limit_output_size",
    "single_box",
    "identical_boxes",
    "iou_threshold_boundary",
]


@pytest.mark.parametrize("name", CASES)
def test_onnx_numbers(monkeypatch, name):
    export = getattr(onnx_cases.NonMaxSuppression, f"export_nonmaxsuppression_{name}")
    _, inputs, (expected,) = node_case(monkeypatch, onnx_cases, export)
    boxes, scores, limit, threshold, _ = inputs
    found = kept(boxes[0], scores[0, 0], float(threshold[0]), int(limit[0]))
    assert found == expected[:, 2].tolist()


# A coarse grid, so that equal boxes, equal scores and IoUs of exactly 1/2 do occur.
sides = st.integers(0, 8).map(float)
candidate = st.tuples(sides, sides, sides, sides, st.integers(0, 4), st.integers(0, 2))


@settings(max_examples=200, deadline=None)
@given(st.lists(candidate, max_size=30), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_equals_the_reference(candidates, threshold):
    """Groups set apart by a shift are as good as groups apart."""
    table = np.array(candidates, np.float64).reshape(-1, 6)
    corners = np.stack([table[:, :2], table[:, 2:4]])
    boxes = np.concatenate([corners.min(0), corners.max(0)], axis=1)
    scores, groups = table[:, 4] / 4, table[:, 5].astype(int)
    if len(table):
        apart = set_apart(*map(torch.from_numpy, (boxes[None], groups, scores[None])))[0]
        assert kept(apart, scores, threshold) == reference.suppress(
            boxes, scores, groups, threshold
        )


def test_excluded_boxes_take_no_part():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 900, 900]]])
    scores = torch.tensor([[EXCLUDED, 0.0, EXCLUDED]])
    assert NonMaxSuppression(0.5, 5)(boxes, scores).tolist() == [[False, True, False]]
    shifted = set_apart(boxes, torch.tensor([0, 1, 1]), scores)
    assert shifted[0, 1].tolist() == [11, 11, 21, 21]  # not by what the excluded one reaches


def test_groups_that_repeat():
    boxes, scores = torch.rand(2, 6, 4) * 100, torch.rand(2, 6)
    written_out = set_apart(boxes, torch.tensor([0, 1, 2, 0, 1, 2]), scores)
    assert torch.equal(set_apart(boxes, torch.arange(3), scores), written_out)


def test_images_are_apart():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]).repeat(2, 1, 1)
    scores = torch.tensor([[0.5, 0.9, 0.1], [0.9, 0.5, 0.1]])
    assert NonMaxSuppression(0.5, 5)(boxes, scores).tolist() == [
        [False, True, True],
        [True, False, True],
    ]
    assert NonMaxSuppression(0.5, 1)(boxes, scores).sum().item() == 2


def test_equal_scores_keep_their_order():
    scores = torch.full((1, 5000), 0.25)
    values, indices = BestScores(4000)(scores)
    assert indices[0].tolist() == list(range(4000))
    assert values.shape == (1, 4000)
