"""``fdconv::FrequencyAssembly``: body, reference and torch module, in every form."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import onnx.reference
import pytest
import torch
from onnx import ModelProto, NodeProto

from fdconv_deploy.folding.layer import FoldedConv, fold_layer
from fdconv_deploy.folding.module import FoldedConv2d
from fdconv_deploy.folding.spectrum import complex_factors, real_factors
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.ops.frequency_assembly.function import AssemblyForm
from tests.ops.single import fdconv_node, inputs_of, layer_model, run
from tests.reference.lively import enliven, error, lively_input
from tests.reference.operators import frequency_assembly

CHANNELS, FILTERS = 18, 20
KINDS = [dict(spatial_kernel=False), dict(spatial_kernel=True)]
KINDS += [dict(spatial_kernel=True, by_rows=True)]


def stages(channels: int, filters: int, kernel: int) -> tuple[int, int]:
    return len(complex_factors(channels * kernel)), len(real_factors(filters * kernel))


FORMS = [
    AssemblyForm(stages(CHANNELS, FILTERS, 3 if kind["spatial_kernel"] else 1), *flags, **kind)
    for flags in product([False, True], repeat=4)
    for kind in KINDS
]


def with_scale(layer: FDConv2d, **arguments: Any) -> FoldedConv:
    generator = np.random.default_rng(0)
    scale, shift = generator.normal(size=(2, layer.out_channels))
    return fold_layer(layer, (7, 9), name="layer", scale=scale, shift=shift, **arguments)


def folded_in(
    form: AssemblyForm,
    kernel: Any = None,
    channels: int = CHANNELS,
    filters: int = FILTERS,
    kernel_num: int = 5,
) -> tuple[FDConv2d, FoldedConv]:
    """A layer that takes this form."""
    kernel = kernel or (3 if form.spatial_kernel else 1)
    only = form.spatial_kernel and not form.column_scale
    layer = FDConv2d(
        channels, filters, kernel, padding=1, kernel_num=kernel_num, param_ratio=1 + form.planes,
        use_ksm_local=form.local, use_fbm_if_k_in=[], ksm_only_kernel_att=only,
        use_fdconv_if_k_in=[1, 2, 3, 5], use_fdconv_if_c_gt=8,
    )  # fmt: skip
    enliven(layer)
    folded = with_scale(layer) if form.row_scale else fold_layer(layer, (7, 9), name="layer")
    return layer, replace(
        folded,
        channel_side="kernel" if form.column_scale else "feature",
        filter_side="kernel" if form.row_scale else "feature",
        by_rows=form.by_rows,
    )


def by_reference(folded: FoldedConv, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The node's output in float64 from its own inputs, by FFT and plain loops."""
    (kh, kw), outs, ins = folded.kernel_size, folded.out_channels, folded.in_channels
    matrix = frequency_assembly(inputs["attention"].astype(np.float64), folded.spectrum)
    if folded.local is not None:
        taps = folded.local.taps
        average = np.pad(inputs["local_input"].astype(np.float64), ((0, 0), (taps // 2, taps // 2)))
        weight = folded.local.weight.reshape(outs * kh, kw, taps)
        logits = np.zeros((len(average), outs * kh, ins, kw))
        for v, t in np.ndindex(kw, taps):
            logits[..., v] += weight[:, v, t, None] * average[:, None, t : t + ins]
        matrix = matrix / (1 + np.exp(-logits.reshape(matrix.shape)))
    kernel = matrix.reshape(-1, outs, kh, ins * kw)
    kernel = kernel * inputs.get("column_scale", 1) * inputs.get("row_scale", 1)
    if folded.by_rows:
        return kernel
    return kernel.reshape(-1, outs, kh, ins, kw).swapaxes(2, 3).reshape(-1, ins, kh, kw)


def check_attributes(model: ModelProto, node: NodeProto, folded: FoldedConv) -> None:
    """They say what the layer is, and the function body declares each of them and no other."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    (function,) = (f for f in model.functions if f.name == node.op_type)
    assert set(given) == set(function.attribute)
    assert given["layer"] == b"layer"
    assert (given["out_channels"], given["in_channels"]) == (
        folded.out_channels,
        folded.in_channels,
    )
    assert given["kernel_size"] == list(folded.kernel_size)
    assert given["by_rows"] == folded.by_rows
    assert given["taps"] == (folded.local.taps if folded.local else 0)
    gates = folded.modulation
    assert given["heads"] == gates.kernel + gates.filter + gates.spatial + gates.channel
    on_kernel = gates.filter > 0 and folded.filter_side == "kernel"
    assert given["filter_at"] == (gates.kernel if on_kernel else -1)
    columns = folded.in_channels * folded.kernel_size[1]
    assert sorted(given["column_frequencies"]) == list(range(columns))
    rows = folded.out_channels * folded.kernel_size[0]
    stored = {q for q in given["row_frequencies"] if q >= 0}
    assert stored | {-q % rows for q in stored} == set(range(rows))
    if folded.by_rows:
        assert given["pads"] == list(folded.padding)


def check(form: AssemblyForm, layer: FDConv2d, folded: FoldedConv, batch: int) -> None:
    x = lively_input((batch, layer.in_channels, 7, 9))
    model = layer_model(folded, batch)
    node = fdconv_node(model, "FrequencyAssembly")
    assert node.op_type == form.name
    check_attributes(model, node, folded)
    values = run(model, x.numpy())
    inputs = inputs_of(model, node, values)
    assert list(inputs) == form.inputs
    expected = by_reference(folded, inputs)
    actual = values[node.output[0]]
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()

    # The whole layer, in the graph and in torch, against the layer itself.
    whole = torch.from_numpy(values["y"])
    with torch.no_grad():
        assert error(FoldedConv2d(folded)(x), whole) <= 2e-6
        y = layer.double()(x.double())
    if folded.output_scale is not None:
        scale, shift = np.random.default_rng(0).normal(size=(2, layer.out_channels))
        y = y * torch.from_numpy(scale)[:, None, None] + torch.from_numpy(shift)[:, None, None]
    assert error(whole, y) <= 2e-6


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_form(form, batch):
    check(form, *folded_in(form), batch)


def test_forms_have_names_of_their_own():
    assert len({form.name for form in FORMS}) == len(FORMS)
    published = AssemblyForm((3, 3), False, True, True, True, spatial_kernel=True)
    assert published.name == "FrequencyAssembly"


@pytest.mark.parametrize(
    ("channels", "filters", "kernel"),
    [(14, 20, 1), (18, 20, 3), (64, 64, 3), (20, 14, 1), (20, 192, 1), (32, 512, 1)],
)
def test_one_two_and_three_stages(channels, filters, kernel):
    form = AssemblyForm(
        stages(channels, filters, kernel), False, True, True, True, spatial_kernel=kernel > 1
    )
    check(form, *folded_in(form, channels=channels, filters=filters, kernel_num=2), 2)


def test_every_number_of_stages_is_met():
    columns = {stages(channels, 1, kernel)[0] for channels, kernel in [(14, 1), (18, 3), (64, 3)]}
    rows = {stages(1, filters, 1)[1] for filters in (14, 192, 512)}
    assert columns == {1, 2, 3}
    assert rows == {1, 2, 3}


SHAPES = [
    dict(stride=2),
    dict(dilation=2, padding=2),
    dict(padding=0),
    dict(stride=(3, 2), padding=(2, 1)),
    dict(dilation=(5, 1), padding=(5, 0)),  # outer kernel rows meet few rows or none
    dict(kernel_size=5, padding=2, stride=2),
    dict(kernel_size=(2, 3), padding=0, ksm_only_kernel_att=True),
    dict(kernel_size=3, padding="same", dilation=(8, 1)),  # the outer rows meet padding only
]


@pytest.mark.parametrize("arguments", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_convolution_by_kernel_rows(arguments, batch):
    arguments = dict(kernel_size=3, padding=1) | arguments
    layer = enliven(
        FDConv2d(
            CHANNELS, 20, kernel_num=5, use_fdconv_if_k_in=[1, 2, 3, 5], use_fbm_if_k_in=[],
            **arguments,
        )
    )  # fmt: skip
    scale, shift = np.random.default_rng(0).normal(size=(2, 20))
    folded = fold_layer(layer, (7, 9), name="layer", scale=scale, shift=shift)
    x = lively_input((batch, CHANNELS, 7, 9))
    with torch.no_grad():
        expected = layer.double()(x.double())
    expected = expected * torch.from_numpy(scale)[:, None, None]
    expected = expected + torch.from_numpy(shift)[:, None, None]
    for side in ("kernel", "feature"):
        turned = replace(folded, by_rows=True, filter_side=side)
        actual = run(layer_model(turned, batch), x.numpy())["y"]
        assert error(torch.from_numpy(actual), expected) <= 2e-6


KERNELS: list[Any] = [
    (2, {}),
    (5, {}),
    ((1, 3), {}),
    ((1, 3), {"channel_side": "feature"}),
    ((3, 1), {"ksm_only_kernel_att": True}),
    ((2, 3), {"ksm_only_kernel_att": True}),
]


@pytest.mark.parametrize(("kernel", "arguments"), KERNELS, ids=str)
@pytest.mark.parametrize("use_ksm_local", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_other_kernels(kernel, arguments, use_ksm_local, batch):
    arguments = dict(arguments)
    side = arguments.pop("channel_side", None)
    layer = FDConv2d(
        CHANNELS, 20, kernel, padding=1, kernel_num=5, use_fbm_if_k_in=[],
        use_fdconv_if_k_in=[1, 2, 3, 5], use_ksm_local=use_ksm_local, **arguments,
    )  # fmt: skip
    folded = fold_layer(enliven(layer), (7, 9), name="layer")
    if side is not None:
        folded = replace(folded, channel_side=side)
    model = layer_model(folded, batch)
    node = fdconv_node(model, "FrequencyAssembly")
    x = lively_input((batch, CHANNELS, 7, 9))
    values = run(model, x.numpy())
    expected = by_reference(folded, inputs_of(model, node, values))
    actual = values[node.output[0]]
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()
    with torch.no_grad():
        assert error(torch.from_numpy(values["y"]), layer.double()(x.double())) <= 2e-6


def test_another_runtime():
    """onnx's own evaluator knows nothing of ``fdconv`` but the bodies in the file."""
    _, folded = folded_in(FORMS[-1])
    model = layer_model(folded, 2)
    x = lively_input((2, CHANNELS, 7, 9)).numpy()
    (y, *_) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})
    expected = run(model, x)["y"]
    assert np.abs(y - expected).max() <= 2e-6 * np.abs(expected).max()
