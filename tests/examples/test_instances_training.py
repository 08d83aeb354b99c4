"""The detector's training: regions as the network cuts them, losses that fall, going on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.instances import train
from examples.instances.data import Truth, altered, as_scene, draw_scene
from examples.instances.losses import Regions, box_losses, mask_loss, proposal_losses
from examples.instances.regions import cut_out, extract
from examples.streets.instances import CLASSES, draw_instances
from examples.training.layers import dynamic_layers
from examples.training.run import cosine, load_state
from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.config import BoxCoderConfig, RoIConfig
from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.nn.detection.box_ops import RoIExtractor, decode

CODER = BoxCoderConfig(stds=(0.1, 0.1, 0.2, 0.2))


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed) for seed in range(2)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), samples=st.integers(1, 3))
def test_regions_are_those_the_network_cuts_out(seed, samples):
    generator = torch.Generator().manual_seed(seed)
    levels = [
        torch.randn(2, 5, 64 // stride, 96 // stride, generator=generator) for stride in (4, 8, 16)
    ]
    corners = torch.rand(2, 7, 2, 2, generator=generator).sort(2).values * torch.tensor([96, 64])
    boxes = corners.flatten(2)
    config = RoIConfig(featmap_strides=(4, 8, 16), finest_scale=14, sampling_ratio=samples)
    expected = RoIExtractor(config)(levels, boxes)
    torch.testing.assert_close(extract(levels, list(boxes), config), expected, rtol=0, atol=1e-4)


def test_each_box_from_its_own_map():
    maps = torch.rand(3, 1, 8, 8)
    boxes = torch.tensor([[0.0, 0, 8, 8]]).expand(3, 4)
    torch.testing.assert_close(cut_out(maps, boxes, 8, 1, 1), maps)


def test_a_scene_keeps_its_instances():
    rgb, found = draw_instances(5)
    truth = as_scene(rgb, found).truth()
    np.testing.assert_array_equal(truth.boxes, found.boxes)
    np.testing.assert_array_equal(truth.labels, found.labels)
    np.testing.assert_array_equal(truth.masks, found.masks)


def test_a_mirrored_scene_is_mirrored(scenes):
    before, after = scenes[0].truth(), scenes[0].mirrored().truth()
    torch.testing.assert_close(after.masks, before.masks.flip(2))
    width = scenes[0].rgb.shape[1]
    torch.testing.assert_close(after.boxes[:, [2, 0]], width - before.boxes[:, [0, 2]])


def test_light_leaves_things_where_they_are(scenes):
    seen = {altered(scenes[0], np.random.default_rng(s)).things.tobytes() for s in range(6)}
    assert seen <= {s.things.tobytes() for s in (scenes[0], scenes[0].mirrored())}


def truth_of(*boxes):
    masks = torch.zeros(len(boxes), 32, 32)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return Truth(torch.tensor(boxes).float(), torch.arange(len(boxes)) % len(CLASSES), masks)


def test_right_answers_cost_nothing_and_wrong_ones_much():
    truth = truth_of((2, 2, 12, 22), (16, 4, 30, 14))
    proposals = torch.tensor([[1.0, 3, 13, 21], [16, 4, 28, 15], [0, 24, 8, 32]])
    generator = torch.Generator().manual_seed(0)
    regions = Regions(proposals, truth, len(CLASSES), 64, generator)
    assert regions.positive == 4  # both proposals, and the things' own boxes
    assert regions.labels.tolist()[4:] == [len(CLASSES)]
    goals = regions.goals(CODER)
    moved = decode(regions.boxes[:4], goals, CODER)
    torch.testing.assert_close(moved, truth.boxes[regions.things], rtol=0, atol=1e-4)
    logits = F.one_hot(regions.labels, len(CLASSES) + 1) * 50.0
    deltas = torch.zeros(5, len(CLASSES), 4)
    deltas[torch.arange(4), regions.labels[:4]] = goals
    for cost in box_losses(logits, deltas, [regions], CODER):
        assert cost < 1e-4
    wrong = box_losses(-logits, deltas + 1, [regions], CODER)
    assert wrong[0] > 40
    assert wrong[1] == pytest.approx(4 * 4 / 5)
    masks = torch.zeros(4, len(CLASSES), 28, 28)
    masks[torch.arange(4), regions.labels[:4]] = (regions.masks(28) * 2 - 1) * 50
    assert mask_loss(masks, [regions]) < 1e-4
    assert mask_loss(-masks, [regions]) > 40


def test_proposals_learn_where_things_are():
    truth = truth_of((0, 0, 16, 16))
    anchors = torch.tensor([[0.0, 0, 16, 16], [16, 16, 32, 32], [0, 0, 16, 8]])
    scores, deltas = torch.tensor([[50.0, -50, 0]]), torch.zeros(1, 3, 4)
    deltas[0, 1] = 9  # of an anchor on nothing: doesn't count
    generator = torch.Generator().manual_seed(0)
    costs = proposal_losses(scores, deltas, anchors, [truth], BoxCoderConfig(), generator)
    assert [float(cost) for cost in costs] == pytest.approx([0, 0], abs=1e-6)
    costs = proposal_losses(-scores, deltas + 1, anchors, [truth], BoxCoderConfig(), generator)
    assert [float(cost) for cost in costs] == pytest.approx([50, 2])


def test_a_scene_without_things_costs_something_finite():
    empty = Truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, 192, 256))
    network = train.start()
    levels = network.features(torch.zeros(1, 3, *train.SIZE))
    costs = train.losses(network, levels, [empty], train.Recipe(), torch.Generator())
    costs = {name: cost.item() for name, cost in costs.items()}
    assert all(math.isfinite(costs[name]) for name in ("rpn class", "rpn box", "class", "box"))
    assert costs["rpn box"] == costs["box"] == costs["mask"] == 0


def test_it_starts_from_the_segmentors_backbone_and_every_branch_is_alive():
    network = train.start()
    layers = dynamic_layers(network)
    assert len(layers) == 30
    assert all(layer.kernel_num >= 8 and layer.KSM_Local is not None for layer in layers.values())
    assert all(
        (layer.FBM is not None) == (layer.kernel_size == (3, 3)) for layer in layers.values()
    )
    segmentor = load_checkpoint(packaged_checkpoint())
    for name, value in segmentor.backbone.state_dict().items():
        torch.testing.assert_close(network.backbone.state_dict()[name], value, rtol=0, atol=0)


def test_rate_rises_and_falls():
    rates = [cosine(2.0, step, 300, 20) for step in range(300)]
    assert max(rates) == rates[20] == 2
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] < 1e-3 < rates[0]


def test_the_backbone_learns_slowly_and_its_attention_slower_yet():
    network, recipe = train.start(), train.Recipe()
    factors = {
        id(parameter): group["factor"]
        for group in train.optimiser_of(network, recipe).param_groups
        for parameter in group["params"]
    }
    assert factors.keys() == {id(p) for p in network.parameters()}
    attention = network.get_parameter("backbone.layer2.0.conv2.KSM_Global.fc.weight")
    assert factors[id(network.neck.lateral_convs[0].conv.weight)] == 1
    assert factors[id(network.backbone.bn1.weight)] == recipe.backbone_factor
    expected = recipe.backbone_factor * recipe.attention_factor
    assert factors[id(attention)] == pytest.approx(expected)


def test_stops_goes_on_and_learns(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_many", lambda draw, seeds, processes: scenes)
    recipe = train.Recipe(steps=6, batch=2, warm_up=1, scenes=2)
    start = train.start().state_dict()
    assert not train.train(recipe, tmp_path, minutes=0, processes=1)
    assert train.train(recipe, tmp_path, minutes=9, processes=1)
    state = load_state(tmp_path / "instances.state")
    assert state["step"] == recipe.steps
    moved = {k for k, v in state["network"].items() if not torch.equal(v, start[k])}
    assert {key.split(".")[0] for key in moved} == {"backbone", "neck", "rpn_head", "roi_head"}
    assert not any("running_" in key for key in moved)
    with pytest.raises(SystemExit, match="another recipe"):
        train.train(replace(recipe, seed=1), tmp_path, minutes=9, processes=1)
