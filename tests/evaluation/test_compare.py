"""Targets scored beside each other: the numbers, and that each sees the same images."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.config import TestMode
from fdconv_deploy.demo import held_out, packaged_checkpoint
from fdconv_deploy.errors import FDConvError
from fdconv_deploy.evaluation.class_mapping import LabelRule
from fdconv_deploy.evaluation.compare import Target, evaluate
from fdconv_deploy.evaluation.datasets import (
    DatasetError,
    Sample,
    Samples,
    SemanticScore,
    find_pairs,
)
from fdconv_deploy.evaluation.networks import bundle_target, torch_target
from fdconv_deploy.runtime import Segmentation, open_session
from tests.evaluation.answers import labelled
from tests.reference.segmentor import predict

NAMES = ("road", "sky", "car", "tree")


class Drawn(list[Sample]):
    """Samples without files."""

    score = SemanticScore


def made_up(count: int = 5, size: tuple[int, int] = (7, 9)) -> Drawn:
    """Images whose red channel is what a target answers, and truths."""
    rng = np.random.default_rng(5)
    made = []
    for index in range(count):
        image = rng.integers(0, 3, (*size, 3)).astype(np.uint8)
        made.append(Sample(f"{index}", image, rng.integers(-1, 4, size)))
    return Drawn(made)


def reading(channel: int, log: list[str] | None = None, name: str = "target") -> Target:
    """A target that answers one of the image's channels."""

    def answer(image: np.ndarray) -> Segmentation:
        if log is not None:
            log.append(name)
        return labelled(image[:, :, channel], 0.5)

    return Target(name, answer, NAMES, {"backend": "none", "mode": "whole"})


def test_scores_are_those_of_a_plain_loop():
    samples = made_up()
    evaluation = evaluate([reading(0)], samples)
    hits, true, found = np.zeros(4), np.zeros(4), np.zeros(4)
    for sample in samples:
        for y in range(sample.truth.shape[0]):
            for x in range(sample.truth.shape[1]):
                t, p = sample.truth[y, x], sample.image[y, x, 0]
                if t < 0:
                    continue
                true[t] += 1
                found[p] += 1
                hits[t] += t == p
    (result,) = evaluation.results
    expected = hits / (true + found - hits)
    scores = result.score.scores
    assert scores.iou == pytest.approx(expected.tolist())
    assert scores.mean_iou == pytest.approx(expected.mean())
    assert scores.pixel_accuracy == pytest.approx(hits.sum() / true.sum())
    assert evaluation.truth["pixels"] == true.sum()
    assert evaluation.images == 5


def test_targets_take_turns_and_see_the_first_image_once_before():
    log: list[str] = []
    done: list[int] = []
    targets = [reading(0, log, "a"), reading(1, log, "b"), reading(0, log, "c")]
    evaluation = evaluate(targets, made_up(4), progress=done.append)
    assert log == list("abc" + "abc" + "bca" + "cab" + "abc")
    assert done == [1, 2, 3, 4]
    assert [len(result.seconds) for result in evaluation.results] == [4, 4, 4]
    same = np.mean([sample.image[:, :, 0] == sample.image[:, :, 1] for sample in made_up(4)])
    assert [one.agreement for one in evaluation.results] == pytest.approx([1, same, 1])


def test_the_report_says_what_is_not_defined():
    sample = Sample("a", np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3), np.int64))
    report = evaluate([reading(0)], Drawn([sample])).as_dict()
    (side,) = report["sides"]
    assert side["classes"][0] == {"name": "road", "iou": 1.0, "accuracy": 1.0, "pixels": 6}
    assert side["classes"][1]["iou"] is None
    assert side["milliseconds"]["inference_median"] == 500
    assert report["images"] == 1
    assert side["agreement"] == 1


def test_what_cannot_be_scored_is_refused():
    blank = [Sample("a", np.zeros((2, 3, 3), np.uint8), np.full((2, 3), -1))]
    with pytest.raises(DatasetError, match="No pixel counts"):
        evaluate([reading(0)], Drawn(blank))
    other = Target("other", reading(0).answer, NAMES[:2], {})
    with pytest.raises(
        DatasetError, match="target has 4 classes, the other 2, and number 2 is 'car'"
    ):
        evaluate([reading(0), other], made_up())


def test_a_bundle_beside_pytorch(streets):
    folder = held_out()[0][0].parent
    samples = Samples(find_pairs(folder, folder)[:6], LabelRule(11))
    network = load_checkpoint(packaged_checkpoint())
    with open_session(streets) as session:
        targets = [
            bundle_target(session),
            torch_target(network, packaged_checkpoint(), sizes=session.sizes),
            torch_target(network, packaged_checkpoint()),
        ]
        evaluation = evaluate(targets, samples)
    exported, eager, published = (result.score.scores for result in evaluation.results)
    assert exported.mean_iou == pytest.approx(eager.mean_iou, abs=1e-4)
    assert evaluation.results[1].agreement > 0.9999
    # At the size it was trained for, as the training record has it, and not at a smaller one.
    assert published.mean_iou > 0.7 > exported.mean_iou > 0.1


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_pytorch_targets_are_the_published_inference(sliding, mode):
    network = load_checkpoint(sliding[0])
    image = np.random.default_rng(2).integers(0, 256, (90, 150, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 4)
    # As mmsegmentation: keep-ratio resize to (256, 128), normalise, predict, resize, argmax.
    resized = cv2.resize(image, (213, 128), interpolation=cv2.INTER_LINEAR)
    preprocessing = network.architecture.preprocessing
    x = (resized - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    x = torch.from_numpy(x).permute(2, 0, 1)[None].float()
    crop = network.architecture.test
    logits = predict(network, x, crop if mode == "slide" else TestMode(mode="whole"))
    logits = torch.nn.functional.interpolate(logits, (90, 150), mode="bilinear")
    expected = logits[0].argmax(0).numpy()
    labels = torch_target(network, sliding[0], mode=mode).answer(image).labels
    assert (labels == expected).mean() > 0.9995
    assert len(np.unique(expected)) > 1


def test_slide_beside_pytorch(sliding):
    checkpoint, bundle = sliding
    rng = np.random.default_rng(3)
    samples = [
        Sample("a", cv2.GaussianBlur(picture, (0, 0), 3), rng.integers(0, 3, (100, 120)))
        for picture in rng.integers(0, 256, (2, 100, 120, 3)).astype(np.uint8)
    ]
    with open_session(bundle) as session:
        network = load_checkpoint(checkpoint)
        targets = [
            bundle_target(session),
            torch_target(network, checkpoint, sizes=session.sizes),
        ]
        assert [target.details["mode"] for target in targets] == ["slide", "slide"]
        evaluation = evaluate(targets, Drawn(samples))
        whole = evaluate([bundle_target(session, mode="whole")], Drawn(samples))
    assert evaluation.results[1].agreement > 0.999
    assert not np.array_equal(
        whole.results[0].score.confusion, evaluation.results[0].score.confusion
    )


def test_a_network_without_a_crop_cannot_slide():
    network = load_checkpoint(packaged_checkpoint())
    with pytest.raises(FDConvError, match="records no crop to slide"):
        torch_target(network, packaged_checkpoint(), mode="slide")


def test_classes_in_another_order_are_shown_where_they_differ():
    answer = reading(0).answer
    targets = [
        Target("one", answer, tuple("abcdef"), {}),
        Target("two", answer, tuple("abcedf"), {}),
    ]
    with pytest.raises(DatasetError, match="number 3 is 'd' in one and 'e' in the other"):
        evaluate(targets, made_up())
