"""Detectors scored beside each other, against cases whose scores are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.streets.instances import CLASSES
from fdconv_deploy.evaluation.coco import (
    CocoSet,
    coco_results,
    find_coco,
    read_coco,
)
from fdconv_deploy.evaluation.compare import Target, evaluate
from fdconv_deploy.evaluation.datasets import DatasetError
from fdconv_deploy.evaluation.networks import bundle_target
from fdconv_deploy.runtime import Detection, open_session
from tests.evaluation.drawn_streets import as_found, drawn


@pytest.fixture(scope="module")
def data(street_set: Path) -> CocoSet:
    found = find_coco(street_set)
    assert found is not None
    return read_coco(*found)


def target(change: Callable[[Detection], Detection] = lambda d: d, name: str = "target") -> Target:
    """One that knows the drawn scenes, and answers with them after ``change``."""
    known = {image.tobytes(): as_found(things, image.shape[:2]) for image, things in drawn()}

    def answer(image: np.ndarray) -> Detection:
        return change(known[image.tobytes()])

    return Target(name, answer, CLASSES, {"backend": "none", "precision": "fp32"})


def scored(data: CocoSet, *changes: Callable[[Detection], Detection]):
    return evaluate([target(change) for change in changes], data)


def test_what_was_drawn_scores_one(data: CocoSet) -> None:
    evaluation = scored(data, lambda d: d)
    (result,) = evaluation.results
    assert (evaluation.images, evaluation.truth["objects"]) == (3, sum(len(t) for _, t in drawn()))
    assert result.score.boxes.ap == pytest.approx(1)
    assert result.score.boxes.ap50 == result.score.boxes.ap75 == pytest.approx(1)
    assert result.score.masks is not None
    assert result.score.masks.ap50 == pytest.approx(1)
    assert result.score.masks.ap > 0.9  # masks of 84 cells
    assert [c for c in result.score.boxes.classes if not math.isnan(c)] == pytest.approx([1, 1, 1])
    assert result.agreement == 1


def test_wrong_masks_in_right_boxes(data: CocoSet) -> None:
    hollow = scored(data, lambda d: replace(d, mask_probabilities=d.mask_probabilities * 0))
    (result,) = hollow.results
    assert result.score.boxes.ap == pytest.approx(1)
    assert result.score.masks is not None
    assert result.score.masks.ap == 0


def test_one_object_of_two_scores_as_counted_by_hand(street_set: Path, data: CocoSet) -> None:
    """Precision 1 up to a recall of one half: 51 of the 101 recalls that COCO samples."""
    truth = {**data.truth, "annotations": [
        {**entry, "category_id": 2, "id": n + 1}
        for n, entry in enumerate(e for e in data.truth["annotations"] if e["image_id"] == 1)
    ][:2]}  # fmt: skip
    truth["images"] = truth["images"][:1]
    two = replace(data, truth=truth)

    def one(found: Detection) -> Detection:
        return replace(found, labels=np.ones_like(found.labels)).kept(most=1)

    def both(found: Detection) -> Detection:
        return replace(found, labels=np.ones_like(found.labels)).kept(most=2)

    first, second = evaluate([target(one), target(both)], two).results
    assert first.score.boxes.ap == pytest.approx(51 / 101)
    assert first.score.boxes.recall == pytest.approx(0.5)
    assert second.score.boxes.ap == pytest.approx(1)
    assert [math.isnan(value) for value in first.score.boxes.classes] == [True, False, True]
    assert second.agreement == pytest.approx(2 / 3)  # one of one and one of two


def test_a_wrong_class_is_wrong(data: CocoSet) -> None:
    result, other = scored(
        data, lambda d: d, lambda d: replace(d, labels=(d.labels + 1) % 3)
    ).results
    assert other.score.boxes.ap == pytest.approx(0, abs=0.05)
    assert other.agreement == 0
    assert result.agreement == 1


def test_nothing_found(data: CocoSet) -> None:
    (result,) = scored(data, lambda d: d.kept(2.0)).results
    assert result.score.boxes.ap == 0
    assert len(result.score.found) == 0
    assert result.agreement == 1  # nothing is the same as nothing
    assert result.as_dict()["box"]["ap"] == 0


def test_areas_and_what_is_not_defined(data: CocoSet) -> None:
    (result,) = scored(data, lambda d: d).results
    areas = np.array([entry["area"] for entry in data.truth["annotations"]])
    for value, some in (
        (result.score.boxes.small, (areas < 32**2).any()),
        (result.score.boxes.medium, ((areas >= 32**2) & (areas < 96**2)).any()),
        (result.score.boxes.large, (areas >= 96**2).any()),
    ):
        assert math.isnan(value) != some
    told = result.as_dict()
    assert told["box"]["large"] is None
    assert [set(c) for c in told["classes"]] == [{"name", "box_ap", "mask_ap"}] * 3


def test_targets_take_turns(data: CocoSet) -> None:
    log: list[str] = []

    def logged(name: str) -> Target:
        made = target(name=name)

        def answer(image: np.ndarray) -> Detection:
            log.append(name)
            return made.answer(image)

        return replace(made, answer=answer)

    evaluate([logged("a"), logged("b")], data)
    assert log == list("ab" + "ab" + "ba" + "ab")


def test_results_are_cocos(data: CocoSet) -> None:
    image, things = drawn()[0]
    found = as_found(things, image.shape[:2])
    rows = coco_results(found, 7, (10, 20, 30), masks=True)
    assert [row["category_id"] for row in rows] == [(label + 1) * 10 for label in things.labels]
    assert {row["image_id"] for row in rows} == {7}
    assert np.allclose([row["bbox"] for row in rows], np.concatenate(
        [things.boxes[:, :2], things.boxes[:, 2:] - things.boxes[:, :2]], axis=1))  # fmt: skip
    assert [row["segmentation"] for row in rows] == found.rle()


def test_a_bundle(data: CocoSet, detector: Path) -> None:
    with open_session(detector, threads=1) as session:
        evaluation = evaluate([bundle_target(session)], data)
    (result,) = evaluation.results
    told = evaluation.as_dict()
    assert told["sides"][0]["size"] == [64, 96]
    assert told["sides"][0]["backend"] == "onnxruntime-cpu"
    assert len(result.score.found) > 0
    assert 0 <= result.score.boxes.ap < 0.5  # it answers the same whatever it sees


def test_other_classes(data: CocoSet) -> None:
    other = replace(target(), classes=("person", "car", "lamp"))
    with pytest.raises(DatasetError, match="number 2 is 'sign' in one and 'lamp' in the other"):
        evaluate([target(), other], data)
    with pytest.raises(DatasetError, match=r"class 'lamp' is none of the categories"):
        evaluate([other], data)
