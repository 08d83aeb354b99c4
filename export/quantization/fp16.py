"""A finished float32 graph -> a strongly typed one that computes mostly in float16.

Every tensor gets one element type and casts stand where two types meet, so a runtime decides
nothing: TensorRT 11, which knows no precision flags, takes the file as it is. What the graph
takes and gives stays float32.

What stays float32: the ``fdconv`` operators and everything that makes a kernel, from the
pooled average on (a kernel is cast once, at its convolution); normalisations, softmaxes,
global averages; what the caller names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from fdconv_deploy.export.quantization.element_types import (
    Parameter,
    signature,
    standard_opset,
    tensor_types,
)
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fdconv_deploy.errors import ExportError
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.profiling.layer_names import Label, label_nodes, matches, unknown_pattern

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
    """What the pass did. ``values``: weights now float16, ``flushed``: of those, not zero before
    and zero now; ``subnormal``: stored with fewer than 11 bits. ``kept``: module paths that
    stay float32 because the caller said so."""

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
        layers: names of the network's FDConv layers.
        keep: paths of modules, or shell patterns of them, that stay float32.

    Raises:
        ExportError: a pattern means nothing, a weight is too large for float16, or the graph
            branches.
    """
    return _Converter(model, layers, list(keep)).convert()


class _Converter:
    def __init__(self, model: ModelProto, layers: Collection[str], keep: list[str]) -> None:
        self.model, self.graph = model, model.graph
        _lift_constants(model)
        self.opset = standard_opset(model)
        self.labels = label_nodes(model, layers)
        self.types = {name: t.element for name, t in tensor_types(model).items()}
        self.initializers = {t.name: t for t in self.graph.initializer}
        self.report = HalfReport()
        self.keep = keep
        self.nodes: list[NodeProto] = []
        self.made: dict[tuple[str, int], str] = {}
        self.wanted: dict[str, set[int]] = defaultdict(set)

    def convert(self) -> HalfReport:
        """Decide, then rewrite."""
        single = self._single()
        outputs = {output.name for output in self.graph.output}
        nodes = list(self.graph.node)
        for index, node in enumerate(nodes):
            for _, name, want in self._floats(node, index in single):
                self.wanted[name].add(want)
        for name, tensor in self.initializers.items():
            if tensor.data_type == SINGLE and HALF in self.wanted[name]:
                self._check_range(tensor, nodes, single)
        for index, node in enumerate(nodes):
            self._rewrite(node, index in single, outputs)
        self._write_initializers(outputs)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        del self.graph.value_info[:]
        self.report.single_nodes, self.report.half_nodes = len(single), len(nodes) - len(single)
        return self.report

    def _single(self) -> set[int]:
        nodes = list(self.graph.node)
        single = kernel_makers(nodes, self.labels)
        for pattern in self.keep:
            found = {i for i, label in enumerate(self.labels) if matches(pattern, label)}
            if not found:
                raise unknown_pattern(pattern, self.labels)
            single |= found
            self.report.kept.append(pattern)
        for index, node in enumerate(nodes):
            if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
                raise ExportError(
                    f"the graph branches or loops ({node.op_type} {node.name!r}), which the fp16 "
                    "conversion does not take. Export it in fp32."
                )
            # An operator of another domain has no schema to ask.
            standard = node.domain in ("", "ai.onnx") and node.op_type not in SINGLE_OPERATORS
            if not standard or not any(map(_may_be_half, signature(node, self.opset)[0])):
                single.add(index)
        self._leave_movers(nodes, single)
        return single

    def _leave_movers(self, nodes: Sequence[NodeProto], single: set[int]) -> None:
        """What only moves float32 values from one float32 node to another stays float32."""
        producers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
        readers: dict[str, set[int]] = defaultdict(set)
        for index, node in enumerate(nodes):
            for name in node.input:
                readers[name].add(index)
        changed = True
        while changed:
            changed = False
            for index, node in enumerate(nodes):
                if index in single or node.op_type not in MOVERS:
                    continue
                before = {producers.get(n, -1) for n in node.input if self._is_float(n)}
                after = {i for name in node.output for i in readers[name]}
                if before <= single and after and after <= single:
                    single.add(index)
                    changed = True

    def _is_float(self, name: str) -> bool:
        return bool(name) and self.types[name] == SINGLE

    def _floats(self, node: NodeProto, single: bool) -> list[tuple[int, str, int]]:
        """Place, name and wanted type of each float32 input."""
        if single:
            return [(i, n, SINGLE) for i, n in enumerate(node.input) if self._is_float(n)]
        inputs, _ = signature(node, self.opset)
        return [
            (place, name, HALF if _may_be_half(parameter) else SINGLE)
            for place, (name, parameter) in enumerate(zip(node.input, inputs, strict=True))
            if self._is_float(name)
        ]

    def _rewrite(self, node: NodeProto, single: bool, outputs: Collection[str]) -> None:
        halves = set()
        for place, name, want in self._floats(node, single):
            node.input[place] = self._as(name, want)
            if want == HALF:
                halves.add(signature(node, self.opset)[0][place].variable)
        self.nodes.append(node)
        if not halves:
            return
        _, results = signature(node, self.opset)
        for place, parameter in enumerate(results):
            name = node.output[place]
            if not self._is_float(name) or parameter.variable not in halves:
                continue
            if name in outputs:
                node.output[place] = f"{name}.fp16"
                self.made[name, HALF] = node.output[place]
                self._cast(node.output[place], name, SINGLE)
                self.made[name, SINGLE] = name
            else:
                self.made[name, HALF] = name

    def _as(self, name: str, want: int) -> str:
        """The name under which a tensor is there in the type wanted, cast if need be."""
        if (name, want) in self.made:
            return self.made[name, want]
        if name in self.initializers:
            alone = self.wanted[name] == {want}
            self.made[name, want] = name if alone or want == SINGLE else f"{name}.fp16"
            return self.made[name, want]
        source = self.made.get((name, HALF if want == SINGLE else SINGLE), name)
        if want == SINGLE and source == name and (name, HALF) not in self.made:
            self.made[name, SINGLE] = name  # it never was anything else
            return name
        self.made[name, want] = f"{name}.fp{16 if want == HALF else 32}"
        self._cast(source, self.made[name, want], want)
        return self.made[name, want]

    def _cast(self, source: str, result: str, to: int) -> None:
        self.nodes.append(
            helper.make_node("Cast", [source], [result], name=f"{result}.cast", to=to)
        )
        self.report.casts += 1

    def _check_range(
        self, tensor: TensorProto, nodes: Sequence[NodeProto], single: Collection[int]
    ) -> None:
        values = numpy_helper.to_array(tensor)
        half = _rounded(values)
        lost = np.isinf(half) & np.isfinite(values)
        if lost.any():
            reader = next(
                label.layer or label.module
                for i, (node, label) in enumerate(zip(nodes, self.labels, strict=True))
                if i not in single and tensor.name in node.input
            )
            raise ExportError(
                f"{tensor.name!r} holds {np.abs(values[lost]).max():.3g}, and float16 ends at "
                f"{LARGEST:.0f}. Keep its module in float32: --keep-fp32 {reader!r}."
            )
        magnitude = np.abs(half)
        self.report.values += values.size
        self.report.flushed += int(((magnitude == 0) & (values != 0)).sum())
        self.report.subnormal += int(((magnitude > 0) & (magnitude < SMALLEST_NORMAL)).sum())

    def _write_initializers(self, outputs: Collection[str]) -> None:
        kept = []
        for name, tensor in self.initializers.items():
            if tensor.data_type != SINGLE or HALF not in self.wanted[name]:
                kept.append(tensor)
                continue
            half = _rounded(numpy_helper.to_array(tensor))
            kept.append(numpy_helper.from_array(half, self.made[name, HALF]))
            if SINGLE in self.wanted[name] or name in outputs:
                kept.append(tensor)
        # Copied out first: assigning clears what `kept` would still refer to.
        copies = [TensorProto.FromString(t.SerializeToString()) for t in kept]
        del self.graph.initializer[:]
        self.graph.initializer.extend(copies)


def _rounded(values: NDArray) -> NDArray[np.float16]:
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16)


def _may_be_half(parameter: Parameter) -> bool:
    return {"tensor(float16)", "tensor(float)"} <= parameter.allowed


def _lift_constants(model: ModelProto) -> None:
    """Float ``Constant`` nodes become initializers, which are converted rather than cast."""
    kept = []
    for node in model.graph.node:
        value = node.attribute[0] if node.op_type == "Constant" else None
        if value is not None and value.name == "value" and value.t.data_type == SINGLE:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(value.t)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    if len(kept) != len(model.graph.node):
        copies = [NodeProto.FromString(node.SerializeToString()) for node in kept]
        del model.graph.node[:]
        model.graph.node.extend(copies)
