"""What layers over tokens refuse."""

from __future__ import annotations

import pytest
import torch

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn import FDLinear, FDTokenConv


@pytest.mark.parametrize("shape", [(4, 20), (0, 3, 20), (2, 3, 21)], ids=str)
def test_token_layer_refuses_inputs_without_a_batch_of_tokens(shape):
    layer = FDTokenConv(20, 24)
    with pytest.raises(ValueError, match=r"expects a non-empty \(B, …, 20\) input of at least"):
        layer(torch.zeros(shape))


def test_narrow_token_layer_is_a_plain_linear_one():
    layer = FDTokenConv(16, 24)
    assert layer.weight.shape == (24, 16, 1, 1)
    x = torch.randn(7, 16)
    plain = torch.nn.functional.linear(x, layer.weight[:, :, 0, 0], layer.bias)
    torch.testing.assert_close(layer(x), plain)


def test_narrow_token_layer_takes_the_weight_of_a_linear_one():
    linear = torch.nn.Linear(16, 24)
    layer = FDTokenConv(16, 24)
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(layer(x), linear(x))


def test_band_modulation_of_tokens_is_refused():
    with pytest.raises(UnsupportedLayerError, match="use_fbm_if_k_in has 1"):
        FDTokenConv(20, 24, use_fbm_if_k_in=(1,))


def test_packed_sequences_are_refused_by_name():
    with pytest.raises(UnsupportedLayerError, match="cu_seqlens packs sequences"):
        FDLinear(12, 8)(torch.randn(7, 12), cu_seqlens=torch.tensor([0, 3, 7]))
