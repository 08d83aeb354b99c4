"""Q/DQ around plain convolutions: eight bits where FDConv has no part.

Weights are int8, symmetric, with a scale for each output channel; biases stay float32.
Activations have one scale for each tensor and one of two forms:

- ``unsigned``: uint8, zero point 0 where a tensor cannot be negative and 128 elsewhere. All
  eight bits of a Relu's output count, and ONNX Runtime fuses the Relu away.
- ``signed``: int8 with zero point 0, the only one that TensorRT takes.

A convolution's output is quantised as well (after its Relu), since ONNX Runtime computes in
integers only between two quantised tensors.

The first convolution, whose input is the image, and the last, whose output is the answer,
stay float32; so do FDConv layers, what the caller names, and convolutions too small for eight
bits to save anything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from fdconv_deploy.export.options import Activations
from fdconv_deploy.export.quantization.element_types import tensor_types
from fdconv_deploy.export.quantization.calibration import Magnitudes
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fdconv_deploy.profiling.layer_names import Label, label_nodes, matches, unknown_pattern

WEIGHT_LEVELS = 127
# A convolution with less than this share of all multiplications stays float32: pooled
# branches cost nothing, and what they lose, every pixel sees.
SMALLEST_SHARE = 1e-3
# Of inputs that are not negative they make outputs that are not.
KEEP_SIGN = frozenset(
    """MaxPool AveragePool GlobalAveragePool Concat Reshape Flatten Transpose Identity Add Mul
    Slice Split Squeeze Unsqueeze MatMul""".split()
)


@dataclass(frozen=True)
class QuantizedConv:
    """A convolution to be computed in eight bits; tensors by name.

    output: after the Relu, if that alone reads the convolution. key: the same in the graphs
    of all batch sizes.
    """

    key: str
    node: str
    module: str
    input: str
    weight: str
    output: str


def quantizable(
    model: ModelProto, layers: Collection[str], keep: Iterable[str] = ()
) -> list[QuantizedConv]:
    """The convolutions to quantise, in the graph's order.

    Raises:
        ExportError: a pattern of ``keep`` means nothing in this graph.
    """
    nodes = list(model.graph.node)
    labels = label_nodes(model, layers)
    patterns = list(keep)
    for pattern in patterns:
        if not any(matches(pattern, label) for label in labels):
            raise unknown_pattern(pattern, labels)
    constants = {tensor.name for tensor in model.graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {output.name for output in model.graph.output}
    work = _multiplications(model)
    ends = _first(nodes, model) | _last(nodes, outputs)
    found: list[QuantizedConv] = []
    for index, (node, label) in enumerate(zip(nodes, labels, strict=True)):
        if node.op_type != "Conv" or index in ends or _stays(label, patterns):
            continue
        if node.input[1] not in constants:
            continue
        if work[node.name] < SMALLEST_SHARE * sum(work.values()):
            continue
        output = node.output[0]
        after = readers.get(output, [])
        if len(after) == 1 and after[0].op_type == "Relu" and output not in outputs:
            output = after[0].output[0]
        # A module may be used more than once.
        uses = sum(conv.module == label.module for conv in found)
        key = f"{label.module}.use{uses}"
        found.append(
            QuantizedConv(key, node.name, label.module, node.input[0], node.input[1], output)
        )
    return found


def _multiplications(model: ModelProto) -> dict[str, int]:
    """Of each constant convolution, by its node's name."""
    types = tensor_types(model)
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return {
        node.name: math.prod(types[node.output[0]].shape or ())
        * math.prod(weights[node.input[1]][1:])
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1] in weights
    }


def _stays(label: Label, patterns: Collection[str]) -> bool:
    return label.layer is not None or any(matches(pattern, label) for pattern in patterns)


def _first(nodes: list[NodeProto], model: ModelProto) -> set[int]:
    """Convolutions that see the graph's input and no other convolution's output."""
    raw = {value.name for value in model.graph.input}
    found = set()
    for index, node in enumerate(nodes):
        if not any(name in raw for name in node.input):
            continue
        if node.op_type == "Conv":
            found.add(index)
        else:
            raw.update(node.output)
    return found


def _last(nodes: list[NodeProto], outputs: Collection[str]) -> set[int]:
    """Convolutions whose output becomes an answer through no other convolution."""
    final, found = set(outputs), set()
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        if not any(name in final for name in node.output):
            continue
        if node.op_type == "Conv":
            found.add(index)
        else:
            final.update(node.input)
    return found


def never_negative(model: ModelProto) -> set[str]:
    """Tensors that cannot hold a negative value, whatever the input."""
    found = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and (numpy_helper.to_array(tensor) >= 0).all()
    }
    integers = {t.name for t in model.graph.initializer if t.data_type != TensorProto.FLOAT}
    for node in model.graph.node:
        inputs = [name for name in node.input if name and name not in integers]
        if node.op_type in ("Relu", "Sigmoid", "Softmax", "Abs", "Sqrt") or (
            (node.op_type in KEEP_SIGN or _linear_resize(node)) and found.issuperset(inputs)
        ):
            found.update(node.output)
    return found


def _linear_resize(node: NodeProto) -> bool:
    # Cubic interpolation undershoots.
    modes = [a.s for a in node.attribute if a.name == "mode"] or [b"nearest"]
    return node.op_type == "Resize" and modes[0] in (b"nearest", b"linear")


@dataclass(frozen=True)
class Steps:
    """A tensor's quantisation: value = (integer - zero) · scale."""

    scale: float
    zero: np.uint8 | np.int8


def activation_steps(
    model: ModelProto, seen: Mapping[str, Magnitudes], form: Activations
) -> dict[str, Steps]:
    """Scales and zero points from what a calibration has seen of each tensor."""
    positive = never_negative(model) if form == "unsigned" else set()
    steps = {}
    for name, magnitudes in seen.items():
        if name in positive:
            steps[name] = Steps(magnitudes.scale(255), np.uint8(0))
        else:
            zero = np.uint8(128) if form == "unsigned" else np.int8(0)
            steps[name] = Steps(magnitudes.scale(127), zero)
    return steps


def quantize(model: ModelProto, convs: Iterable[QuantizedConv], steps: Mapping[str, Steps]) -> None:
    """Insert the Q/DQ pairs in place.

    Args:
        convs: of this model, from `quantizable`.
        steps: by tensor, of every convolution's input and output.
    """
    chosen = {conv.node: conv for conv in convs}
    rounded = {name for conv in chosen.values() for name in (conv.input, conv.output)}
    weights = {conv.weight for conv in chosen.values()}
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    still_read = {
        name
        for node in graph.node
        for name in node.input
        if not (node.name in chosen and name == chosen[node.name].weight)
    }
    zeros = {repr(s.zero): s.zero for s in steps.values()}
    added = [_tensor(f"zero.{z.dtype.name}.{int(z)}", z) for z in zeros.values()]
    nodes: list[NodeProto] = []

    def pair(tensor: str) -> None:
        scale, zero = f"{tensor}.scale", steps[tensor].zero
        added.append(_tensor(scale, np.float32(steps[tensor].scale)))
        for op, source, result in (
            ("QuantizeLinear", tensor, f"{tensor}.quantized"),
            ("DequantizeLinear", f"{tensor}.quantized", f"{tensor}.dequantized"),
        ):
            inputs = [source, scale, f"zero.{zero.dtype.name}.{int(zero)}"]
            nodes.append(helper.make_node(op, inputs, [result], name=f"{result}.{op}"))

    for name in sorted(weights):
        values = numpy_helper.to_array(initializers[name])
        added += _quantized_weight(name, values)
    for name in [value.name for value in graph.input if value.name in rounded]:
        pair(name)
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in rounded:
                node.input[place] = f"{name}.dequantized"
        if node.name in chosen:
            weight = chosen[node.name].weight
            result = f"{weight}.dequantized.{node.output[0]}"
            inputs = [f"{weight}.int8", f"{weight}.scale", f"{weight}.zero"]
            nodes.append(
                helper.make_node("DequantizeLinear", inputs, [result], name=result, axis=0)
            )
            node.input[1] = result
        nodes.append(node)
        for name in node.output:
            if name in rounded:
                pair(name)
    kept = [t for t in graph.initializer if t.name not in weights or t.name in still_read]
    tensors = [TensorProto.FromString(t.SerializeToString()) for t in (*kept, *added)]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.initializer[:], graph.node[:], graph.value_info[:]
    graph.initializer.extend(tensors)
    graph.node.extend(copies)


def _quantized_weight(name: str, values: np.ndarray) -> list[TensorProto]:
    largest = np.abs(values).reshape(len(values), -1).max(1)
    scale = np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(WEIGHT_LEVELS)
    shape = (-1, *[1] * (values.ndim - 1))
    steps = (
        np.rint(values / scale.reshape(shape)).clip(-WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8)
    )
    return [
        _tensor(f"{name}.int8", steps),
        _tensor(f"{name}.scale", scale),
        _tensor(f"{name}.zero", np.zeros(len(values), np.int8)),
    ]


def _tensor(name: str, values: np.ndarray | np.generic) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values), name)
