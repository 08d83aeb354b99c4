"""Kernel, filter, spatial and channel attention, and the gates made of them."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from fdconv_deploy.export.layers.nodes import Nodes

from fdconv_deploy.folding.layer import FoldedConv

Attention = dict[str, gs.Variable]


def write_attention(nodes: Nodes, layer: FoldedConv, average: gs.Tensor) -> Attention:
    """``(B, I)`` averages -> kernel, filter, spatial and channel attention, ``(B, n)`` each."""
    folded = layer.modulation
    hidden = nodes(
        "Gemm",
        "hidden",
        average,
        nodes.constant("hidden.weight", folded.hidden),
        nodes.constant("hidden.bias", folded.hidden_bias),
        transB=1,
    )
    if folded.norm is not None:
        hidden = nodes(
            "LayerNormalization",
            "hidden.normalised",
            hidden,
            nodes.constant("hidden.norm.weight", folded.norm.weight),
            nodes.constant("hidden.norm.bias", folded.norm.bias),
            axis=-1,
            epsilon=float(folded.norm.epsilon),
        )
    hidden = nodes("Relu", "hidden.relu", hidden)
    hidden = nodes("Mul", "hidden.squared", hidden, hidden)
    logits = nodes(
        "Gemm",
        "heads",
        hidden,
        nodes.constant("heads.weight", folded.heads),
        nodes.constant("heads.bias", folded.head_bias),
        transB=1,
    )
    sizes = {
        "kernel": folded.kernel,
        "filter": folded.filter,
        "spatial": folded.spatial,
        "channel": folded.channel,
    }
    present = {name: size for name, size in sizes.items() if size}
    if len(present) == 1:
        parts = [logits]
    else:
        if not folded.softmax:
            logits = nodes("Sigmoid", "gates", logits)
        lengths = nodes.constant("heads.sizes", np.array(list(present.values()), np.int64))
        parts = nodes.add("Split", "attention", logits, lengths, outputs=len(present), axis=1)
    result = dict(zip(present, parts, strict=True))
    if folded.softmax:
        result["kernel"] = nodes("Softmax", "kernel.attention", result["kernel"], axis=1)
    elif len(present) == 1:
        result["kernel"] = nodes("Sigmoid", "kernel.attention", result["kernel"])
    return result


def write_row_scale(nodes: Nodes, layer: FoldedConv, attention: Attention) -> gs.Tensor | None:
    """Filter attention times a following BatchNorm's scale, ``(B or 1, O, 1, 1)``."""
    scale = layer.output_scale
    constant = None
    if scale is not None:
        constant = nodes.constant("output_scale", scale.reshape(1, -1, 1, 1))
    if not layer.modulation.filter:
        return constant
    gate = nodes.reshape("filter.map", attention["filter"], nodes.batch, layer.out_channels, 1, 1)
    return gate if constant is None else nodes("Mul", "filter.scaled", gate, constant)


def write_column_scale(nodes: Nodes, layer: FoldedConv, attention: Attention) -> gs.Tensor | None:
    """Spatial and channel attention along the kernel matrix, ``(B, 1, kh or 1, C)``."""
    height, width = layer.kernel_size
    batch, channels = nodes.batch, layer.in_channels
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
