"""``fdconv::FrequencyBandModulation`` in C against float64; forms without C run as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.nn import FDConv2d
from tests.ops.single import cut_constant, fdconv_node, layer_model, refusal, run
from tests.ops.test_frequency_band_modulation import K_LISTS, by_reference, layer_of
from tests.reference.lively import lively_input

# Whole vectors and not, rows symmetric or not, fewer rows than a block of a product has.
SIZES = [(12, 8), (13, 15), (66, 97), (1, 1), (2, 3), (32, 48), (30, 64)]


def check(layer: FDConv2d, folded: FoldedConv, batch: int, library: Path, threads: int = 2) -> None:
    x = lively_input((batch, 18, *folded.input_size))
    model = layer_model(folded, batch)
    name = fdconv_node(model, "FrequencyBandModulation").output[0]
    native = run(model, x.numpy(), library, threads)[name]
    assert layer.FBM is not None
    expected = by_reference(layer.FBM, x.double().numpy())
    assert np.abs(native - expected).max() <= 2e-6 * np.abs(expected).max()
    assert not np.array_equal(native, run(model, x.numpy())[name])


@pytest.mark.parametrize("k_list", K_LISTS, ids=str)
@pytest.mark.parametrize("act", ["sigmoid", "tanh"])
@pytest.mark.parametrize("lowfreq", [False, True])
def test_every_form(k_list: tuple[int, ...], act: str, lowfreq: bool, library: Path) -> None:
    for size, batch in (((12, 8), 1), ((13, 15), 3)):
        check(*layer_of(size, k_list=k_list, act=act, lowfreq_att=lowfreq), batch, library)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_sizes_and_kernels(size: tuple[int, int], kernel: int, library: Path) -> None:
    layer, folded = layer_of(size, k_list=[2, 4, 8], spatial_kernel=kernel, max_size=(32, 64))
    check(layer, folded, 2, library)


@pytest.mark.parametrize("size", [*SIZES, (14, 11), (5, 40)])
def test_masks_of_the_first_version(size: tuple[int, int], library: Path) -> None:
    check(*layer_of(size, k_list=[2, 4, 8], masks="per_call"), 2, library)


@pytest.mark.parametrize("threads", [1, 5])
def test_threads(threads: int, library: Path) -> None:
    check(*layer_of((40, 33), k_list=[2, 4, 8]), 3, library, threads)


@pytest.mark.parametrize(("place", "value"), [(0, 0), (0, -1), (0, 64), (1, 0), (1, 7), (1, 2**40)])
def test_sizes_that_do_not_fit_are_refused(place: int, value: int, library: Path) -> None:
    _, folded = layer_of((12, 8), k_list=[2, 4, 8])
    model = layer_model(folded, 1)
    node = fdconv_node(model, "FrequencyBandModulation")
    (shape,) = (each for each in node.attribute if each.name == "feature_size")
    shape.ints[place] = value
    assert "its constants are not" in refusal(model, lively_input((1, 18, 12, 8)).numpy(), library)


# Of the convolution, its bias, the mix, its bias, the columns and the rows of the transform, and of
# a band's: input and axis. A row or column of bins less is another band, and no fault.
SHORTER = [(1, -1), (2, 0), (3, 0), (3, -1), (5, 0), (6, -1), (7, 0), (8, -1)]


@pytest.mark.parametrize(("place", "axis"), SHORTER)
@pytest.mark.parametrize("kept", [slice(0, 0), slice(0, -1)], ids=["empty", "shorter"])
def test_constants_that_do_not_fit_are_refused(
    place: int, axis: int, kept: slice, library: Path
) -> None:
    _, folded = layer_of((12, 8), k_list=[2, 4, 8])
    model = layer_model(folded, 1)
    cut_constant(model, fdconv_node(model, "FrequencyBandModulation").input[place], axis, kept)
    refusal(model, lively_input((1, 18, 12, 8)).numpy(), library)


@pytest.mark.parametrize("config", [dict(act="softmax"), dict(spatial_group=2)], ids=str)
def test_other_forms_run_as_functions(config: dict, library: Path) -> None:
    _, folded = layer_of((12, 8), k_list=[2, 4], **config)
    x = lively_input((2, 18, 12, 8)).numpy()
    model = layer_model(folded, 2)
    name = fdconv_node(model, "FrequencyBandModulation").output[0]
    assert np.array_equal(run(model, x, library)[name], run(model, x)[name])
