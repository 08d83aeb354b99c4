"""A finished float32 graph -> a strongly typed one that computes mostly in float16.

Every tensor gets one element type and casts stand where two types meet, so a runtime decides
nothing: TensorRT 11, which knows no precision flags, takes the file as it is. What the graph
takes and gives stays float32.

What stays float32: the ``fdconv`` operators and everything that makes a kernel, from the
pooled average on (a kernel is cast once, at its convolution); normalisations, softmaxes,
global averages; what the caller names.

ONNX Runtime's own converter was tried (November 2026) and is not used: it rounds values between two
nodes that stay float32, and changes weights past float16's largest value without a word; its nodes
are out of order, which onnx's checker refuses; and the plugin pass cannot read its FDConv layers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.quantization.element_types import (
    Parameter,
    signature,
    standard_opset,
    tensor_types,
)
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.profiling import Label, label_nodes, matches, unknown_pattern

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT
LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)

# Sums over many values, exponentials, and divisions by small numbers.
SINGLE_OPERATORS = frozenset(
    """GlobalAveragePool GlobalLpPool ReduceMean ReduceSum ReduceSumSquare ReduceL1 ReduceL2
    ReduceProd ReduceLogSum ReduceLogSumExp CumSum Softmax LogSoftmax LayerNormalization
    InstanceNormalization GroupNormalization BatchNormalization LpNormalization
    MeanVarianceNormalization Exp Log Pow Reciprocal DFT""".split()
)
ASSEMBLY = "FrequencyAssembly"
POOLING = frozenset(["GlobalAveragePool", "ReduceMean", "ReduceSum"])
# They change no value: cheaper in the type that is there.
MOVERS = frozenset(
    "Reshape Flatten Transpose Squeeze Unsqueeze Slice Identity Split Concat Gather Expand".split()
)


@dataclass
class HalfReport:
    """What the pass did.

    values: weights now float16. flushed: of those, not zero before and zero now. subnormal: stored
    with fewer than 11 bits. kept: module paths that stay float32 at the caller's wish.
    """

    half_nodes: int = 0
    single_nodes: int = 0
    casts: int = 0
    values: int = 0
    flushed: int = 0
    subnormal: int = 0
    kept: list[str] = field(default_factory=list)


def kernel_makers(nodes: Sequence[NodeProto], labels: Sequence[Label]) -> set[int]:
    """Indices of the nodes of FDConv layers from which a convolution's kernel is made.

    From each kernel backwards, within its layer, to where features were pooled.
    """
    producers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    waiting = [
        producers[node.input[1]]
        for node, label in zip(nodes, labels, strict=True)
        if node.op_type == "Conv" and label.layer is not None and node.input[1] in producers
    ]
    waiting += [
        i for i, n in enumerate(nodes) if n.domain == DOMAIN and n.op_type.startswith(ASSEMBLY)
    ]
    found: set[int] = set()
    while waiting:
        index = waiting.pop()
        node = nodes[index]
        if index in found or labels[index].layer is None or node.op_type == "Conv":
            continue
        found.add(index)
        before = [producers[name] for name in node.input if name in producers]
        # A mean may be taken over one axis after the other.
        pools = node.op_type in POOLING
        waiting += [i for i in before if not pools or nodes[i].op_type in POOLING]
    return found


def to_half_precision(
    model: ModelProto, layers: Collection[str], keep: Iterable[str] = ()
) -> HalfReport:
    """Convert a model in place. Its initializers hold their data.

    Args:
        model: a float32 graph, nodes in the order in which they run.
        layers: names of the network's FDConv layers.
        keep: paths of modules, or shell patterns of them, that stay float32.

    Raises:
        ExportError: a pattern matches no module, a weight is too large for float16, or the
            graph branches.
    """
    graph, opset = model.graph, standard_opset(model)
    nodes, labels = list(graph.node), label_nodes(model, layers)
    types = {name: t.element for name, t in tensor_types(model).items()}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {output.name for output in graph.output}
    report = HalfReport(kept=list(keep))
    single = _single(nodes, labels, types, opset, report.kept)
    report.single_nodes, report.half_nodes = len(single), len(nodes) - len(single)
    written: list[NodeProto] = []

    def cast(source: str, result: str, to: int) -> None:
        written.append(helper.make_node("Cast", [source], [result], f"{result}.cast", to=to))
        types[result] = to
        report.casts += 1

    for index, (node, label) in enumerate(zip(nodes, labels, strict=True)):
        taken, given = ([], []) if index in single else signature(node, opset)
        halves = {p.variable for p in taken if _may_be_half(p)}
        for place, name in enumerate(node.input):
            if types.get(name) not in (HALF, SINGLE):
                continue
            want = HALF if taken and taken[place].variable in halves else SINGLE
            if types[name] == want:
                continue
            node.input[place] = f"{name}.fp{16 if want == HALF else 32}"
            if node.input[place] in types:
                continue
            if name in weights:
                rounded = _rounded(weights[name], label, report)
                graph.initializer.append(numpy_helper.from_array(rounded, node.input[place]))
                types[node.input[place]] = HALF
            else:
                cast(name, node.input[place], want)
        written.append(node)
        for place, parameter in enumerate(given):
            name = node.output[place]
            if types.get(name) != SINGLE or parameter.variable not in halves:
                continue
            if name in outputs:
                node.output[place] = f"{name}.fp16"
                types[node.output[place]] = HALF
                cast(node.output[place], name, SINGLE)
            else:
                types[name] = HALF
    read = outputs.union(*(node.input for node in written))
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(written)
    graph.initializer.extend(kept)
    return report


def _single(
    nodes: Sequence[NodeProto],
    labels: Sequence[Label],
    types: Mapping[str, int],
    opset: int,
    keep: Sequence[str],
) -> set[int]:
    """Indices of the nodes that stay float32."""
    single = kernel_makers(nodes, labels)
    for pattern in keep:
        found = {i for i, label in enumerate(labels) if matches(pattern, label)}
        if not found:
            raise unknown_pattern(pattern, labels)
        single |= found
    for index, node in enumerate(nodes):
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise ExportError(
                f"the graph branches or loops ({node.op_type} {node.name!r}), which the fp16 "
                "conversion does not take. Export it in fp32."
            )
        # An operator of another domain has no schema to ask.
        standard = node.domain in ("", "ai.onnx") and node.op_type not in SINGLE_OPERATORS
        if not standard or not any(map(_may_be_half, signature(node, opset)[0])):
            single.add(index)
    # What only moves float32 values from one float32 node to another stays float32.
    producers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    readers: dict[str, set[int]] = defaultdict(set)
    for index, node in enumerate(nodes):
        for name in node.input:
            readers[name].add(index)
    movers = {i for i, node in enumerate(nodes) if node.op_type in MOVERS}
    changed = True
    while changed:
        changed = False
        for index in movers - single:
            node = nodes[index]
            before = {producers.get(n, -1) for n in node.input if types.get(n) == SINGLE}
            after = {i for name in node.output for i in readers[name]}
            if before <= single and after and after <= single:
                single.add(index)
                changed = True
    return single


def _rounded(tensor: TensorProto, label: Label, report: HalfReport) -> NDArray[np.float16]:
    """A weight in float16; what that loses is counted, and refused where it is everything."""
    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore", under="ignore"):
        half = values.astype(np.float16)
    lost = np.isinf(half) & np.isfinite(values)
    if lost.any():
        raise ExportError(
            f"{tensor.name!r} holds {np.abs(values[lost]).max():.3g}, and float16 ends at "
            f"{LARGEST:.0f}. Keep its module in float32: --keep-fp32 "
            f"{label.layer or label.module!r}."
        )
    magnitude = np.abs(half)
    report.values += values.size
    report.flushed += int(((magnitude == 0) & (values != 0)).sum())
    report.subnormal += int(((magnitude > 0) & (magnitude < SMALLEST_NORMAL)).sum())
    return half


def _may_be_half(parameter: Parameter) -> bool:
    return {"tensor(float16)", "tensor(float)"} <= parameter.allowed


def rounding_model(model: ModelProto) -> ModelProto:
    """A converted model as one of float32 operators that rounds every result to float16.

    ONNX Runtime has few float16 operators for a CPU: it computes them in float32 and skips
    the rounding between them, so that what it answers is better than a GPU's answer. This
    model keeps each rounding; sums within an operator are float32, as they are in tensor cores.
    """
    types = {name: t.element for name, t in tensor_types(model).items()}
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        halves = [i for i, n in enumerate(node.input) if n and types[n] == HALF]
        if node.op_type == "Cast" or not halves:
            result.graph.node.append(node)
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        for place in halves:
            name = node.input[place]
            counts[name] += 1
            copy.input[place] = f"{name}.read{counts[name]}"
            result.graph.node.append(
                helper.make_node("Cast", [name], [copy.input[place]], to=SINGLE)
            )
        rounded = []
        for place, name in enumerate(node.output):
            if name and types[name] == HALF:
                copy.output[place] = f"{name}.exact"
                rounded.append(helper.make_node("Cast", [copy.output[place]], [name], to=HALF))
        result.graph.node.append(copy)
        result.graph.node.extend(rounded)
    del result.graph.value_info[:]
    return result
