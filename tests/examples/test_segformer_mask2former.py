"""A few steps of the small SegFormer's and Mask2Former's training, and their checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from examples.segformer_mask2former.networks import NETWORKS, start
from examples.segformer_mask2former.train import RECIPES, pixel_losses, query_losses
from examples.streets.scenes import draw_scene
from examples.training.layers import dynamic_layers, parameter_groups, quicken
from examples.training.scenes import TRAINING_SEEDS, normalise
from fdconv_deploy.checkpoints import load_checkpoint, save_checkpoint
from tests.reference.segmentor import predict


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_fall_on_a_scene_and_the_checkpoint_is_the_network(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = start(name)
    quicken(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    drawn = [draw_scene(seed, 96, 128) for seed in TRAINING_SEEDS[:2]]
    rgb = np.stack([image for image, _ in drawn]).transpose(0, 3, 1, 2).astype(np.float32)
    images = normalise(network.architecture.preprocessing, torch.from_numpy(rgb))
    labels = torch.from_numpy(np.stack([truth for _, truth in drawn]).astype(np.int64))
    losses = query_losses(network, RECIPES[name]) if name == "mask2former" else pixel_losses
    groups = parameter_groups(network, RECIPES[name])
    optimiser = torch.optim.AdamW(groups, lr=1e-3)
    totals = []
    for _ in range(6):
        total = torch.stack(list(losses(network, images, labels, None, 0).values())).sum()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        totals.append(total.item())
    assert totals[-1] < 0.95 * totals[0]

    after = network.state_dict()
    layers = [key for key in before if key.endswith("dft_weight")]
    assert len(layers) == len(dynamic_layers(network))
    frozen = ("backbone.conv1.", "backbone.bn1.", *(f"backbone.layer{i}." for i in (1, 2, 3)))
    for key in before:
        if name == "mask2former" and key.startswith(frozen):
            assert torch.equal(after[key], before[key]), key
        elif key in layers:
            assert not torch.equal(after[key], before[key]), key

    save_checkpoint(tmp_path / "trained.pth", network, network.architecture)
    loaded = load_checkpoint(tmp_path / "trained.pth")
    assert loaded.architecture == network.architecture
    network.eval()
    assert torch.allclose(predict(loaded, images), predict(network, images), atol=1e-5)
