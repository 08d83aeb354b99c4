"""Scores against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fdconv_deploy.evaluation.metrics import confusion_matrix, scores


def test_by_hand():
    truth = np.array([[0, 0, 1], [1, 2, 255]])
    prediction = np.array([[0, 1, 1], [1, 0, 2]])
    matrix = confusion_matrix(truth, prediction, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    result = scores(matrix)
    # class 0: 1 of {0,0} ∪ {0,0}; class 1: 2 of 3; class 2: never hit.
    assert result.iou == pytest.approx((1 / 3, 2 / 3, 0.0))
    assert result.mean_iou == pytest.approx(1 / 3)
    assert result.pixel_accuracy == pytest.approx(3 / 5)


def test_a_class_in_neither_is_left_out_of_the_mean():
    result = scores(confusion_matrix([0, 0, 1], [0, 0, 1], 3))
    assert result.mean_iou == 1.0
    assert math.isnan(result.iou[2])


def test_matrices_add_up():
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 5, (2, 4, 30, 40))
    whole = confusion_matrix(truth, prediction, 5)
    parts = sum(confusion_matrix(t, p, 5) for t, p in zip(truth, prediction, strict=True))
    np.testing.assert_array_equal(whole, parts)
    assert whole.sum() == truth.size


def test_uint8_labels_do_not_overflow():
    truth = np.full((8, 8), 20, np.uint8)
    assert confusion_matrix(truth, truth, 21)[20, 20] == 64


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [([0, 1], [0], "shape"), ([0, 1], [0, 2], "outside 0..1"), ([0, 1], [0, -1], "outside 0..1")],
)
def test_what_cannot_be_scored_is_refused(truth, prediction, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(truth, prediction, 2)


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="no pixels"):
        scores(np.zeros((3, 3), np.int64))


def test_against_a_loop_over_pixels():
    rng = np.random.default_rng(1)
    truth = rng.choice([0, 1, 2, 4, 255], (20, 30))  # class 3 is never true, 5 in neither
    prediction = rng.integers(0, 5, (20, 30))
    hits, true, found, right, counted = [0] * 6, [0] * 6, [0] * 6, 0, 0
    for t, p in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if t == 255:
            continue
        counted += 1
        right += t == p
        true[t] += 1
        found[p] += 1
        hits[t] += t == p
    result = scores(confusion_matrix(truth, prediction, 6))
    ious = [hits[c] / (true[c] + found[c] - hits[c]) for c in range(5)]
    accuracies = [hits[c] / true[c] for c in (0, 1, 2, 4)]
    assert result.iou[:5] == pytest.approx(ious)
    assert math.isnan(result.iou[5])
    assert math.isnan(result.accuracy[3])
    assert result.mean_iou == pytest.approx(sum(ious) / 5)
    assert result.mean_accuracy == pytest.approx(sum(accuracies) / 4)
    assert result.pixel_accuracy == pytest.approx(right / counted)
