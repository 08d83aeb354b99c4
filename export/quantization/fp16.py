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
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fdconv_deploy.errors import ExportError
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
# Shapes and axes are what inference must read; tensors above this are weights.
SMALL_BYTES = 1024
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


@dataclass(frozen=True)
class TensorType:
    """``element``: a TensorProto type. ``shape``: None where inference did not find it."""

    element: int
    shape: tuple[int, ...] | None


def tensor_types(model: ModelProto) -> dict[str, TensorType]:
    """Types by tensor name, from ONNX's inference through the model's functions.

    Raises:
        ExportError: a tensor's element type cannot be inferred.
    """
    light = ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= SMALL_BYTES and tensor.data_type == TensorProto.INT64:
            light.graph.initializer.append(tensor)
        else:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            light.graph.input.append(value)
    # The outputs' types are to be found, not to be believed: a pass may have changed them.
    light.graph.output.extend(onnx.ValueInfoProto(name=o.name) for o in model.graph.output)
    try:
        inferred = onnx.shape_inference.infer_shapes(light, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"the graph's types cannot be inferred: {error}") from error
    found = {t.name: TensorType(t.data_type, tuple(t.dims)) for t in model.graph.initializer}
    graph = inferred.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shape = None
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shape = tuple(d.dim_value for d in kind.shape.dim)
        found[value.name] = TensorType(kind.elem_type, shape)
    for node in model.graph.node:
        for name in filter(None, node.output):
            if name not in found or found[name].element == TensorProto.UNDEFINED:
                raise ExportError(
                    f"the type of {name!r}, which {node.op_type} {node.name!r} gives, cannot be "
                    "inferred, so the graph's precision cannot be changed. Export it in fp32."
                )
    return found


def kept_nodes(labels: Sequence[Label], keep: Iterable[str]) -> set[int]:
    """Indices of the nodes of modules that stay float32, given by paths or shell patterns.

    Raises:
        ExportError: a pattern matches no module.
    """
    kept: set[int] = set()
    for pattern in keep:
        found = {i for i, label in enumerate(labels) if matches(pattern, label)}
        if not found:
            raise unknown_pattern(pattern, labels)
        kept |= found
    return kept


def _halves(node: NodeProto, opset: int) -> tuple[list[bool], list[bool]]:
    """Which inputs and outputs of a standard node are float16 where it computes in that."""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    both = {"tensor(float16)", "tensor(float)"}
    kinds = {c.type_param_str for c in schema.type_constraints if both <= set(c.allowed_type_strs)}
    taken, given = (  # the last may stand for many
        [formal[min(place, len(formal) - 1)].type_str for place in range(count)]
        for formal, count in (
            (list(schema.inputs), len(node.input)),
            (list(schema.outputs), len(node.output)),
        )
    )
    kinds.intersection_update(taken)
    return [kind in kinds for kind in taken], [kind in kinds for kind in given]


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
    graph = model.graph
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
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
        taken, given = ([], []) if index in single else _halves(node, opset)
        for place, name in enumerate(node.input):
            if types.get(name) not in (HALF, SINGLE):
                continue
            want = HALF if taken and taken[place] else SINGLE
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
        for place, half in enumerate(given):
            name = node.output[place]
            if types.get(name) != SINGLE or not half:
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
    single = kernel_makers(nodes, labels) | kept_nodes(labels, keep)
    for index, node in enumerate(nodes):
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise ExportError(
                f"the graph branches or loops ({node.op_type} {node.name!r}), which the fp16 "
                "conversion does not take. Export it in fp32."
            )
        # An operator of another domain has no schema to ask.
        standard = node.domain in ("", "ai.onnx") and node.op_type not in SINGLE_OPERATORS
        if not standard or not any(_halves(node, opset)[0]):
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
