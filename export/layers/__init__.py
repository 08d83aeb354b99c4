"""Folded layers, written straight into the graph: no exporter ever sees their inside.

Frequency assembly and band modulation become single nodes of the ``fdconv`` domain, whose
function bodies go into the model; the rest is a handful of standard nodes.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from fdconv_deploy.export.layers.convolution import write_constant_convolution, write_convolution
from fdconv_deploy.export.layers.nodes import Nodes
from fdconv_deploy.export.layers.operators import write_assembly, write_attention, write_bands
from fdconv_deploy.folding.layer import FoldedConv

__all__ = ["Nodes", "write_layer"]


def write_layer(nodes: Nodes, layer: FoldedConv, x: gs.Tensor) -> gs.Variable:
    """Append a folded layer's nodes to a graph.

    Args:
        nodes: the graph's; layers written through one share equal constants.
        x: ``(batch, I, H, W)`` float32.

    Returns:
        ``(batch, O, H', W')`` float32.
    """
    nodes.begin(layer.name)
    # ONNX Runtime takes twice as long for GlobalAveragePool (benchmarks/primitives.py).
    average = nodes("ReduceMean", "average", x, nodes.shape(2, 3), keepdims=0)
    if layer.bands is not None:
        x = write_bands(nodes, layer.bands, x)
    if layer.constant_weight is not None:
        return write_constant_convolution(nodes, layer, x)
    attention = write_attention(nodes, layer, average)
    kernel = write_assembly(nodes, layer, average, attention)
    if layer.modulation.channel and layer.channel_side == "feature":
        shape = nodes.batch, layer.in_channels, 1, 1
        scale = nodes.reshape("channel.map", attention["channel"], *shape)
        x = nodes("Mul", "channel.scaled", x, scale)
    return write_convolution(nodes, layer, x, kernel, attention)
