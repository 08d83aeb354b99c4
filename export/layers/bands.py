"""The node that weighs a layer's frequency bands."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from fdconv_deploy.export.layers.nodes import Nodes

from fdconv_deploy.folding.bands import FoldedBands
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.ops.frequency_band_modulation import BandForm, band_function

# The end of a slice that keeps everything: runtimes know it and drop the slice.
EVERYTHING = np.iinfo(np.int64).max


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
        "groups": groups,
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
    if form.name not in nodes.functions:
        nodes.functions[form.name] = band_function(form)
    return nodes(form.name, "bands", *inputs, domain=DOMAIN, **attributes)
