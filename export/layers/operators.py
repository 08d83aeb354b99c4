"""The node that assembles a layer's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from fdconv_deploy.export.layers.attention import Attention, write_column_scale, write_row_scale
from fdconv_deploy.export.layers.nodes import Array, Nodes

from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.ops.frequency_assembly import AssemblyForm, assembly_function, group_blocks


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
    values = spectrum.values.reshape(*lead, columns.leading, 2, columns.factors[-1] * slots)
    blocks = group_blocks(spectrum.groups)

    def single(values: Array) -> Array:
        return values.astype(np.float32)

    inputs: list[gs.Tensor] = [
        attention["kernel"],
        nodes.constant("spectrum", values),
        nodes.constant("group.patterns", blocks.patterns),
        nodes.constant("group.blocks", blocks.blocks),
    ]
    attributes: dict[str, Any] = {
        "weights_shape": [0, *lead, columns.leading, 1, columns.factors[-1] * slots],
        "columns_shape": [0, 2 * length, slots],
        "row_outer_shape": [0, 2 * classes, spectrum.rows // rows.factors[0] * length],
        "matrix_shape": [0, spectrum.rows, length],
        "kernel_shape": [-1, layer.in_channels, height, width],
    }
    for i, stage in enumerate(columns.stages):
        # A plain matrix where there is one: runtimes take the longest of all products for it.
        matrix = stage[0] if len(stage) == 1 else stage
        inputs.append(nodes.constant(f"columns{length}.stage{i}", single(matrix)))
        rest = 2 * length * slots // (len(stage) * stage.shape[2])
        batch = [] if len(stage) == 1 else [len(stage)]
        attributes[f"column_stage{i}_shape"] = [0, *batch, stage.shape[2], rest]
    for i, stage in enumerate(rows.stages):
        inputs.append(nodes.constant(f"rows{spectrum.rows}.stage{i}", single(stage)))
        rest = 2 * length * slots // (len(stage) * stage.shape[2])
        attributes[f"row_stage{i}_shape"] = [0, len(stage), stage.shape[2], rest]
    inputs.append(nodes.constant(f"rows{spectrum.rows}.outer", single(rows.outer)))
    if local is not None:
        inputs += _local_inputs(nodes, layer, average)
        window = width * local.taps
        attributes |= {
            "local_spread": [0, 0, 0, 0, 0, width - 1],
            "local_shape": [0, 1, length],
            "local_pads": [0, 0, _before(layer), 0, 0, window - 1 - _before(layer)],
        }
    if form.column_scale or form.row_scale:
        attributes["scaled_shape"] = [0, layer.out_channels, height, length]
    inputs += [scale for scale in scales if scale is not None]
    if form.by_rows:
        attributes["kernel_shape"] = [0, layer.out_channels, height, length]
    elif form.spatial_kernel:
        shape = [0, layer.out_channels, height, layer.in_channels, width]
        attributes["interleaved_shape"] = shape
    if form.name not in nodes.functions:
        nodes.functions[form.name] = assembly_function(form)
    return nodes(form.name, "assembly", *inputs, domain=DOMAIN, **attributes)


def _before(layer: FoldedConv) -> int:
    """How far windows of the spread average start before a channel's first column."""
    assert layer.local is not None
    width = layer.kernel_size[1]
    return width - 1 + width * (layer.local.taps // 2)


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
