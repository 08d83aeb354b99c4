"""Errors of outputs."""

from __future__ import annotations

import numpy as np
import pytest
from fdconv_deploy.export.validation.comparison import compare_output

from fdconv_deploy.errors import ExportError

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def test_errors_are_the_largest_and_relative_to_the_largest():
    expected = array(2, 3, 4, 5)
    expected[0, 0, 0, 0] = -8
    actual = expected.copy()
    actual[1, 2, 3, 4] += 0.5
    found = compare_output("logits", actual, expected, classes=False)
    assert found.max_abs == pytest.approx(0.5)
    assert found.max_rel == pytest.approx(0.5 / 8)
    assert found.argmax_agreement is None


def test_share_of_equal_classes():
    expected = np.zeros((1, 3, 2, 5), np.float32)
    expected[0, 1] = 1
    actual = expected.copy()
    actual[0, 2, 0, :3] = 2
    assert compare_output("logits", actual, expected, classes=True).argmax_agreement == 0.7
    single = compare_output("logits", actual[:, :1], expected[:, :1], classes=True)
    assert single.argmax_agreement is None  # of one class there is nothing to choose


def test_answers_of_zeros():
    zero = np.zeros((1, 2), np.float32)
    assert compare_output("y", zero, zero, classes=False).max_rel == 0
    assert compare_output("y", zero + 2, zero, classes=False).max_rel == 2


@pytest.mark.parametrize(
    ("actual", "hint"),
    [
        (array(1, 4), r"'y'.*\(1, 4\).*network's is float32 \(1, 3\)"),
        (np.zeros((1, 3)), "float64"),
        (np.full((1, 3), np.nan, np.float32), "not finite"),
        (np.full((1, 3), np.inf, np.float32), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(actual, hint):
    with pytest.raises(ExportError, match=hint):
        compare_output("y", actual, np.zeros((1, 3), np.float32), classes=False)


def test_float64_may_be_expected_of_float32():
    expected = np.full((1, 2), 1 + 1e-9)
    found = compare_output("y", np.ones((1, 2), np.float32), expected, classes=False)
    assert found.max_abs == pytest.approx(1e-9, rel=1e-3)
