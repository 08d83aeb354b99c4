"""Layers over tokens, folded: the layer in float64, and the convolution that they stand for."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fdconv_deploy.folding.layer import fold_layer
from fdconv_deploy.folding.module import FoldedConv2d
from fdconv_deploy.folding.network import fold_network, input_sizes
from fdconv_deploy.nn import FDConv2d, FDLinear, FDTokenConv
from tests.reference.lively import enliven, error

TOLERANCE = 2e-6


def tokens(*shape, seed=0):
    """Sequences whose means differ, ``(B, …, C)``."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(shape[0], *[1] * (len(shape) - 2), shape[-1], generator=generator)
    return torch.randn(shape, generator=generator) + offset


@torch.no_grad()
def folded_error(layer, x):
    sizes = input_sizes(layer, x)
    actual = FoldedConv2d(fold_layer(layer, sizes[""]))(x)
    expected = layer.double()(x.double())
    layer.float()
    assert actual.shape == expected.shape
    return error(actual, expected)


@pytest.mark.parametrize("shape", [(1, 5, 20), (2, 77, 20), (3, 4, 5, 20), (2, 1, 20)], ids=str)
@torch.no_grad()
def test_tokens_are_a_map_of_one_column(shape):
    layer = enliven(FDTokenConv(20, 24, kernel_num=4))
    conv = FDConv2d(20, 24, 1, kernel_num=4).eval()
    conv.load_state_dict(layer.state_dict())
    x = tokens(*shape)
    y = conv(x.flatten(1, -2).transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
    assert error(layer(x), y.reshape(*shape[:-1], 24)) <= 1e-6


@settings(deadline=None, max_examples=40)
@given(
    st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "param_ratio": st.sampled_from([1, 2]),
            "param_reduction": st.sampled_from([1.0, 0.5]),
            "use_ksm_local": st.booleans(),
            "ksm_local_act": st.sampled_from(["sigmoid", "tanh"]),
            "ksm_global_act": st.sampled_from(["sigmoid", "tanh"]),
            "temp": st.sampled_from([None, 1.5]),
        }
    ),
    st.sampled_from([(18, 20), (20, 36), (36, 20), (19, 18)]),
    st.sampled_from([(1, 1), (2, 3), (1, 300), (3, 4, 7)]),
)
def test_any_token_layer(arguments, channels, shape):
    layer = enliven(FDTokenConv(*channels, kernel_num=2, **arguments))
    assert folded_error(layer, tokens(*shape, channels[0])) <= TOLERANCE


@settings(deadline=None, max_examples=40)
@given(
    st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "param_ratio": st.sampled_from([1, 2]),
            "ksm_global_act": st.sampled_from(["sigmoid", "tanh", "softmax"]),
            "temp": st.sampled_from([None, 1.5]),
            "att_multi": st.sampled_from([2.0, 1.5]),
            "convert_param": st.booleans(),
        }
    ),
    st.sampled_from([(18, 20), (33, 20), (8, 4)]),
    st.sampled_from([(2,), (1, 1), (2, 3), (1, 300)]),
)
def test_any_linear_layer(arguments, features, shape):
    layer = enliven(FDLinear(*features, kernel_num=4, **arguments))
    assert folded_error(layer, tokens(*shape, features[0])) <= TOLERANCE


@pytest.mark.parametrize("name", ["bnc_default", "softmax", "noconvert"])
@torch.no_grad()
def test_linear_layer_folds_to_what_published_code_computes(oracle, name):
    cases = json.loads((oracle / "fdlinear/index.json").read_text())["cases"]
    case = next(c for c in cases if c["file"] == f"{name}.safetensors")
    tensors = load_file(oracle / "fdlinear" / case["file"])
    layer = FDLinear(**case["ctor"]).eval()
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    layer.load_state_dict(state)
    folded = fold_network(torch.nn.Sequential(layer).eval(), tensors["x"])
    assert error(folded(tensors["x"]), tensors["y"]) <= TOLERANCE


@torch.no_grad()
def test_constant_layers_fold_to_plain_products():
    """As they start, heads at zero, but for FDConv's local attention at its rest."""
    for layer in (FDLinear(20, 24, kernel_num=4), FDTokenConv(20, 24, use_ksm_local=False)):
        for name, parameter in layer.named_parameters():
            if "_fc." in name:
                parameter.zero_()
        folded = fold_layer(layer.eval(), (5, 1))
        assert folded.constant_weight is not None
        assert folded_error(layer, tokens(2, 5, 20)) <= TOLERANCE


def test_another_number_of_tokens_is_refused():
    folded = FoldedConv2d(fold_layer(enliven(FDTokenConv(20, 24)), (5, 1)))
    with pytest.raises(ValueError, match="folded for inputs \\(B, 5, 20\\)"):
        folded(tokens(1, 6, 20))
