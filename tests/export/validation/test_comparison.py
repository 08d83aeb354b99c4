"""Errors of outputs; what counts as the same objects, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.validation.comparison import (
    Comparison,
    compare_detections,
    compare_output,
    perturbed,
)
from fdconv_deploy.runtime.manifest import OutputParity


def answer(rows: list[tuple], places: int = 4) -> dict[str, np.ndarray]:
    """One image's ``(label, score, x1, y1, x2, y2)``, padded."""
    found = {
        "boxes": np.zeros((1, places, 4), np.float32),
        "scores": np.zeros((1, places), np.float32),
        "labels": np.zeros((1, places), np.int64),
        "count": np.array([len(rows)]),
        "masks": np.zeros((1, places, 2, 2), np.float32),
    }
    for place, (label, score, *box) in enumerate(rows):
        found["labels"][0, place], found["scores"][0, place] = label, score
        found["boxes"][0, place], found["masks"][0, place] = box, score
    return found


A = (1, 0.9, 0, 0, 40, 40)
B = (2, 0.5, 0, 0, 40, 40)
C = (1, 0.4, 50, 50, 90, 90)


def parity(actual, expected, score_thr=0.05):
    found = compare_detections(answer(actual), answer(expected), score_thr)
    return {output.name: output for output in found}


def test_equal_answers():
    found = parity([A, B, C], [A, B, C])
    assert list(found) == ["boxes", "scores", "labels", "count", "masks"]
    assert all(output.max_abs == output.max_rel == 0 for output in found.values())
    assert found["labels"].argmax_agreement == 1
    assert parity([], [])["labels"].argmax_agreement == 1


def test_errors_are_of_the_same_objects_whatever_their_order():
    near = (1, 0.50001, 50, 50, 90, 90.1)
    far = (2, 0.50002, 0, 0, 40, 40)
    found = parity([A, far, near], [A, near, B])
    assert found["boxes"].max_abs == 0
    assert found["scores"].max_abs == pytest.approx(2e-5, rel=0.01)
    assert found["masks"].max_abs == pytest.approx(2e-5, rel=0.01)
    moved = (1, 0.9, 0, 0, 40, 40.5)
    assert parity([moved, B], [A, B])["boxes"].max_abs == 0.5
    assert parity([moved, B], [A, B])["boxes"].max_rel == 0.5 / 40


@pytest.mark.parametrize(
    ("actual", "expected", "hint"),
    [
        ([A], [A, C], r"network finds class 1 at \(50.0, 50.0, 90.0, 90.0\).*graph does not"),
        ([A, C], [A], r"graph finds class 1 at .*0\.4000.*network does not"),
        ([(3, *A[1:])], [A], "class 3"),  # another class
        ([(1, 0.9, 0, 0, 40, 30)], [A], "class 1"),  # another place
        ([A, A], [A], "graph finds class 1"),  # once too often
        ([C, A], [C, A], "not in the order"),
    ],
)
def test_other_objects_are_refused(actual, expected, hint):
    with pytest.raises(ExportError, match=hint):
        parity(actual, expected)


def test_edges():
    """What rounding may show or not: at the threshold, and at the last of all places."""
    faint = (3, 0.05001, 0, 0, 9, 9)
    assert parity([A, faint], [A])["labels"].argmax_agreement == 0.5
    with pytest.raises(ExportError, match="class 3"):
        parity([A, faint], [A], score_thr=0.01)
    last, other = (1, 0.3, 0, 50, 9, 59), (2, 0.30005, 0, 60, 9, 69)
    assert parity([A, B, C, last], [A, B, C, other])["labels"].argmax_agreement == 0.75
    with pytest.raises(ExportError, match="network finds class 2"):
        parity([A, B, C, last], [A, B, C, (2, 0.35, 0, 60, 9, 69)])
    with pytest.raises(ExportError, match="graph finds class 1"):
        parity([A, B, last], [A, B, other])  # a place is left


def test_rounding_explains_what_the_network_finds_now_and_then():
    """An object on one side only, beside what the network answers to images changed a little."""

    def ask(actual, expected, *others):
        asked.clear()

        def answers():
            for rows in others:
                asked.append(rows)
                yield answer(rows)

        found = compare_detections(answer(actual), answer(expected), 0.05, answers())
        return {output.name: output for output in found}["labels"].argmax_agreement

    asked = []
    assert ask([A, C], [A, C], [A]) == 1
    assert not asked  # without need nothing is asked for
    assert ask([A, C], [A], [A], [A, C], [A]) == 0.5
    assert len(asked) == 2  # the second try has it
    assert ask([A], [A, C], [A, C], [A, B, C], [A]) == 0.5
    moved = (1, 0.9, 0, 0, 40, 36)
    assert ask([moved, C], [A, C], [A, C], [moved, C]) == 0.5
    with pytest.raises(ExportError, match=r"graph finds class 1.*never finds it.*in 2 of 2 tries"):
        ask([A, C], [A], [A], [A, B])
    with pytest.raises(ExportError, match=r"network finds class 1.*finds it when.*1 of 1 tries"):
        ask([A], [A, C], [A, C])
    with pytest.raises(ExportError, match="class 3"):  # one of two is not explained
        ask([A, (3, 0.7, 0, 0, 9, 9)], [A, C], [A], [A, C])


def test_images_are_changed_by_a_millionth_and_nothing_else_is():
    feed = {"images": np.float32([[0, 1, -200]]), "sizes": np.float32([[8, 9]])}
    changed = list(perturbed(lambda given: given, feed))
    assert len(changed) == 6
    for given in changed:
        assert given["sizes"] is feed["sizes"]
        assert given["images"].dtype == np.float32
        difference = np.abs(given["images"] - feed["images"])
        assert difference[0, 0] == 0  # padding stays padding
        assert 0 < difference.max() <= 200 * 1.1e-6
    assert len({given["images"].tobytes() for given in changed}) == 6


def test_padding_and_numbers():
    expected = answer([A])
    for name in ("boxes", "scores", "labels", "masks"):
        stained = answer([A])
        stained[name][0, 2] = 1
        with pytest.raises(ExportError, match=rf"'{name}'.*not empty|not in the order"):
            compare_detections(stained, expected, 0.05)
    broken = answer([A])
    broken["boxes"][0, 0, 0] = np.nan
    with pytest.raises(ExportError, match=r"'boxes'.*not finite"):
        compare_detections(broken, expected, 0.05)
    broken = answer([A]) | {"count": np.array([9])}
    with pytest.raises(ExportError, match="counts 9"):
        compare_detections(broken, expected, 0.05)


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


def test_masks_may_err_ten_times_a_score_and_only_a_detectors():
    masks = OutputParity(name="masks", max_abs=5e-4, max_rel=5e-4)
    assert Comparison("detections").error(masks, "fp32") == pytest.approx(5e-5)
    assert Comparison("values").error(masks, "fp32") == 5e-4
    classes = OutputParity(name="logits", max_abs=1, max_rel=0.3, argmax_agreement=0.98)
    assert Comparison("classes").error(classes, "fp16") == 0.3
    assert Comparison("classes").error(classes, "int8") == pytest.approx(0.02)
