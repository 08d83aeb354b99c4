"""Attention statistics measured anew: nothing else changes, and a network is stable again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.stability import NOISE, TOLERANCE, measure
from examples.training.attention_statistics import FRAMES, KINDS, frames, recalibrate
from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.checkpoints.inspect import report_on
from fdconv_deploy.demo import packaged_checkpoint
from tests.checkpoints.test_attention_stability import narrowed, state_of


@pytest.fixture
def unstable():
    return narrowed(load_checkpoint(packaged_checkpoint()), 3)


def test_recalibration_makes_an_unstable_network_stable(unstable):
    assert report_on(state_of(unstable)).attention_stability.amplifies
    batches = frames(unstable.architecture.preprocessing, sizes=((64, 64), (96, 128)))
    before = {name: value.clone() for name, value in unstable.state_dict().items()}
    recalibrate(unstable, batches)
    after = unstable.state_dict()
    assert not unstable.training
    assert not any(module.training for module in unstable.modules())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed
    assert all(".KSM_Global.bn." in n and n.endswith(statistics) for n in changed)
    assert not report_on(state_of(unstable)).attention_stability.amplifies
    networks = {torch.float32: unstable, torch.float64: load_checkpoint(packaged_checkpoint())}
    networks[torch.float64].load_state_dict(after)
    networks[torch.float64].double()
    for each in measure(networks, [(64, 64)], 1, [], NOISE):
        assert each.change <= TOLERANCE, each


def test_frames_are_streets_and_odd_ones_of_every_size():
    network = load_checkpoint(packaged_checkpoint())
    preprocessing = network.architecture.preprocessing
    found = frames(preprocessing, sizes=((64, 96), (96, 64)))
    again = frames(preprocessing, sizes=((64, 96), (96, 64)))
    assert [tuple(batch.shape) for batch in found] == [(16, 3, 64, 96), (16, 3, 96, 64)]
    for batch, other in zip(found, again, strict=True):
        torch.testing.assert_close(batch, other, rtol=0, atol=0)
        spread = batch.std((2, 3)).amax(1)
        assert (spread[:FRAMES] > 0.1).all()
        flat = spread[FRAMES::2] < 0.2
        assert flat.all()


@pytest.mark.parametrize("make", set(KINDS), ids=lambda make: make.__name__)
def test_odd_frames_keep_the_size_and_depend_on_the_generator_alone(make):
    image = np.random.default_rng(1).uniform(0, 255, (48, 80, 3)).astype(np.float32)
    kept = image.copy()
    first, again, other = (make(np.random.default_rng(s), image) for s in (5, 5, 6))
    assert first.shape == image.shape
    assert first.dtype == np.float32
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(image, kept)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
