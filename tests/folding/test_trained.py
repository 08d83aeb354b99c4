"""The packaged, trained network folded at many sizes, on images of its kind, in float32."""

from __future__ import annotations

import pytest
import torch

from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.export.validation.sample_inputs import sample_tensor
from fdconv_deploy.folding.network import fold_network


@pytest.fixture(scope="module")
def network():
    return load_checkpoint(packaged_checkpoint())


@pytest.mark.parametrize(
    ("size", "batch"),
    [((512, 512), 1), ((65, 97), 2), ((128, 256), 5), ((200, 336), 1), ((75, 139), 2)],
)
@torch.no_grad()
def test_folded_equals_the_network(network, size, batch):
    x = sample_tensor(batch, size, network.architecture.preprocessing, seed=3)
    folded = fold_network(network, x[:1])
    expected = network(x)
    error = (folded(x) - expected).abs().max() / expected.abs().max()
    print(f"{size} x{batch}: {error:.1e}")
    assert error <= 2e-6
