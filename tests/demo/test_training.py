"""The training script: the twins start alike, see the same batches, stop and go on."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from examples.streets import package
from examples.streets.data import batch_of
from examples.streets.network import TWINS, architecture, continue_from
from examples.streets.scenes import draw_scene
from examples.streets.schedule import Recipe, rate
from examples.streets.train import train
from examples.training.attention_statistics import frames
from examples.training.layers import FastSpectrum, dynamic_layers
from fdconv_deploy.demo import HELD_OUT_SEEDS
from fdconv_deploy.nn import Segmentor


@pytest.fixture
def tiny():
    recipe = Recipe(steps=6, batch=2, crop=(64, 64), second_crop=(64, 96), warm_up=1, scenes=3)
    drawn = [draw_scene(seed, 96, 128) for seed in range(3)]
    return recipe, (np.stack([s[0] for s in drawn]), np.stack([s[1] for s in drawn]))


def test_an_fdconv_twin_starts_as_the_base():
    torch.manual_seed(0)
    base = Segmentor(architecture("plain")).eval()
    twin = Segmentor(architecture("fdconv")).eval()
    continue_from(twin, base.state_dict())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = base(x), twin(x)
    assert (expected - found).abs().max() <= 1e-3 * expected.abs().max()


def test_fast_spectrum_is_the_layers_own():
    torch.manual_seed(0)
    layers = dynamic_layers(Segmentor(architecture("fdconv")))
    attention = torch.rand(3, 16, requires_grad=True)
    for layer in list(layers.values())[:6]:
        own = layer.modulated_spectrum(attention)
        fast = FastSpectrum(layer)(attention)
        torch.testing.assert_close(fast, own, rtol=1e-6, atol=0)
        other = torch.randn_like(own)
        gradients = [
            torch.autograd.grad((y * other).sum(), [attention, layer.dft_weight])
            for y in (own, fast)
        ]
        for first, second in zip(*gradients, strict=True):
            torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-2)


def test_a_batch_depends_on_seed_and_step_alone(tiny):
    recipe, scenes = tiny
    first, again = batch_of(recipe, 1, scenes), batch_of(recipe, 1, scenes)
    assert first[0].shape == (2, 3, 64, 64)
    assert first[1].shape == (2, 64, 64)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(first[0], batch_of(recipe, 2, scenes)[0])
    assert batch_of(recipe, recipe.turn, scenes)[0].shape == (2, 3, 64, 96)


def test_rate_rises_falls_and_starts_anew():
    recipe = Recipe(steps=900, warm_up=50)
    rates = [rate(recipe, step) for step in range(recipe.steps)]
    assert max(rates[:600]) == pytest.approx(recipe.learning_rate)
    assert max(rates[600:]) == pytest.approx(recipe.second_learning_rate)
    assert rates[599] < 1e-5 < rates[0]
    assert rates[-1] < 1e-5


def test_stops_goes_on_and_compares(tiny, tmp_path, monkeypatch):
    recipe, scenes = tiny
    assert not train("base", recipe, scenes, tmp_path, minutes=0)
    assert train("base", recipe, scenes, tmp_path, minutes=9)
    with pytest.raises(SystemExit, match="another recipe"):
        train("base", replace(recipe, seed=1), scenes, tmp_path, minutes=9)
    for name in TWINS:
        assert train(name, recipe, scenes, tmp_path, minutes=9)
    seeds = HELD_OUT_SEEDS[:2]
    monkeypatch.setattr(package, "HELD_OUT_SEEDS", seeds)
    monkeypatch.setattr(package, "EVALUATION_SEEDS", seeds)
    monkeypatch.setattr(package, "frames", partial(frames, sizes=((64, 64),)))
    package.evaluate(recipe, tmp_path, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert {n["steps"] for n in record["networks"].values()} == {recipe.steps}
    assert (tmp_path / "out" / "streets.pth").stat().st_size < 6 * 2**20
    assert len(list((tmp_path / "out" / "heldout").iterdir())) == 4
