"""Images of other bands and heads with one output, beside mmsegmentation 1.2.2's own answers.

tests/real_packages/mmsegmentation_pixels wrote the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.checkpoints.loading import LoadedSegmentor
from fdconv_deploy.evaluation.networks import torch_target
from fdconv_deploy.runtime.images import load_image
from fdconv_deploy.runtime.preprocessing import check_image, normalise, published_size, resize
from tests.reference.segmentor import predict

FILES = Path(__file__).resolve().parents[1] / "real_packages" / "mmsegmentation_pixels"
NAMES = ("four", "gray", "rgba", "deep")


def read(name: str) -> tuple[LoadedSegmentor, np.ndarray, dict[str, Any]]:
    """The network, its image as a session would read it, and mmsegmentation's answers."""
    network = load_checkpoint(FILES / f"{name}.pth")
    assert isinstance(network, LoadedSegmentor)
    with np.load(FILES / f"{name}.npz") as found:
        answers = dict(found)
    if "raw" in answers:
        return network, answers["raw"], answers
    image = load_image(FILES / f"{name}.png", network.architecture.preprocessing)
    return network, image, answers


@pytest.mark.parametrize("name", NAMES)
def test_published_pixels_are_prepared_as_mmsegmentation_does(name: str) -> None:
    network, image, answers = read(name)
    how = network.architecture.preprocessing
    found = check_image(image, how)
    size = published_size(found.shape[0], found.shape[1], how)
    tensor = normalise(resize(found, *size), how)
    assert tensor.shape == answers["input"].shape
    assert np.abs(tensor - answers["input"]).max() <= 1e-6 * np.abs(answers["input"]).max()


@pytest.mark.parametrize("name", NAMES)
def test_published_labels_are_mmsegmentations(name: str) -> None:
    network, image, answers = read(name)
    target = torch_target(network, FILES / f"{name}.pth")
    labels = target.answer(image).labels
    assert set(np.unique(labels)) == {0, 1}
    score = answers["seg_logits"]  # of one output, its sigmoid
    head = network.architecture.decode_head
    threshold = head.label_threshold
    margin = np.abs(score[0] - (score[1] if threshold is None else threshold))
    different = labels != answers["labels"]
    assert different.mean() <= 0.002
    assert margin[different].max(initial=0) <= 1e-3
    assert len(target.classes) == 2


def test_published_heads_are_told_by_the_config() -> None:
    heads = {
        name: load_checkpoint(FILES / f"{name}.pth").architecture.decode_head for name in NAMES
    }
    told = {name: (h.num_classes, h.outputs, h.label_threshold) for name, h in heads.items()}
    assert told == {
        "four": (2, 1, 0.3),  # mmsegmentation's own where there is no threshold
        "gray": (1, 1, 0.5),
        "rgba": (2, 2, None),  # whatever the loss
        "deep": (2, 1, 0.7),
    }


def test_published_logits_of_one_output_are_equal() -> None:
    network, _, answers = read("four")
    logits = predict(network, torch.from_numpy(answers["input"])[None])
    size = answers["labels"].shape
    resized = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
    found = resized.sigmoid()[0].numpy()
    assert found.shape == answers["seg_logits"].shape
    assert np.abs(found - answers["seg_logits"]).max() <= 2e-5


def test_published_padding_is_a_checkpoints_own() -> None:
    """Alone, it sees images as the published pipeline pads them."""
    _, image, _ = read("rgba")
    overrides = {"preprocessing.size_divisor": 32}
    network = load_checkpoint(FILES / "rgba.pth", overrides=overrides)
    assert isinstance(network, LoadedSegmentor)
    seen = []
    network.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[2:])))
    labels = torch_target(network, FILES / "rgba.pth").answer(image).labels
    height, width = published_size(*image.shape[:2], network.architecture.preprocessing)
    assert seen == [(-(-height // 32) * 32, -(-width // 32) * 32)]
    assert labels.shape == image.shape[:2]
