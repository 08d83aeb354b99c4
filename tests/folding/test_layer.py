"""A whole folded layer against the layer in float64, at any size and of any arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.layer import fold_layer
from fdconv_deploy.folding.module import FoldedConv2d
from fdconv_deploy.nn import FDConv2d
from tests.reference.arguments import layer_arguments
from tests.reference.lively import enliven, error, lively_input

# Single layers typically reach 5e-7 of the largest value.
TOLERANCE = 2e-6


@torch.no_grad()
def folded_error(layer: FDConv2d, x: torch.Tensor) -> float:
    folded = fold_layer(layer, tuple(x.shape[-2:]))
    actual = FoldedConv2d(folded)(x)
    assert actual.shape[-2:] == folded.output_size
    expected = layer.double()(x.double())
    layer.float()
    return error(actual, expected)


@settings(deadline=None, max_examples=80)
@given(layer_arguments(), st.sampled_from([1, 2, 5]))
def test_any_layer(case, batch):
    arguments, size, seed = case
    layer = enliven(FDConv2d(**arguments), seed)
    x = lively_input((batch, arguments["in_channels"], *size), seed)
    assert folded_error(layer, x) <= TOLERANCE


SIZES = [(1, 1), (2, 3), (65, 97), (128, 256), (200, 336), (512, 512)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_sizes(size, kernel_size, stride):
    layer = enliven(FDConv2d(20, 20, kernel_size, stride, kernel_size // 2))
    assert folded_error(layer, lively_input((1, 20, *size))) <= TOLERANCE


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 3]))
def test_any_size(height, width, kernel_size):
    layer = enliven(FDConv2d(18, 20, kernel_size, padding=kernel_size // 2))
    assert folded_error(layer, lively_input((1, 18, height, width))) <= TOLERANCE


WIDE = [
    dict(in_channels=64, out_channels=64, kernel_size=3, kernel_num=64),
    dict(in_channels=64, out_channels=128, kernel_size=1, kernel_num=None),
    dict(in_channels=128, out_channels=33, kernel_size=3, kernel_num=3, param_ratio=2),
    dict(in_channels=48, out_channels=32, kernel_size=3, fbm_cfg={"spatial_group": 24}),
]


@pytest.mark.parametrize("arguments", WIDE, ids=str)
def test_wide_layers(arguments):
    layer = enliven(FDConv2d(**arguments, padding=1))
    assert folded_error(layer, lively_input((2, arguments["in_channels"], 13, 21))) <= TOLERANCE


@settings(deadline=None, max_examples=30)
@given(layer_arguments(), st.sampled_from([2, 5]), st.data())
@torch.no_grad()
def test_images_do_not_see_their_neighbours(case, batch, data):
    """Not one bit of an image's answer depends on who shares the batch."""
    arguments, size, seed = case
    layer = enliven(FDConv2d(**arguments), seed)
    folded = FoldedConv2d(fold_layer(layer, size))
    x = lively_input((batch, arguments["in_channels"], *size), seed)
    place = data.draw(st.integers(0, batch - 1))
    others = -3 * lively_input(tuple(x.shape), seed + 1)
    others[place] = x[place]
    assert torch.equal(folded(x)[place], folded(others)[place])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid", 0, (2, 1)])
@pytest.mark.parametrize("kernel", [1, 2, 3, (1, 3)])
@pytest.mark.parametrize("dilation", [1, 3, (2, 1)])
def test_paddings(padding, kernel, dilation):
    """An even kernel's 'same' pads one more below and to the right."""
    layer = FDConv2d(
        18, 20, kernel, padding=padding, dilation=dilation, use_fdconv_if_k_in=[1, 2, 3]
    )
    assert folded_error(enliven(layer), lively_input((1, 18, 9, 12))) <= TOLERANCE


def test_a_plain_layer_is_refused():
    with pytest.raises(ExportError, match=r"'stem'.*plain"):
        fold_layer(FDConv2d(8, 8, 3).eval(), (9, 9), name="stem")


@pytest.mark.parametrize("size", [(2, 9), (9, 2), (1, 1)])
def test_a_kernel_that_does_not_fit_is_a_sentence(size):
    layer = enliven(FDConv2d(18, 20, 3))
    with pytest.raises(ExportError, match=rf"'deep'.*{size[0]}×{size[1]}.*larger size"):
        fold_layer(layer, size, name="deep")
    assert fold_layer(layer, (3, 3)).output_size == (1, 1)


@pytest.mark.parametrize("shape", [(1, 18, 9, 8), (1, 18, 8, 9), (1, 17, 9, 9)])
def test_a_folded_layer_takes_its_own_size_only(shape):
    folded = FoldedConv2d(fold_layer(enliven(FDConv2d(18, 20, 3)), (9, 9), name="deep"))
    with pytest.raises(ValueError, match=r"'deep' was folded for inputs \(B, 18, 9, 9\)"):
        folded(torch.zeros(shape))
