"""A whole network and its folded copy."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fdconv_deploy.config import FDConvConfig
from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.network import fold_network, input_sizes
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.nn.fdconv import dynamic_layers
from tests.reference.lively import error, lively_input
from tests.reference.networks import Wired, dynamic, small_segmentor

SIZES = [(65, 97), (128, 256), (200, 336), (512, 512), (33, 31)]
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: small_segmentor(18, 18, seed=2),
    "resnet50": lambda: small_segmentor(50, 20),
    "resnet18 every setting": lambda: small_segmentor(
        18,
        18,
        deep_stem=True,
        avg_down=True,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=True,
        conv=FDConvConfig(
            kernel_num=2, param_ratio=2, use_fbm_for_stride=True, ksm_global_act="tanh"
        ),
    ),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request) -> nn.Module:
    return NETWORKS[request.param]()


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_equals_the_network(network, size):
    """In float32 within 2e-6, or what the network itself errs by; its constants within 1e-6.

    The network in float32 is up to 3.4e-6 (ResNet-50) from itself in float64, and the folded
    one as much; run in float64, the folded constants are within 4e-7.
    """
    x = lively_input((1, 3, *size), 5)
    folded = fold_network(network, x)
    expected = copy.deepcopy(network).double()(x.double())
    own = error(network(x), expected)
    assert own < 5e-6  # a wilder network would prove nothing
    assert error(folded(x), expected) <= max(2e-6, 2 * own)
    assert error(folded.double()(x.double()), expected) <= 1e-6


@pytest.mark.parametrize("batch", [1, 2, 5])
@torch.no_grad()
def test_any_batch_and_no_neighbours(network, batch):
    x = lively_input((5, 3, 65, 97), 6)
    folded = fold_network(network, x[:1])
    answer = folded(x[:batch])
    expected = copy.deepcopy(network).double()(x[:batch].double())
    assert error(answer, expected) <= 6e-6
    others = x[:batch].flip(0) * 2
    others[0] = x[0]
    assert torch.equal(folded(others)[0], answer[0])


@torch.no_grad()
def test_the_network_is_left_as_it_was(network):
    x = lively_input((1, 3, 33, 31))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    answer = network(x)
    hooks = [len(m._forward_pre_hooks) for m in network.modules()]
    folded = fold_network(network, x)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(network(x), answer)
    assert [len(m._forward_pre_hooks) for m in network.modules()] == hooks
    assert dynamic_layers(network)
    assert not dynamic_layers(folded)


@torch.no_grad()
def folded_error(network: nn.Module) -> float:
    x = lively_input((2, 18, 12, 14))
    folded = fold_network(network.eval(), x)
    return error(folded(x), copy.deepcopy(network).double()(x.double()))


def test_a_layer_used_twice_at_one_size():
    assert folded_error(Wired(lambda s, x: s.a(s.a(x)), a=dynamic())) <= 2e-6


def test_a_layer_under_two_names():
    shared = dynamic()
    assert folded_error(Wired(lambda s, x: s.b(s.a(x).tanh()), a=shared, b=shared)) <= 2e-6


def test_a_network_that_is_one_layer():
    assert folded_error(dynamic()) <= 2e-6


def test_layers_in_containers():
    inner = nn.Sequential(dynamic(0), nn.Sequential(dynamic(1), dynamic(2, 2)))
    assert folded_error(nn.Sequential(inner, nn.Tanh(), dynamic(3))) <= 2e-6


def test_a_plain_layer_stays():
    plain = FDConv2d(18, 18, 5, padding=2)
    network = Wired(lambda s, x: s.b(s.a(x)), a=plain, b=dynamic()).eval()
    folded = fold_network(network, torch.zeros(1, 18, 9, 9))
    assert isinstance(folded.a, FDConv2d)


def test_sizes_are_those_the_layers_see():
    network = Wired(lambda s, x: s.c(s.b(s.a(x))), a=dynamic(0, 2), b=dynamic(1), c=dynamic(2, 2))
    assert input_sizes(network, torch.zeros(1, 18, 13, 30)) == {
        "a": (13, 30),
        "b": (7, 15),
        "c": (7, 15),
    }


def test_training_mode_is_a_sentence():
    with pytest.raises(ExportError, match=r"training mode; call \.eval\(\)"):
        fold_network(Wired(lambda s, x: s.a(x), a=dynamic()).train(), torch.zeros(1, 18, 9, 9))


def test_an_unused_layer_is_a_sentence():
    network = Wired(lambda s, x: s.a(x), a=dynamic(), spare=dynamic()).eval()
    with pytest.raises(ExportError, match="'spare' is not used"):
        fold_network(network, torch.zeros(1, 18, 9, 9))


def test_a_layer_at_two_sizes_is_a_sentence():
    network = Wired(lambda s, x: s.a(s.a(x)), a=dynamic(0, 2)).eval()
    with pytest.raises(
        ExportError, match=r"'a' is used at several input sizes.*\(5, 6\), \(9, 11\)"
    ):
        fold_network(network, torch.zeros(1, 18, 9, 11))


def test_a_failing_network_keeps_no_hooks():
    network = Wired(lambda s, x: s.broken(s.a(x)), a=dynamic(), broken=nn.Conv2d(3, 3, 1)).eval()
    with pytest.raises(RuntimeError):
        fold_network(network, torch.zeros(1, 18, 9, 9))
    assert not network.a._forward_pre_hooks
