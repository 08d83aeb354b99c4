"""Passes over a captured graph: BatchNorms folded, means split, reshapes moved late."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from fdconv_deploy.export.layers import Nodes, producer_of
from fdconv_deploy.export.torch_export import PLACEHOLDER

Float64 = NDArray[np.float64]
SPREAD = ("ReduceMean", "ReduceSum")
# An axis longer than this is cut into pieces.
LONG = 128


def fold_batch_norms(graph: gs.Graph) -> dict[str, tuple[Float64, Float64]]:
    """Fold each BatchNormalization into the convolution before it, where nothing else reads that.

    Returns:
        The scale and shift ``(C,)`` of the normalisation that follows each FDConv layer, by its
        output tensor's name, which takes the place of the normalisation's output.
    """
    affines: dict[str, tuple[Float64, Float64]] = {}
    for node in [node for node in graph.nodes if node.op in ("Conv", PLACEHOLDER)]:
        readers = node.outputs[0].outputs
        if len(readers) != 1 or any(node.outputs[0] is output for output in graph.outputs):
            continue
        (follower,) = readers
        if follower.op != "BatchNormalization":
            continue
        if node.op == PLACEHOLDER and len(node.attrs["shape"]) == 2:
            continue  # of tokens, a normalisation's channels are the tokens
        fixed = follower.inputs[1:] + (node.inputs[1:] if node.op == "Conv" else [])
        if not all(isinstance(tensor, gs.Constant) for tensor in fixed):
            continue
        weight, bias, mean, variance, *own = (t.values.astype(np.float64) for t in fixed)
        scale = weight / np.sqrt(variance + follower.attrs.get("epsilon", 1e-5))
        shift = bias - mean * scale
        (output,) = follower.outputs[:1]
        if node.op == PLACEHOLDER:
            affines[output.name] = scale, shift
        else:
            kernel, name = own[0], node.inputs[1].name
            folded = {
                "folded": kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1)),
                "bias": shift + (own[1] * scale if len(own) > 1 else 0),
            }
            # New constants: the old ones may be shared with another convolution.
            constants = [
                gs.Constant(f"{name}.{part}.{node.outputs[0].name}", values.astype(np.float32))
                for part, values in folded.items()
            ]
            node.inputs = [node.inputs[0], *constants]
        follower.outputs.clear()
        node.outputs = [output]
    graph.cleanup()
    return affines


def split_means(graph: gs.Graph) -> None:
    """Take each mean or sum of several or long axes over one short axis after the other.

    ONNX Runtime adds all that a reduction or a pooling sees up in one running sum. Over a flat map
    every addition rounds the same way: the mean of 256×512 equal pixels errs by 1e-4 of its value,
    by 2e-7 over pieces of a row, rows and then columns. An attention that is driven by such a mean
    may amplify that, and flat frames, black or padded ones, are common.
    """
    for node in list(graph.nodes):
        shape = node.inputs[0].shape if node.inputs else None
        if shape is None or not all(isinstance(length, int) for length in shape):
            continue
        axes = _axes(node, list(shape))
        if len(axes) > 1 or any(_piece(shape[axis]) > 1 for axis in axes):
            _split(graph, node, list(shape), axes)
    graph.cleanup().toposort()


def _axes(node: gs.Node, shape: list[int]) -> list[int]:
    """The axes that a node takes the mean or the sum over; none if it does something else."""
    spatial = list(range(2, len(shape)))
    if node.op == "GlobalAveragePool":
        return spatial
    if node.op == "AveragePool":
        padded = any(node.attrs.get("pads", [])) or node.attrs.get("auto_pad", "NOTSET") != "NOTSET"
        whole = list(node.attrs["kernel_shape"]) == shape[2:] and not padded
        return spatial if whole else []
    if node.op not in SPREAD:
        return []
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if isinstance(given, gs.Constant) and given.values.size:
        return sorted(int(axis) % len(shape) for axis in np.ravel(given.values))
    over_all = given is None and not node.attrs.get("noop_with_empty_axes", 0)
    return list(range(len(shape))) if over_all else []


def _piece(length: int) -> int:
    """The length of an axis' pieces: its divisor nearest to its root, 1 where it is short."""
    if length <= LONG:
        return 1
    return max(n for n in range(1, math.isqrt(length) + 1) if length % n == 0)


def _split(graph: gs.Graph, node: gs.Node, shape: list[int], axes: list[int]) -> None:
    kind = node.op if node.op in SPREAD else "ReduceMean"
    keep = int(node.attrs.get("keepdims", 1)) if node.op in SPREAD else 1
    value, output = node.inputs[0], node.outputs[0]
    node.inputs.clear()
    node.outputs.clear()

    def add(
        op: str, name: str, second: list[int], result: gs.Variable | None, **attrs: int
    ) -> None:
        nonlocal value
        name = f"{node.name}.{name}"
        constant = gs.Constant(f"{name}.with", np.array(second, np.int64))
        result = result or gs.Variable(name, dtype=output.dtype or np.float32)
        graph.nodes.append(gs.Node(op, name, attrs, inputs=[value, constant], outputs=[result]))
        value = result

    # The last axis first: its numbers lie side by side, and the others keep their places.
    for axis in reversed(axes):
        piece = _piece(shape[axis])
        if piece > 1:
            pieces = [shape[axis] // piece, piece]
            add("Reshape", f"pieces{axis}", [*shape[:axis], *pieces, *shape[axis + 1 :]], None)
            add(kind, f"piece{axis}", [axis + 1], None, keepdims=0)
        add(kind, f"axis{axis}", [axis], output if axis == axes[0] else None, keepdims=keep)
        shape[axis : axis + 1] = [1] if keep else []


def move_reshapes(graph: gs.Graph, nodes: Nodes) -> None:
    """Move reshapes of batched convolutions past a ReLU or a sum that alone reads them.

    A layer of batch B > 1 convolves ``(1, B·I, H, W)`` in B groups and gives its answer back as
    ``(B, O, H', W')``. Runtimes compute a ReLU and the addition of a shortcut within the
    convolution before it, but not past that reshape, so here it moves behind both.
    """
    for node in nodes.splits:
        while _move(node, graph, nodes):
            pass


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
    producer = producer_of(tensor)
    if producer is not None and producer.op == "Reshape":
        before = producer.inputs[0]
        if list(before.shape or []) == sizes:
            return before
    nodes.begin(name)
    return nodes.reshape("joined", tensor, *sizes)
