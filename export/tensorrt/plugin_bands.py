"""Band modulation as matrix products and one plugin node."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from fdconv_deploy.export.layers.nodes import Nodes
from fdconv_deploy.export.tensorrt.plugin_nodes import constant_of, plugin_node, take_over
from numpy.typing import NDArray

from fdconv_deploy.ops.frequency_band_modulation.plugin import SIZES
from fdconv_deploy.ops.frequency_band_modulation.plugin_function import (
    combination_function,
    combination_name,
)


def replace_bands(nodes: Nodes, node: gs.Node) -> None:
    """Write a layer's band modulation anew; in float16 where its input is that, cast."""
    attributes = node.attrs
    softmax = "_Softmax" in node.op
    _, transposed, bias, mix, mix_bias, to_columns, to_rows = node.inputs[:7]
    bands = (len(node.inputs) - 7) // 2
    groups = attributes["groups"]
    weight = _plain_weight(constant_of(transposed), groups)
    weighted, channels = len(weight) // groups, weight.shape[1] * groups
    terms = bands + 1
    height, width = attributes["factors_shape"][-2:]
    x, half = _input(node)
    gain = math.sqrt(width) if half else 1.0
    kind = np.float16 if half else np.float32

    def constant(name: str, values: NDArray[Any]) -> gs.Constant:
        return nodes.constant(name, values.astype(kind))

    pad = weight.shape[-1] // 2
    logits = nodes(
        "Conv", "bands.logits", x, constant("bands.conv.kernel", weight),
        constant("bands.conv.shift", constant_of(bias)), group=groups, pads=[pad] * 4,
        kernel_shape=list(weight.shape[2:]),
    )  # fmt: skip
    if softmax:
        shape = nodes.batch, groups, weighted, height * width
        logits = nodes("Softmax", "bands.softmax", nodes.reshape("bands.groups", logits, *shape),
                       axis=1)  # fmt: skip
        shape = nodes.batch, groups * weighted, height, width
        logits = nodes.reshape("bands.maps", logits, *shape)

    # Half precision has no room for a sum over a whole image: √W off on the way there.
    lows = []
    left = constant("bands.to_columns", constant_of(to_columns) / gain)
    projected = nodes("MatMul", "bands.projected", x, left)
    shape = nodes.batch, *attributes["rows_shape"][1:]
    projected = nodes.reshape("bands.rows", projected, *shape)
    rows = constant("bands.to_rows", constant_of(to_rows))
    coefficients = nodes("MatMul", "bands.coefficients", rows, projected)
    for band in range(bands):
        from_rows, from_columns = (constant_of(t) for t in node.inputs[7 + 2 * band : 9 + 2 * band])
        name = f"bands.{band}"
        kept = nodes(
            "Slice", f"{name}.kept", coefficients, nodes.shape(0, 0),
            nodes.shape(from_rows.shape[1], _columns(attributes, band, to_columns)),
            nodes.shape(2, 3),
        )  # fmt: skip
        back = nodes("MatMul", f"{name}.back", constant(f"{name}.from_rows", from_rows), kept)
        back = nodes.reshape(f"{name}.image_rows", back, nodes.batch, channels, height, -1)
        right = constant(f"{name}.from_columns", from_columns * gain)
        low = nodes("MatMul", f"{name}.low", back, right)
        lows.append(nodes.reshape(f"{name}.term", low, 1, nodes.batch, channels, height, width))
    stacked = nodes("Concat", "bands.lows", *lows, axis=0) if bands > 1 else lows[0]

    # One set of factors is given for all groups.
    factors = [np.tile(constant_of(t).reshape(terms, -1), (groups, 1)) for t in (mix, mix_bias)]
    pixels = height * width
    of = channels, height, width, groups, weighted, terms, nodes.batch
    sizes = dict(zip(SIZES, of, strict=True))
    name = combination_name(not softmax, half)
    nodes.functions[name] = combination_function(not softmax, half)
    total = plugin_node(
        nodes, name, "bands.combination",
        [x, logits, nodes.constant("bands.factors", factors[0]),
         nodes.constant("bands.shifts", factors[1].reshape(-1)), stacked],
        sizes=list(sizes.values()),
        maps_shape=[nodes.batch, groups, weighted, pixels],
        mix_shape=[groups, terms, weighted],
        mix_bias_shape=[groups, terms, 1],
        factors_shape=[nodes.batch, groups, terms, 1, pixels],
        terms_shape=[terms, nodes.batch, groups, channels // groups, pixels],
        feature_shape=[nodes.batch, channels, height, width],
    )  # fmt: skip
    take_over(nodes, node, total, half)


def _columns(attributes: dict[str, Any], band: int, to_columns: gs.Tensor) -> int:
    """How many of the projected columns a band keeps: of a slice, or all there are."""
    height, rows = attributes["factors_shape"][-2], attributes["rows_shape"][2]
    everything = int(constant_of(to_columns).shape[1] * height // rows)
    return min(int(attributes[f"band{band}_ends"][1]), everything)


def _plain_weight(transposed: NDArray[Any], groups: int) -> NDArray[Any]:
    """The weight ``(groups·weighted, I/groups, s, s)`` of an equal plain convolution."""
    grouped = transposed.reshape(groups, -1, *transposed.shape[1:])
    turned = grouped.transpose(0, 2, 1, 3, 4)[..., ::-1, ::-1]
    return np.ascontiguousarray(turned.reshape(-1, *turned.shape[2:]))


def _input(node: gs.Node) -> tuple[gs.Tensor, bool]:
    """The input, and whether it is float16 (then before its cast to float32)."""
    x = node.inputs[0]
    producer = x.inputs[0] if x.inputs else None
    if producer is not None and producer.op == "Cast" and producer.attrs["to"] == 1:
        return producer.inputs[0], True
    return x, False
