"""Folded layers, written straight into the graph: no exporter ever sees their inside.

Frequency assembly and band modulation become single nodes of the ``fdconv`` domain, whose
function bodies go into the model; the rest is a handful of standard nodes.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from fdconv_deploy.export.layers.convolution import (
    write_constant_convolution,
    write_constant_product,
    write_convolution,
    write_product,
)
from fdconv_deploy.export.layers.nodes import Nodes
from fdconv_deploy.export.layers.operators import write_assembly, write_attention, write_bands
from fdconv_deploy.folding.layer import FoldedConv

__all__ = ["Nodes", "write_layer"]


def write_layer(nodes: Nodes, layer: FoldedConv, x: gs.Tensor) -> gs.Variable:
    """Append a folded layer's nodes to a graph.

    Args:
        nodes: the graph's; layers written through one share equal constants.
        x: ``(images, I, H, W)`` float32, of a layer over tokens ``(images, L, I)``. Mostly there
            are as many as the graph's batch.

    Returns:
        ``(images, O, H', W')`` float32, or ``(images, L, O)``.
    """
    nodes.begin(layer.name, None if x.shape is None else int(x.shape[0]))
    # ONNX Runtime takes twice as long for GlobalAveragePool (benchmarks/primitives.py).
    positions = nodes.shape(1) if layer.tokens else nodes.shape(2, 3)
    average = nodes("ReduceMean", "average", x, positions, keepdims=0)
    if layer.bands is not None:
        x = write_bands(nodes, layer.bands, x)
    if layer.constant_weight is not None:
        constant = write_constant_product if layer.tokens else write_constant_convolution
        return constant(nodes, layer, x)
    attention = write_attention(nodes, layer, average)
    kernel = write_assembly(nodes, layer, average, attention)
    if layer.modulation.channel and layer.channel_side == "feature":
        shape = (1, layer.in_channels) if layer.tokens else (layer.in_channels, 1, 1)
        scale = nodes.reshape("channel.map", attention["channel"], nodes.images, *shape)
        x = nodes("Mul", "channel.scaled", x, scale)
    write = write_product if layer.tokens else write_convolution
    return write(nodes, layer, x, kernel, attention)
