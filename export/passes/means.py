"""Means and sums over several axes, taken over one short axis after the other.

ONNX Runtime adds all that a reduction or a pooling sees up in one running sum. Over a flat map
every addition rounds the same way: the mean of 256×512 equal pixels errs by 1e-4 of its value,
by 2e-7 over pieces of a row, rows and then columns. An attention that is driven by such a mean
may amplify that, and flat frames, black or padded ones, are common.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

SPREAD = ("ReduceMean", "ReduceSum")
# An axis longer than this is cut into pieces.
LONG = 128


def split_means(graph: gs.Graph) -> None:
    """Rewrite, in place, each mean or sum of several or long axes and each global pooling."""
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
