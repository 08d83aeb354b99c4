"""The packaged networks do not amplify noise, at any size, on any kind of frame.

Noise of 1e-6 of the prepared image's largest value changes logits by less than 1e-3 of the
largest, in float64 and in float32.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.stability import (
    NOISE,
    PHOTOGRAPHS,
    SIZES,
    TOLERANCE,
    both,
    frames,
    images_in,
    measure,
    perturbed,
    prepared,
    share,
)
from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.demo import packaged_checkpoint, packaged_detector, plain_checkpoint


@pytest.fixture(scope="module")
def network():
    return both(packaged_checkpoint())


@pytest.mark.parametrize(
    "size", [(64, 64), pytest.param((192, 256), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("checkpoint", [packaged_checkpoint, plain_checkpoint])
def test_packaged_segmentors_do_not_amplify_noise_on_any_frame(checkpoint, size):
    found = list(measure(both(checkpoint()), [size], 2, images_in(PHOTOGRAPHS), NOISE))
    assert len(found) == 14
    assert {each.frame for each in found} >= {"gray", "black", "white", "mean colour", "rocket.jpg"}
    for each in found:
        assert each.change <= TOLERANCE, each
        assert each.rounding <= 1e-4, each


@pytest.mark.parametrize("frame", ["scene 9000000", "gray"])
def test_packaged_segmentor_does_not_amplify_noise_at_the_trained_size(network, frame):
    found = measure(network, [(192, 256)], 1, [], NOISE, only=frame)
    assert [each.change <= TOLERANCE for each in found] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packaged_segmentor_does_not_amplify_noise_at_any_size(network, size):
    for each in measure(network, [size], 1, images_in(PHOTOGRAPHS), NOISE):
        assert each.change <= TOLERANCE, each


@pytest.mark.parametrize(
    "size", [(64, 64), pytest.param((512, 512), marks=pytest.mark.slow)], ids=str
)
@torch.no_grad()
def test_packaged_detector_does_not_amplify_noise(size):
    single = load_checkpoint(packaged_detector())
    double = load_checkpoint(packaged_detector()).double()
    preprocessing = single.architecture.preprocessing
    for name, frame in frames(size, preprocessing, 1, images_in(PHOTOGRAPHS)):
        x = prepared(preprocessing, frame)
        moved = perturbed(x, NOISE, seed=0)
        for network, dtype in ((single, torch.float32), (double, torch.float64)):
            levels, changed = (network.features(v.to(dtype)) for v in (x, moved))
            for level, other in zip(levels, changed, strict=True):
                assert share(other, level) <= TOLERANCE, name
