"""``fdconv::FrequencyBandModulation``: body, reference and torch module, in every form."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx.reference
import pytest
import torch

from fdconv_deploy.folding.layer import FoldedConv, fold_layer
from fdconv_deploy.folding.module import FoldedConv2d
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.nn.band_modulation import BandModulation, masks_for
from fdconv_deploy.ops.frequency_band_modulation.function import BandForm
from tests.ops.single import fdconv_node, layer_model, run
from tests.reference.layer import convolve, sigmoid, softmax
from tests.reference.lively import enliven, error, lively_input
from tests.reference.operators import frequency_band_modulation

K_LISTS = [(2,), (2, 4), (8, 2, 4), (2, 3, 4, 8)]
SIZES = [(12, 8), (13, 15), (66, 97), (1, 1), (2, 3)]  # rows symmetric or not


def layer_of(
    size: tuple[int, int], channels: int = 18, **config: Any
) -> tuple[FDConv2d, FoldedConv]:
    # Plain 1×1: what is left of the layer is cheap.
    layer = FDConv2d(channels, 20, 1, kernel_num=5, use_fbm_if_k_in=[1], fbm_cfg=config)
    return layer, fold_layer(enliven(layer), size, name="layer")


def by_reference(fbm: BandModulation, x: np.ndarray) -> np.ndarray:
    config, size = fbm.config, x.shape[-2:]
    state = {k: v.double().numpy() for k, v in fbm.state_dict().items()}
    reach = config.spatial_kernel // 2
    gate = {
        "sigmoid": lambda z: 2 * sigmoid(z),
        "tanh": lambda z: 1 + np.tanh(z),
        "softmax": lambda z: fbm.groups * softmax(z, 0),
    }[config.act]
    weights = []
    for band in range(len(fbm.freq_weight_conv_list)):
        weight, bias = (state[f"freq_weight_conv_list.{band}.{k}"] for k in ("weight", "bias"))
        logits = [convolve(i, weight, [(reach, reach)] * 2, groups=fbm.groups) for i in x]
        weights.append([gate(z + bias[:, None, None]) for z in logits])
    masks = masks_for(config, *size).double().numpy()
    return frequency_band_modulation(x, np.array(weights), masks)


def check(layer: FDConv2d, folded: FoldedConv, batch: int) -> str:
    x = lively_input((batch, 18, *folded.input_size))
    model = layer_model(folded, batch)
    node = fdconv_node(model, "FrequencyBandModulation")
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    (function,) = (f for f in model.functions if f.name == node.op_type)
    assert set(given) == set(function.attribute)
    assert folded.bands is not None
    assert given["feature_size"] == [folded.bands.height, folded.bands.width]
    assert given["complex_rows"] == folded.bands.complex_rows
    assert given["softmax"] == folded.bands.softmax
    values = run(model, x.numpy())
    assert layer.FBM is not None
    expected = by_reference(layer.FBM, x.double().numpy())
    actual = values[node.output[0]]
    assert np.abs(actual - expected).max() <= 2e-6 * np.abs(expected).max()
    module = FoldedConv2d(folded)
    with torch.no_grad():
        assert error(module.bands(x), torch.from_numpy(expected)) <= 2e-6
        assert error(module(x), torch.from_numpy(values["y"])) <= 2e-6
    return node.op_type


@pytest.mark.parametrize("k_list", K_LISTS, ids=str)
@pytest.mark.parametrize("act", ["sigmoid", "tanh", "softmax"])
@pytest.mark.parametrize("groups", [1, 2, 65])
@pytest.mark.parametrize("lowfreq", [False, True])
def test_every_form(k_list, act, groups, lowfreq):
    for size, batch in (((12, 8), 1), ((13, 15), 3)):
        layer, folded = layer_of(
            size, k_list=k_list, act=act, spatial_group=groups, lowfreq_att=lowfreq
        )
        grouped = groups > 1 or act == "softmax"
        form = BandForm(len(k_list), act == "softmax", grouped)
        assert check(layer, folded, batch) == form.name


@pytest.mark.parametrize("size", [*SIZES, (14, 11), (5, 40)])
@pytest.mark.parametrize("k_list", [(2, 4, 8), (3,)], ids=str)
def test_masks_of_the_first_version(size, k_list):
    """Every negative row frequency passes: more rows are kept than a symmetric mask ever has."""
    layer, folded = layer_of(size, k_list=k_list, masks="per_call", lowfreq_att=True)
    check(layer, folded, 2)
    assert folded.bands.complex_rows == (size[0] > 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_sizes_and_kernels(size, kernel):
    layer, folded = layer_of(
        size, k_list=[2, 4, 8], spatial_kernel=kernel, spatial_group=2, max_size=(32, 64)
    )
    check(layer, folded, 2)


def test_both_kinds_of_rows_were_met():
    kinds = {layer_of(size, k_list=[2, 4, 8])[1].bands.complex_rows for size in SIZES}
    assert kinds == {False, True}


def test_forms_have_names_of_their_own():
    forms = [BandForm(*flags) for flags in product([1, 2, 3, 4], [False, True], [False, True])]
    assert len({form.name for form in forms}) == len(forms)
    assert BandForm(3, softmax=False, grouped=False).name == "FrequencyBandModulation"


def test_another_runtime():
    """onnx's own evaluator knows nothing of ``fdconv`` but the bodies in the file.

    One group: its ConvTranspose of several fails to reshape (onnx 1.23).
    """
    _, folded = layer_of((13, 15), k_list=[2, 4, 8])
    model = layer_model(folded, 2)
    x = lively_input((2, 18, 13, 15)).numpy()
    (y, *_) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})
    expected = run(model, x)["y"]
    assert np.abs(y - expected).max() <= 2e-6 * np.abs(expected).max()
