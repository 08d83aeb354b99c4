"""Segmentation scores held against mmsegmentation's IoUMetric on the same masks.

Its numbers were written by mmsegmentation itself: tests/real_packages/mmsegmentation/iou_metric.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fdconv_deploy.evaluation.class_mapping import LabelRule
from fdconv_deploy.evaluation.compare import Evaluation, Target, evaluate
from fdconv_deploy.evaluation.datasets import Pair, Samples
from tests.evaluation.answers import labelled

CASES = Path(__file__).parents[1] / "real_packages" / "mmsegmentation" / "iou_metric"
NAMES = sorted(path.parent.name for path in CASES.glob("*/scores.json"))


def scored(folder: Path, tmp_path: Path, told: dict[str, Any]) -> Evaluation:
    """What ``fdconv evaluate`` makes of a target that gives the case's answers."""
    pairs, answers = [], []
    for mask in sorted(folder.glob("?.png")):
        answer = np.asarray(Image.open(folder / f"{mask.stem}_answer.png"))
        answers.append(answer)
        Image.new("RGB", answer.shape[::-1]).save(tmp_path / mask.name)
        pairs.append(Pair(tmp_path / mask.name, mask))
    mapping = told["label_map"] and {int(key): value for key, value in told["label_map"].items()}
    rule = LabelRule(
        told["classes"],
        mapping,
        told["reduce_zero_label"],
        told["ignore_index"],
    )
    samples = Samples(pairs, rule)
    samples.check()
    # The first image is answered twice: once before anything is timed.
    turn: Iterator[np.ndarray] = iter([answers[0], *answers])
    names = tuple(f"class {number}" for number in range(told["classes"]))
    target = Target("answers", lambda image: labelled(next(turn)), names, {"backend": "none"})
    return evaluate([target], samples)


def test_there_is_a_case_of_each_setting() -> None:
    assert NAMES == [
        "absent", "binary", "ignored_class", "mapped", "mapped_and_ignored", "plain", "reduced",
        "reduced_and_ignored",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_iou_metric(name: str, tmp_path: Path) -> None:
    told = json.loads((CASES / name / "scores.json").read_text())
    assert told["mmsegmentation"] == "1.2.2"
    (result,) = scored(CASES / name, tmp_path, told).results
    scores = result.score.scores
    # It counts in float32, and rounds its means to 0.01 %.
    for ours, theirs in ((scores.iou, told["IoU"]), (scores.accuracy, told["Acc"])):
        defined = [None if value != value else value for value in ours]
        assert defined == [v if v is None else pytest.approx(v, rel=1e-6) for v in theirs]
    assert scores.pixel_accuracy == pytest.approx(told["aAcc"], rel=1e-6)
    means = {
        "aAcc": scores.pixel_accuracy, "mIoU": scores.mean_iou, "mAcc": scores.mean_accuracy,
    }  # fmt: skip
    assert {key: round(value * 100, 2) for key, value in means.items()} == {
        key: pytest.approx(value, abs=1e-5) for key, value in told["metrics"].items()
    }


def test_a_class_that_is_nowhere_counts_in_no_mean(tmp_path: Path) -> None:
    """As there: one that is answered and never true is an IoU of 0, one in neither is none."""
    told = json.loads((CASES / "absent" / "scores.json").read_text())
    assert told["IoU"][3:] == [None, 0.0]
    (result,) = scored(CASES / "absent", tmp_path, told).results
    assert np.isnan(result.score.scores.iou[3])
    assert result.score.scores.iou[4] == 0
    assert result.score.scores.mean_iou == pytest.approx(np.nanmean(result.score.scores.iou))
    assert result.as_dict()["classes"][3]["iou"] is None


def test_an_order_of_classes_changes_no_score(tmp_path: Path) -> None:
    """A network with the same classes in another order scores the same."""
    told = json.loads((CASES / "plain" / "scores.json").read_text())
    turned = tuple(range(4, -1, -1))
    pairs = []
    answers = []
    for mask in sorted((CASES / "plain").glob("?.png")):
        answers.append(4 - np.asarray(Image.open(mask.with_name(f"{mask.stem}_answer.png"))))
        Image.new("RGB", answers[-1].shape[::-1]).save(tmp_path / mask.name)
        pairs.append(Pair(tmp_path / mask.name, mask))
    rule = replace(LabelRule(5), order=turned)
    turn = iter([answers[0], *answers])
    target = Target("turned", lambda image: labelled(next(turn)), ("e", "d", "c", "b", "a"), {})
    (result,) = evaluate([target], Samples(pairs, rule)).results
    assert result.score.scores.iou[::-1] == pytest.approx(told["IoU"])
