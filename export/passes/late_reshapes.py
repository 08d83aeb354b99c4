"""Batched convolutions beside the activation and the sum behind them.

A layer of batch B > 1 convolves ``(1, B·I, H, W)`` in B groups and gives its answer back as
``(B, O, H', W')``. Runtimes compute a ReLU and the addition of a shortcut within the
convolution before it, but not past that reshape, so here it moves behind both.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from fdconv_deploy.export.layers.nodes import Nodes


def move_reshapes(graph: gs.Graph, nodes: Nodes) -> None:
    """Move reshapes of batched convolutions past a ReLU or a sum that alone reads them."""
    for node in list(graph.nodes):
        if _splits_batch(node, nodes.batch):
            while _move(node, graph, nodes):
                pass


def _splits_batch(node: gs.Node, batch: int) -> bool:
    """Whether a node takes ``(1, B·O, H, W)`` to ``(B, O, H, W)`` behind a convolution."""
    if node.op != "Reshape" or not isinstance(node.inputs[1], gs.Constant):
        return False
    sizes = node.inputs[1].values
    producer = _producer(node.inputs[0])
    while producer is not None and producer.op == "Add":  # the sum over kernel rows
        producer = _producer(producer.inputs[-1])
    if producer is None or producer.op != "Conv" or producer.attrs.get("group", 1) != batch:
        return False
    return len(sizes) == 4 and sizes[0] == batch


def _producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def _move(node: gs.Node, graph: gs.Graph, nodes: Nodes) -> bool:
    """Move a reshape past its reader; False where it has to stay."""
    output = node.outputs[0]
    if len(output.outputs) != 1 or any(output is o for o in graph.outputs):
        return False
    reader = output.outputs[0]
    if reader.op == "Relu":
        others = []
    elif reader.op == "Add":
        others = [t for t in reader.inputs if t is not output]
    else:
        return False
    sizes = node.inputs[1].values
    if any(list(t.shape or []) != sizes.tolist() for t in others):
        return False
    joined = [1, int(sizes[0] * sizes[1]), *sizes[2:].tolist()]
    beside = [_joined(t, joined, nodes, f"{reader.name}.shortcut") for t in others]
    if len(beside) != len(reader.inputs) - 1:
        return False  # the sum of an answer with itself
    # Runtimes fuse a sum with what they know the shape of; that of kernels made at run time,
    # and of all that follows, they cannot tell by themselves.
    for tensor in (node.inputs[0], *beside):
        tensor.shape = joined
    reader.inputs = [node.inputs[0], *beside]
    result = reader.outputs[0]
    moved = gs.Variable(f"{result.name}.joined", dtype=np.float32, shape=joined)
    reader.outputs = [moved]
    node.inputs[0] = moved
    node.outputs = [result]
    return True


def _joined(tensor: gs.Tensor, sizes: list[int], nodes: Nodes, name: str) -> gs.Tensor:
    """``(B, O, H, W)`` as ``(1, B·O, H, W)``: what it was before a reshape, or reshaped."""
    producer = _producer(tensor)
    if producer is not None and producer.op == "Reshape":
        before = producer.inputs[0]
        if list(before.shape or []) == sizes:
            return before
    nodes.begin(name)
    return nodes.reshape("joined", tensor, *sizes)
