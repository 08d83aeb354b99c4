"""The frequency order that no checkpoint holds is told by the weights, or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fdconv_deploy.checkpoints import inspect_checkpoint, load_segmentor, save_checkpoint
from fdconv_deploy.checkpoints.frequency_order import detect_order, order_of_weights
from fdconv_deploy.config import FDConvConfig
from fdconv_deploy.demo import held_out, packaged_checkpoint, plain_checkpoint
from fdconv_deploy.export.api import export_checkpoint
from fdconv_deploy.nn import FDConv2d, Segmentor
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.nn.spectrum import FrequencyOrder, bin_radii
from fdconv_deploy.runtime import read_image
from fdconv_deploy.runtime.preprocessing import normalise
from tests.reference.lively import enliven_network, lively_input
from tests.reference.networks import small_segmentor

Order = Literal["torch", "stable"]
ORDERS: tuple[Order, ...] = ("torch", "stable")
KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "two planes": {"param_ratio": 2},
    "cut": {"param_reduction": 0.5, "use_ksm_local": False},
}
PICTURES = [read_image(path) for path, _ in held_out()]


def lively_layers(order: FrequencyOrder = "torch", **arguments: Any) -> nn.Sequential:
    """Spectra of kernels and attentions that differ, of a size where orders part mirror bins."""
    torch.manual_seed(0)
    given = {"kernel_num": 55, "frequency_order": order} | arguments
    layers = [nn.Sequential(FDConv2d(20, 20, 1, **given), nn.BatchNorm2d(20)) for _ in range(3)]
    network = nn.Sequential(*layers)
    enliven_network(network, 0, [lively_input((4, 20, 6, 8))])
    return network


def train(network: nn.Module, batches: Sequence[Tensor], rate: float = 1.0) -> None:
    """A few steps, as training is: towards something, downhill, another batch each time."""
    network.train()
    optimiser = torch.optim.SGD(network.parameters(), rate)
    for step, batch in enumerate(batches):
        output = network(batch)
        generator = torch.Generator().manual_seed(step)
        target = torch.randn(output.shape, generator=generator)
        optimiser.zero_grad()
        (output - target).square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
    network.eval()


BATCHES = [lively_input((4, 20, 6, 8), seed) for seed in range(3)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_its_order_in_the_weights(kind: str, order: Order) -> None:
    network = lively_layers(order, **KINDS[kind])
    train(network, BATCHES)
    found = order_of_weights(network.state_dict())
    assert found.order == order, found
    assert found.parted_in_one_group[order] == 0
    assert found.telling >= 3
    half = order_of_weights(network.half().state_dict())
    assert half.order == order, half


def test_an_order_of_another_machine_is_none_of_them() -> None:
    """Ties the other way round."""
    radii = bin_radii(20, 20).flatten().flip(0)
    flat = (len(radii) - 1 - torch.sort(radii, stable=True).indices).reshape(55, -1)
    network = lively_layers(torch.stack([flat // 11, flat % 11])[None])
    train(network, BATCHES)
    found = order_of_weights(network.state_dict())
    assert found.order is None
    assert found.none_of_them
    assert "none of the orders torch, stable" in found.reason


def test_weights_that_do_not_tell_say_why() -> None:
    network = lively_layers()
    assert "no mirror bins have parted" in order_of_weights(network.state_dict()).reason
    for layer in dynamic_layers(network).values():
        nn.init.normal_(layer.dft_weight)
    assert "not mirrored" in order_of_weights(network.state_dict()).reason
    kernels = lively_layers(convert_param=False)
    assert "store kernels" in order_of_weights(kernels.state_dict()).reason
    same = lively_layers(kernel_num=2)
    assert "mirror bins alike" in order_of_weights(same.state_dict()).reason
    plain = load_segmentor(plain_checkpoint(), require_fdconv=False)
    assert "no FDConv layer" in order_of_weights(plain.state_dict()).reason


def test_one_damaged_number_does_not_rule_an_order_out() -> None:
    network = lively_layers("stable")
    train(network, BATCHES)
    with torch.no_grad():
        network[0][0].dft_weight[0, 3, 0] += 0.1
    assert order_of_weights(network.state_dict()).order == "stable"


def test_the_packaged_checkpoint() -> None:
    order = inspect_checkpoint(packaged_checkpoint()).frequency_order
    assert order is not None
    assert order.order == order.weights.order == "torch"
    assert order.weights.parted_in_one_group == {"torch": 0, "stable": 0}
    assert order.weights.mirrored_in_two_groups == {"torch": 0, "stable": 7}


def test_the_packaged_checkpoint_trained_on_in_the_other_order() -> None:
    """Pairs part that could not in its own order."""
    network = load_segmentor(packaged_checkpoint(), frequency_order="stable")
    preprocessing = network.architecture.preprocessing
    inputs = [torch.from_numpy(normalise(p, preprocessing))[:, ::2, ::2] for p in PICTURES]
    train(network, torch.stack(inputs).split(4), rate=3.0)
    found = detect_order(network.state_dict())
    assert found.order == "stable", found
    assert found.weights.parted_in_one_group["stable"] == 0


@pytest.fixture(scope="module")
def trained_stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small segmentor, trained in that order from the start."""
    conv = FDConvConfig(kernel_num=32, use_fdconv_if_k_in=(1,))
    start = small_segmentor(50, 32, stages=1, conv=conv)
    network = Segmentor(start.architecture, "stable")
    network.load_state_dict(start.state_dict())
    train(network, [lively_input((4, 3, 32, 48), seed) for seed in range(4)])
    path = tmp_path_factory.mktemp("order") / "stable.pth"
    save_checkpoint(path, network, network.architecture)
    return path


def test_networks_are_loaded_in_the_order_their_weights_tell(trained_stable: Path) -> None:
    network = load_segmentor(trained_stable)
    assert (network.order.name, network.order.assumed) == ("stable", False)
    assert any("with the order 'stable'" in note for note in network.inference.notes)
    x = lively_input((1, 3, 64, 64))
    with torch.no_grad():
        stable = load_segmentor(trained_stable, frequency_order="stable")
        torchs = load_segmentor(trained_stable, frequency_order="torch")
        assert torch.equal(network(x), stable(x))
        assert not torch.equal(network(x), torchs(x))
    assert (torchs.order.name, torchs.order.evidence) == ("torch", None)
    usual = load_segmentor(packaged_checkpoint())
    assert (usual.order.name, usual.order.assumed) == ("torch", False)
    assert not any("order" in note for note in usual.inference.notes)


def test_bundles_record_it(trained_stable: Path, tmp_path: Path) -> None:
    bundle = export_checkpoint(trained_stable, tmp_path / "bundle", size=(32, 48))
    assert bundle.manifest.graph["frequency_order"] == "stable"
    assert "frequency_order" not in bundle.manifest.graph["assumed"]
