"""Plain convolutions become FDConv layers, and the network computes what it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import nn

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn import FDConv2d, FDLinear, replace_convolutions, replace_linears
from fdconv_deploy.nn.replace import set_equivalent
from tests.reference.arguments import layer_arguments
from tests.reference.lively import error, lively_input
from tests.reference.networks import Wired


class Own(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(24, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        nn.Conv2d(32, 32, 7, padding=3, groups=32),
        nn.Conv2d(32, 48, 1, bias=False),
        Own(48, 48, 1),
        nn.Conv2d(48, 48, 3, padding=1, padding_mode="reflect"),
        FDConv2d(48, 20, 1),
    ).eval()


@torch.no_grad()
def test_replaces_what_it_can_and_says_what() -> None:
    model = network()
    x = torch.randn(2, 3, 21, 24)
    before = model(x)
    assert replace_convolutions(model, kernel_num=2) == ["2.0", "4"]
    assert [type(m).__name__ for m in (model[0], model[2][0], model[3], model[4], model[5])] == [
        "Conv2d", "FDConv2d", "Conv2d", "FDConv2d", "Own",
    ]  # fmt: skip
    assert model[2][0].kernel_num == 2
    assert error(model(x), before) <= 1e-5
    # It can learn: what is at rest gets gradients.
    model.train()
    with torch.enable_grad():
        model(x).square().mean().backward()
    assert all(p.grad is not None for p in model[2][0].parameters())
    assert model[2][0].KSM_Global.kernel_fc.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("2.*", ["2.0"]),
        (["4", "nothing"], ["4"]),
        (lambda name, conv: conv.bias is None, ["4"]),
    ],
)
def test_which(where: Any, names: list[str]) -> None:
    assert replace_convolutions(network(), where=where) == names


@torch.no_grad()
def test_starts() -> None:
    """``published`` keeps the spectrum alone, ``new`` nothing."""
    x = torch.randn(1, 3, 21, 24)
    expected = network()(x)
    for weights, kept in (("equivalent", True), ("published", False), ("new", False)):
        model = network()
        torch.manual_seed(1)
        replace_convolutions(model, weights=weights)  # type: ignore[arg-type]
        assert (error(model(x), expected) <= 1e-5) == kept, weights
    model = network()
    replace_convolutions(model, weights="published")
    nn.init.zeros_(model[2][0].KSM_Global.filter_fc.weight)
    nn.init.zeros_(model[4].KSM_Global.filter_fc.weight)
    assert error(model(x), expected) <= 1e-4


@settings(deadline=None, max_examples=40)
@given(layer_arguments())
@torch.no_grad()
def test_any_arguments_start_equal(
    case: tuple[dict[str, Any], tuple[int, int], int],
) -> None:
    arguments, size, seed = case
    assume(arguments["param_reduction"] >= 1)
    torch.manual_seed(seed)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "bias")
    plain = nn.Conv2d(**{name: arguments[name] for name in names})
    layer = FDConv2d(**arguments).eval()
    set_equivalent(layer, plain.weight, plain.bias)
    x = lively_input((2, arguments["in_channels"], *size), seed)
    assert error(layer(x), plain(x)) <= 1e-5


def test_shared_convolutions_stay_shared() -> None:
    conv = nn.Conv2d(20, 20, 3, padding=1)
    model = Wired(lambda s, x: s.b(s.a(x)), a=conv, b=conv)
    assert replace_convolutions(model) == ["a", "b"]
    assert model.a is model.b
    assert isinstance(model.a, FDConv2d)


def test_types_and_modes_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(20, 20, 3).double(), nn.Conv2d(20, 20, 3).eval())
    replace_convolutions(model)
    assert model[0].dft_weight.dtype == torch.float64
    assert model[0].training
    assert not model[1].training


@pytest.mark.parametrize(
    ("model", "options", "hint"),
    [
        (nn.Conv2d(20, 20, 3), {}, r"torch\.nn\.Sequential\(layer\)"),
        (nn.Sequential(nn.Linear(3, 3)), {}, "It has 0 convolutions"),
        (network(), {"where": "backbone.*"}, "that `where` names.*6 convolutions: 0, 2.0"),
        (network(), {"kernel_num": 64}, "2.0: kernel_num=64 does not divide.*Nothing was replaced"),
        (network(), {"param_reduction": 0.5}, "2.0: param_reduction=0.5 keeps part"),
        (network(), {"weights": "zero"}, "'equivalent', 'published' or 'new'"),
    ],
)
def test_refusals(model: nn.Module, options: dict[str, Any], hint: str) -> None:
    before = list(model.modules())
    with pytest.raises(UnsupportedLayerError, match=hint):
        replace_convolutions(model, **options)
    assert list(model.modules()) == before


class Encoder(nn.Module):
    """A layer of a transformer, a head of one vector, and layers that are none of these."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24, bias=False))
        self.dynamic = FDLinear(24, 24, kernel_num=4)
        self.head = nn.Linear(24, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x)[0]
        return self.head(self.dynamic(x + self.mlp(x)).mean(1))


@torch.no_grad()
def test_linear_layers_are_replaced_and_compute_what_they_did() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    x = torch.randn(2, 7, 24)
    before = model(x)
    assert replace_linears(model, where="mlp.*", kernel_num=6) == ["mlp.0", "mlp.2"]
    assert error(model(x), before) <= 1e-5
    assert model.mlp[2].bias is None
    state = model.state_dict()
    assert state["mlp.0.dft_weight"].shape == (1, 96, 13, 2)
    assert state["mlp.0.KSM_Local.conv.weight"].shape == (96, 1, 3)


def test_only_plain_linear_layers_are_places() -> None:
    assert replace_linears(Encoder(), where="*", kernel_num=2) == ["mlp.0", "mlp.2", "head"]


@pytest.mark.parametrize(
    ("where", "arguments", "message"),
    [
        (
            "ffn.*",
            {},
            r"no linear layer .* that `where` names. It has 3 .*s: mlp.0, mlp.2",
        ),
        ("mlp.*", {"use_fdconv_if_c_gt": 24}, "more features than use_fdconv_if_c_gt"),
        ("mlp.*", {"kernel_num": 7}, r"mlp.0: kernel_num=7 does not divide .* lower is 6"),
    ],
)
def test_linear_layers_that_cannot_be_replaced(
    where: str, arguments: dict[str, Any], message: str
) -> None:
    model = Encoder()
    with pytest.raises(UnsupportedLayerError, match=message):
        replace_linears(model, where=where, **arguments)
    assert isinstance(model.mlp[0], nn.Linear)
