"""A folded layer, written into a graph."""

from __future__ import annotations

import onnx_graphsurgeon as gs
from fdconv_deploy.export.layers.attention import write_attention
from fdconv_deploy.export.layers.bands import write_bands
from fdconv_deploy.export.layers.convolution import write_constant_convolution, write_convolution
from fdconv_deploy.export.layers.nodes import Nodes
from fdconv_deploy.export.layers.operators import write_assembly

from fdconv_deploy.folding.layer import FoldedConv


class LayerWriter:
    """Writes folded layers into one graph, for one batch size, sharing equal constants.

    ``nodes`` appends them; ``functions``: what those written so far call, by name.
    """

    def __init__(self, graph: gs.Graph, batch: int) -> None:
        self.nodes = Nodes(graph, batch)
        self.functions = self.nodes.functions

    def write(self, layer: FoldedConv, x: gs.Tensor) -> gs.Variable:
        """Append a layer's nodes.

        Args:
            x: ``(batch, I, H, W)`` float32.

        Returns:
            ``(batch, O, H', W')`` float32.
        """
        nodes = self.nodes
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
            scale = nodes.reshape(
                "channel.map", attention["channel"], nodes.batch, layer.in_channels, 1, 1
            )
            x = nodes("Mul", "channel.scaled", x, scale)
        return write_convolution(nodes, layer, x, kernel, attention)
