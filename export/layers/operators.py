"""The two ``fdconv`` nodes of a layer, and the attentions that the first takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from fdconv_deploy.export.layers.nodes import Nodes, geometry
from fdconv_deploy.folding.bands import FoldedBands
from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.folding.modulation import HiddenNorm
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.ops.frequency_assembly.function import (
    AssemblyForm,
    assembly_function,
    group_blocks,
)
from fdconv_deploy.ops.frequency_assembly.launch import gate_offsets
from fdconv_deploy.ops.frequency_band_modulation.function import BandForm, band_function

Attention = dict[str, gs.Variable]
# The end of a slice that keeps everything: runtimes know it and drop the slice.
EVERYTHING = np.iinfo(np.int64).max


def write_attention(nodes: Nodes, layer: FoldedConv, average: gs.Tensor) -> Attention:
    """``(B, I)`` averages -> kernel, filter, spatial and channel attention, ``(B, n)`` each."""
    folded = layer.modulation

    def affine(op: str, name: str, x: gs.Tensor, stem: str, w: Any, b: Any, **more: Any) -> Any:
        constants = nodes.constant(f"{stem}.weight", w), nodes.constant(f"{stem}.bias", b)
        return nodes(op, name, x, *constants, **more)

    hidden = affine(
        "Gemm", "hidden", average, "hidden", folded.hidden, folded.hidden_bias, transB=1
    )
    if folded.norm is not None and folded.norm.bias is not None:
        hidden = affine(
            "LayerNormalization", "hidden.normalised", hidden, "hidden.norm", folded.norm.weight,
            folded.norm.bias, axis=-1, epsilon=float(folded.norm.epsilon),
        )  # fmt: skip
    elif folded.norm is not None:
        hidden = _write_rms_norm(nodes, hidden, folded.norm)
    hidden = nodes("Relu", "hidden.relu", hidden)
    if folded.squared:
        hidden = nodes("Mul", "hidden.squared", hidden, hidden)
    logits = affine("Gemm", "heads", hidden, "heads", folded.heads, folded.head_bias, transB=1)
    heads = "kernel", "filter", "spatial", "channel"
    present = {name: size for name in heads if (size := getattr(folded, name))}
    if len(present) == 1:
        if folded.softmax:
            attention = nodes("Softmax", "kernel.attention", logits, axis=1)
        else:
            attention = nodes("Sigmoid", "kernel.attention", logits)
        attention.shape = [nodes.images, folded.kernel]
        return {"kernel": attention}
    lengths = nodes.constant("heads.sizes", np.array(list(present.values()), np.int64))

    def split(name: str, x: gs.Tensor) -> list[gs.Variable]:
        return nodes.add("Split", name, x, lengths, outputs=len(present), axis=1)

    if folded.softmax:
        # Side by side again: who assembles kernels by itself reads the matrix of all gates.
        parts = zip(present, split("logits", logits), strict=True)
        gates = nodes(
            "Concat", "gates", *(nodes("Softmax", f"{n}.gate", x, axis=1) for n, x in parts), axis=1
        )
    else:
        gates = nodes("Sigmoid", "gates", logits)
    gates.shape = [nodes.images, len(folded.heads)]
    return dict(zip(present, split("attention", gates), strict=True))


def _write_rms_norm(nodes: Nodes, x: gs.Tensor, norm: HiddenNorm) -> gs.Variable:
    """Values over the root of their mean square, in operators that opset 18 has."""
    squared = nodes("Mul", "hidden.power", x, x)
    mean = nodes("ReduceMean", "hidden.mean_square", squared, nodes.shape(1), keepdims=1)
    epsilon = nodes.constant("hidden.norm.epsilon", np.array([norm.epsilon], np.float32))
    root = nodes("Sqrt", "hidden.root", nodes("Add", "hidden.mean", mean, epsilon))
    weight = nodes.constant("hidden.norm.weight", norm.weight)
    return nodes("Mul", "hidden.normalised", nodes("Div", "hidden.scaled", x, root), weight)


def write_row_scale(nodes: Nodes, layer: FoldedConv, attention: Attention) -> gs.Tensor | None:
    """Filter attention times a following BatchNorm's scale, ``(B or 1, O, 1, 1)``."""
    scale = layer.output_scale
    constant = None
    if scale is not None:
        constant = nodes.constant("output_scale", scale.reshape(1, -1, 1, 1))
    if not layer.modulation.filter:
        return constant
    gate = nodes.reshape("filter.map", attention["filter"], nodes.images, layer.out_channels, 1, 1)
    return gate if constant is None else nodes("Mul", "filter.scaled", gate, constant)


def write_column_scale(nodes: Nodes, layer: FoldedConv, attention: Attention) -> gs.Tensor | None:
    """Spatial and channel attention along the kernel matrix, ``(B, 1, kh or 1, C)``."""
    height, width = layer.kernel_size
    batch, channels = nodes.images, layer.in_channels
    channel = spatial = None
    if layer.modulation.channel and layer.channel_side == "kernel":
        channel = nodes.reshape("channel.column", attention["channel"], batch, 1, channels, 1)
    if layer.modulation.spatial:
        spatial = nodes.reshape("spatial.column", attention["spatial"], batch, height, 1, width)
    if channel is None:
        # Without channel attention there is no spatial one either.
        assert spatial is None
        return None
    if spatial is not None:
        channel = nodes("Mul", "columns.gate", channel, spatial)
        rows = height
    else:
        # Same for every kernel column of a channel.
        rows = 1
        if width > 1:
            ones = nodes.constant("columns.ones", np.ones((1, 1, 1, width), np.float32))
            channel = nodes("Mul", "columns.gate", channel, ones)
    return nodes.reshape("columns.scale", channel, batch, 1, rows, channels * width)


def write_assembly(
    nodes: Nodes, layer: FoldedConv, average: gs.Tensor, attention: Attention
) -> gs.Variable:
    """The layer's kernels, ``(B·O, I, kh, kw)``, or ``(B, O, kh, I·kw)`` if used by rows.

    Args:
        average: ``(B, I)``, of the layer's input.
    """
    spectrum, local = layer.spectrum, layer.local
    assert spectrum is not None
    columns, rows = spectrum.column_transform, spectrum.row_transform
    classes, slots = rows.classes, rows.slots.size
    (height, width), length = layer.kernel_size, spectrum.columns
    planes = spectrum.values.shape[0]
    scales = (
        write_column_scale(nodes, layer, attention),
        write_row_scale(nodes, layer, attention) if layer.filter_side == "kernel" else None,
    )
    form = AssemblyForm(
        stages=(len(columns.stages), len(rows.stages) + 1),
        planes=planes > 1,
        local=local is not None,
        column_scale=scales[0] is not None,
        row_scale=scales[1] is not None,
        spatial_kernel=height > 1,
        by_rows=layer.by_rows,
    )
    lead = (planes,) if planes > 1 else ()
    blocks = group_blocks(spectrum.groups)
    last = columns.factors[-1] * slots  # bins that lie side by side
    inputs: list[gs.Tensor] = [
        attention["kernel"],
        nodes.constant("spectrum", spectrum.values.reshape(*lead, columns.leading, 2, last)),
        nodes.constant("group.patterns", blocks.patterns),
        nodes.constant("group.blocks", blocks.blocks),
    ]
    attributes: dict[str, Any] = {
        "layer": nodes.layer,
        "out_channels": layer.out_channels,
        "in_channels": layer.in_channels,
        "kernel_size": list(layer.kernel_size),
        "by_rows": int(layer.by_rows),
        "taps": 0 if local is None else local.taps,
        "row_frequencies": rows.slots.reshape(-1).tolist(),
        "column_frequencies": columns.frequencies.tolist(),
        **gate_offsets(layer),
        "weights_shape": [0, *lead, columns.leading, 1, last],
        "columns_shape": [0, 2 * length, slots],
        "row_outer_shape": [0, 2 * classes, spectrum.rows // rows.factors[0] * length],
        "matrix_shape": [0, spectrum.rows, length],
        "kernel_shape": [-1, layer.in_channels, height, width],
    }
    stages = [("column", length, i, stage) for i, stage in enumerate(columns.stages)]
    stages += [("row", spectrum.rows, i, stage) for i, stage in enumerate(rows.stages)]
    for axis, size, i, stage in stages:
        # A plain matrix where there is one: runtimes take the longest of all products for it.
        plain = axis == "column" and len(stage) == 1
        matrix = (stage[0] if plain else stage).astype(np.float32)
        inputs.append(nodes.constant(f"{axis}s{size}.stage{i}", matrix))
        rest = 2 * length * slots // (len(stage) * stage.shape[2])
        batch = [] if plain else [len(stage)]
        attributes[f"{axis}_stage{i}_shape"] = [0, *batch, stage.shape[2], rest]
    inputs.append(nodes.constant(f"rows{spectrum.rows}.outer", rows.outer.astype(np.float32)))
    if local is not None:
        inputs += _local_inputs(nodes, layer, average)
        # How far windows of the spread average start before a channel's first column.
        before = width - 1 + width * (local.taps // 2)
        attributes |= {
            "local_spread": [0, 0, 0, 0, 0, width - 1],
            "local_shape": [0, 1, length],
            "local_pads": [0, 0, before, 0, 0, width * local.taps - 1 - before],
        }
    inputs += [scale for scale in scales if scale is not None]
    if form.column_scale or form.row_scale:
        attributes["scaled_shape"] = [0, layer.out_channels, height, length]
    if form.by_rows:
        attributes |= geometry(layer) | {"input_size": list(layer.input_size)}
        attributes["kernel_shape"] = [0, layer.out_channels, height, length]
    elif form.spatial_kernel:
        shape = [0, layer.out_channels, height, layer.in_channels, width]
        attributes["interleaved_shape"] = shape
    nodes.functions.setdefault(form.name, assembly_function(form))
    return nodes(form.name, "assembly", *inputs, domain=DOMAIN, **attributes)


def _local_inputs(nodes: Nodes, layer: FoldedConv, average: gs.Tensor) -> list[gs.Tensor]:
    local = layer.local
    assert local is not None
    width = layer.kernel_size[1]
    window = width * local.taps
    # In the windows' order the taps come first and the kernel's columns, reversed, second.
    order = [(width - 1 - place % width) * local.taps + place // width for place in range(window)]
    normalised = nodes(
        "LayerNormalization",
        "local.input",
        average,
        nodes.constant("local.norm.weight", local.norm_weight),
        nodes.constant("local.norm.bias", local.norm_bias),
        axis=-1,
        epsilon=float(local.epsilon),
    )
    return [
        normalised,
        nodes.constant(f"window{window}", np.eye(window, dtype=np.float32)[:, None]),
        nodes.constant("local.weight", local.weight[:, order]),
    ]


def write_bands(nodes: Nodes, bands: FoldedBands, x: gs.Tensor) -> gs.Variable:
    """``(B, I, H, W)`` -> the same shape."""
    channels = int(bands.conv_weight.shape[1]) * bands.groups
    height, width, groups = bands.height, bands.width, bands.groups
    # A softmax runs over the groups, be it one.
    grouped = groups > 1 or bands.softmax
    form = BandForm(len(bands.bands), bands.softmax, grouped)
    inputs: list[gs.Tensor] = [
        x,
        nodes.constant("bands.conv.weight", bands.transposed_weight),
        nodes.constant("bands.conv.bias", bands.conv_bias),
        nodes.constant("bands.mix", bands.mix[: bands.terms]),
        nodes.constant("bands.mix.bias", bands.mix_bias[: bands.terms, None]),
        nodes.constant(f"bands{height}x{width}.to_columns", bands.to_columns),
        nodes.constant(f"bands{height}x{width}.to_rows", bands.to_rows),
    ]
    lead = [groups] if grouped else []
    attributes: dict[str, Any] = {
        "layer": nodes.layer,
        "groups": groups,
        "feature_size": [height, width],
        "complex_rows": int(bands.complex_rows),
        "softmax": int(bands.softmax),
        "conv_pads": [bands.conv_weight.shape[-1] // 2] * 4,
        "active_shape": [0, *lead, bands.conv_weight.shape[0] // groups, height * width],
        "factors_shape": [0, *lead, bands.terms, height, width],
        "rows_shape": [0, channels, height * (2 if bands.complex_rows else 1), -1],
    }
    if grouped:
        attributes["grouped_shape"] = [0, groups, channels // groups, height, width]
        attributes["feature_shape"] = [0, channels, height, width]
    all_rows = bands.to_rows.shape[0]
    all_columns = bands.to_columns.shape[1] // (2 if bands.complex_rows else 1)
    for index, band in enumerate(bands.bands):
        name = f"bands{height}x{width}.{index}"
        inputs.append(nodes.constant(f"{name}.from_rows", band.from_rows))
        inputs.append(nodes.constant(f"{name}.from_columns", band.from_columns))
        attributes[f"band{index}_ends"] = [
            EVERYTHING if band.rows == all_rows else band.rows,
            EVERYTHING if band.columns == all_columns else band.columns,
        ]
        attributes[f"band{index}_shape"] = [0, channels, height, -1]
    nodes.functions.setdefault(form.name, band_function(form))
    return nodes(form.name, "bands", *inputs, domain=DOMAIN, **attributes)
