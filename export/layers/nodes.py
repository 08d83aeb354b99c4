"""Nodes and constants of one layer, added to a graph."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import FunctionProto

from fdconv_deploy.folding.layer import FoldedConv


class Nodes:
    """Adds nodes under a layer's name; equal constants are shared by all layers.

    ``batch``: the graph's batch size. ``images``: how many the layer sees, each of which gets
    kernels of its own. ``functions``: the ONNX function bodies that the nodes
    written so far call, by name. ``layer``: the prefix of the names of what is added.
    """

    def __init__(self, graph: gs.Graph, batch: int) -> None:
        self.graph, self.batch, self.images = graph, batch, batch
        self.functions: dict[str, FunctionProto] = {}
        self._constants: dict[str, gs.Constant] = {}
        self._uses: Counter[str] = Counter()
        self.layer = ""

    def begin(self, layer: str, images: int | None = None) -> None:
        """Name what follows after a layer; a layer may be used more than once."""
        self.images = self.batch if images is None else images
        # A network may be nothing but a layer.
        self.layer = layer or "layer"
        self._uses[self.layer] += 1
        if self._uses[self.layer] > 1:
            self.layer += f".use{self._uses[self.layer]}"

    def constant(self, name: str, values: NDArray[Any]) -> gs.Constant:
        """A constant; layers with equal values share the first one's."""
        values = np.ascontiguousarray(values)
        content = hashlib.sha256(values.tobytes())
        content.update(repr((values.shape, values.dtype.str)).encode())
        key = content.hexdigest()
        if key not in self._constants:
            self._constants[key] = gs.Constant(f"{self.layer}.{name}", values)
        return self._constants[key]

    def shape(self, *sizes: int) -> gs.Constant:
        """A list of integers."""
        return self.constant("shape_" + "x".join(map(str, sizes)), np.array(sizes, np.int64))

    def add(
        self, op: str, name: str, *inputs: gs.Tensor, outputs: int = 1, **attributes: Any
    ) -> list[gs.Variable]:
        """A node; its outputs."""
        domain = attributes.pop("domain", None)
        names = [f"{self.layer}.{name}" + (f".{i}" if i else "") for i in range(outputs)]
        results = [gs.Variable(n, dtype=np.float32) for n in names]
        node = gs.Node(op, f"{self.layer}.{name}", attributes, list(inputs), results, domain=domain)
        self.graph.nodes.append(node)
        return results

    def __call__(self, op: str, name: str, *inputs: gs.Tensor, **attributes: Any) -> gs.Variable:
        """A node of one output; the output."""
        return self.add(op, name, *inputs, **attributes)[0]

    def reshape(self, name: str, x: gs.Tensor, *sizes: int) -> gs.Variable:
        """``x`` in another shape."""
        return self("Reshape", name, x, self.shape(*sizes))


def geometry(layer: FoldedConv) -> dict[str, Any]:
    """Attributes of the ``Conv`` node that convolves with a layer's whole kernels."""
    return {
        "kernel_shape": list(layer.kernel_size),
        "strides": list(layer.stride),
        "pads": list(layer.padding),
        "dilations": list(layer.dilation),
    }
