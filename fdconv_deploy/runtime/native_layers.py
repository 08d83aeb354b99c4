"""A graph's FDConv layers as the native operators take them: what every native way begins with.

- A layer's attentions are one node. An export computes them in about ten of standard operators, of
  which each takes longer to start than to run.
- A layer has one convolution. An export convolves by kernel rows where stock ONNX Runtime is faster
  so, since that saves a transposition of the kernels; native operators write them in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fdconv_deploy.ops.native import loan_number
from fdconv_deploy.runtime.bundle import Bytes
from fdconv_deploy.runtime.onnx_graph import (
    GraphIndex,
    Shape,
    attributes,
    import_domain,
    make_node,
    read_model,
    set_attribute,
    set_nodes,
    shape_of,
)

# Of operators that no exported graph has, and of those that it has functions for.
DOMAIN, FUNCTIONS = "fdconv.nchwc", "fdconv"
ASSEMBLY, BANDS = "FrequencyAssembly", "FrequencyBandModulation"
BAND_ATTRIBUTES = ("layer", "groups", "feature_size", "complex_rows", "softmax")
Shapes = Mapping[str, Shape | None]


@dataclass(frozen=True)
class NativeGraph:
    """A ``ModelProto`` that only the native operators run, and the files of its constants."""

    model: Any
    files: dict[str, Bytes]

    @property
    def has_functions(self) -> bool:
        """Whether a node is one of the functions that the exported graph has."""
        return any(node.domain == FUNCTIONS for node in self.model.graph.node)

    def lend_constants(self) -> dict[int, list[NDArray[Any]]]:
        """Take the spectra and their groups out of the graph; by node's number, for `lent`."""
        graph, loans = self.model.graph, dict[int, list[NDArray[Any]]]()
        index = GraphIndex(graph, self.files)
        for node in index.nodes:
            if node.op_type.startswith(ASSEMBLY):
                found = [v for n in node.input[1:4] if (v := index.values(n)) is not None]
                if len(found) == 3:
                    number = loan_number()
                    loans[number] = found
                    del node.input[1:4]
                    set_attribute(node, "lent", number)
        set_nodes(graph, index.nodes)
        return loans


def native_graph(model: bytes, external: Mapping[str, Bytes]) -> NativeGraph:
    """A graph in its export's layout, as `fuse_layers` has it, bands modulated channels last."""
    fused = fuse_layers(model, external)
    index = GraphIndex(fused.model.graph, external)
    nodes: list[Any] = []
    for node in index.nodes:
        bands = node.domain == FUNCTIONS and node.op_type.startswith(BANDS)
        nodes += _channels_last(index, node) if bands else [node]
    set_nodes(fused.model.graph, nodes)
    return fused


def _channels_last(index: GraphIndex, node: Any) -> list[Any]:
    """A band modulation between two transpositions; as it is where channels are no whole vectors.

    These cost less than the products save that have channels in a vector's lanes, and OpenVINO's
    convolutions have them so.
    """
    weight = index.constants.get(node.input[1])
    channels = 1 if weight is None else weight.dims[0]
    if channels % 8:
        return [node]
    (x, *constants), (y,), given = node.input, node.output, attributes(node)
    kept = {name: given[name] for name in BAND_ATTRIBUTES}
    block = 8 if channels % 16 else 16
    return [
        make_node("Transpose", [x], [f"{y}/input"], perm=[0, 2, 3, 1]),
        make_node(
            BANDS, [f"{y}/input", *constants], [f"{y}/channels_last"], DOMAIN, block=block,
            channels_last=1, **kept,
        ),
        make_node("Transpose", [f"{y}/channels_last"], [y], perm=[0, 3, 1, 2]),
    ]  # fmt: skip


def fuse_layers(model: bytes, external: Mapping[str, Bytes]) -> NativeGraph:
    """One node in the place of each layer's attentions, and one in that of its convolutions.

    What is not as an export writes it stays. model, external: a graph, with its functions, and the
    files that it keeps constants in.
    """
    fused = NativeGraph(read_model(model), dict(external))
    graph = fused.model.graph
    index = GraphIndex(graph, external)
    layers = [node for node in index.nodes if is_assembly(node)]
    joined = _joined_rows(index, layers)
    replaced = {**_fused_attentions(graph, index, layers), **joined}
    # Their shapes in the file are of kernels by rows.
    kernels = {node.input[1] for node in joined.values()}
    for value in [value for value in graph.value_info if value.name in kernels]:
        graph.value_info.remove(value)
    nodes = (replaced.get(number, node) for number, node in enumerate(index.nodes))
    set_nodes(graph, (node for node in nodes if node is not None))
    import_domain(fused.model, DOMAIN)
    return fused


def is_assembly(node: Any) -> bool:
    """Whether a node is a layer's assembly as exported."""
    return node.domain == FUNCTIONS and bool(node.op_type.startswith(ASSEMBLY))


def gates_of(index: GraphIndex, attention: str) -> str:
    """The matrix of all of a layer's gates, of which its kernel attention is the first."""
    split = index.producer(attention, "Split")
    return attention if split is None else str(split.input[0])


def _joined_rows(index: GraphIndex, layers: list[Any]) -> dict[int, Any]:
    """By the number of the node whose place it takes, a convolution with whole kernels."""
    joined = {}
    for node in layers:
        given = attributes(node)
        if given.get("by_rows") and (found := _convolution_by_rows(index, node.output[0])):
            inputs, output, group = found
            geometry = {name: given[name] for name in ("strides", "pads", "dilations")}
            made = make_node("Conv", inputs, [output], group=group, **geometry)
            joined[index.producers[output]] = made
            node.op_type = node.op_type.replace("_ByRows", "")
            set_attribute(node, "by_rows", 0)
    return joined


def _convolution_by_rows(index: GraphIndex, kernels: str) -> tuple[list[str], str, int] | None:
    """Inputs, output and group of the one convolution; None where it is not as exported."""
    rows: list[Any] = []
    waiting = [kernels]
    while waiting:
        name = waiting.pop(0)
        if name in index.kept:
            return None
        for reader in (index.nodes[number] for number in index.readers[name]):
            if reader.op_type in ("Split", "Reshape") and reader.input[0] == name:
                waiting += reader.output
            elif reader.op_type == "Conv" and reader.input[1] == name:
                rows.append(reader)
            else:
                return None
    sources, biases = set(), []
    for row in rows:
        cut = index.producer(row.input[0], "Slice")
        sources.add((cut or row).input[0])
        biases += row.input[2:]
    # From the sum of the last two rows backwards, all that is added are rows.
    total = rows[0].output[0] if rows else ""
    for _ in rows[1:]:
        node = index.only_reader(total, "Add")
        if node is None:
            return None
        total = node.output[0]
    added = _added(index, total)
    if len(sources) != 1 or len(biases) > 1 or added != {row.output[0] for row in rows}:
        return None
    return [sources.pop(), kernels, *biases], total, attributes(rows[0]).get("group", 1)


def _added(index: GraphIndex, total: str) -> set[str]:
    node = index.producer(total, "Add")
    return {total} if node is None else set().union(*(_added(index, x) for x in node.input))


def _fused_attentions(graph: Any, index: GraphIndex, layers: list[Any]) -> dict[int, Any]:
    """By the number of the first node whose answer it gives, a layer's attentions; None: others."""
    shapes = {v.name: shape_of(v) for v in (*graph.input, *graph.value_info, *graph.output)}
    fused: dict[int, Any] = {}
    for node in layers:
        gates = gates_of(index, node.input[0])
        if index.producers.get(gates) in (None, *fused):
            continue
        found = _attention(index, shapes, gates)
        if found is None:
            continue
        average, inputs, given = found
        outputs = [gates]
        for name in node.input:
            norm = index.producer(name, "LayerNormalization")
            # Of the average, as the local attention takes it.
            if norm is None or norm.input[0] != average or len(norm.input) != 3:
                continue
            if index.producers[name] not in fused:
                outputs.append(name)
                inputs += norm.input[1:]
                given["local_epsilon"] = attributes(norm).get("epsilon", 1e-5)
                break
        first, *others = sorted(index.producers[name] for name in outputs)
        fused[first] = make_node(
            "KernelAttention", inputs, outputs, DOMAIN, block=0, layer=attributes(node)["layer"],
            local=len(outputs) - 1, **given,
        )  # fmt: skip
        fused.update(dict.fromkeys(others))
    return fused


def _attention(
    index: GraphIndex, shapes: Shapes, gates: str
) -> tuple[str, list[str], dict[str, Any]] | None:
    """All that leads from a layer's input to its gates: average, a node's inputs, attributes."""
    logits, softmax, sizes = _activations(index, gates)
    heads = _affine(index, logits)
    if heads is None or not sizes:
        return None
    product = index.producer(heads[0], "Mul")
    squared = product is not None and product.input[0] == product.input[1]
    relu = index.producer(product.input[0] if squared else heads[0], "Relu")
    if relu is None:
        return None
    name, norm, given = _norm(index, relu.input[0])
    first = _affine(index, name)
    x = None if first is None else _averaged(index, shapes, first[0])
    if first is None or x is None:
        return None
    given |= {"softmax": int(softmax), "squared": int(squared), "head_sizes": sizes}
    return first[0], [x, *first[1:], *norm, *heads[1:]], given


def _activations(index: GraphIndex, gates: str) -> tuple[str, bool, list[int]]:
    """Logits, whether each head is a softmax, and the heads' lengths."""
    node = index.producer(gates, "Sigmoid", "Softmax", "Concat")
    if node is None:
        return "", False, []
    if node.op_type != "Concat":
        gemm = index.producer(node.input[0], "Gemm")
        weight = None if gemm is None else index.constants.get(gemm.input[1])
        length = [] if weight is None else [int(weight.dims[0])]
        return node.input[0], node.op_type == "Softmax", length
    parts: list[Any] = [index.path(name, "Softmax", "Split") for name in node.input]
    split = None if None in parts else parts[0][1]
    if split is None or [part[0].input[0] for part in parts] != list(split.output):
        return "", False, []
    lengths = index.values(split.input[1])
    return split.input[0], True, [] if lengths is None else lengths.tolist()


def _affine(index: GraphIndex, name: str) -> tuple[str, str, str] | None:
    """Input, weight and bias of a linear layer."""
    node = index.producer(name, "Gemm")
    if node is None or len(node.input) != 3 or attributes(node) != {"transB": 1}:
        return None
    x, weight, bias = node.input
    return (x, weight, bias) if {weight, bias} <= set(index.constants) else None


def _norm(index: GraphIndex, name: str) -> tuple[str, list[str], dict[str, Any]]:
    """What is normalised, the norm's constants and attributes."""
    if (node := index.producer(name, "LayerNormalization")) is not None:
        given = {"norm": 1, "norm_epsilon": attributes(node).get("epsilon", 1e-5)}
        return node.input[0], list(node.input[1:]), given
    if index.producer(name, "Mul") is None:
        return name, [], {"norm": 0}
    found = index.path(name, "Mul", "Div 1", "Sqrt", "Add 1")
    epsilon = None if found is None else index.values(found[-1].input[1])
    if found is None or epsilon is None:
        return "", [], {}
    weighted, scaled, *_ = found
    given = {"norm": 2, "norm_epsilon": float(epsilon[0])}
    return scaled.input[0], [weighted.input[1]], given


def _averaged(index: GraphIndex, shapes: Shapes, average: str) -> str | None:
    """What a (images, channels) mean is the mean of: features or tokens."""
    chain: list[tuple[Any, list[int]]] = []
    name = average
    while (node := index.producer(name, "ReduceMean", "Reshape")) is not None:
        values = index.values(node.input[1]) if len(node.input) == 2 else None
        if values is None:
            return None
        chain.insert(0, (node, values.tolist()))
        name = node.input[0]
        if (shape := shapes.get(name)) is not None and _means(list(shape), chain):
            return name
    return None


def _means(sizes: list[int], chain: list[tuple[Any, list[int]]]) -> bool:
    """Whether nodes, each with its constant, take the mean over all positions of a shape."""
    # Each place's axis: images, channels or positions.
    kinds = {4: ["n", "c", "p", "p"], 3: ["n", "p", "c"]}.get(len(sizes), [])
    if not kinds:
        return False
    for node, values in chain:
        if node.op_type == "Reshape":  # of a long axis into two
            at = next((i for i, n in enumerate(sizes) if n != values[i]), len(sizes) - 1)
            if sizes[:at] + values[at : at + 2] + sizes[at + 1 :] != values:
                return False
            if kinds[at] != "p" or values[at] * values[at + 1] != sizes[at]:
                return False
            sizes, kinds = values, [*kinds[:at], "p", *kinds[at:]]
        elif attributes(node).get("keepdims", 1):
            return False
        else:
            for axis in sorted((axis % len(kinds) for axis in values), reverse=True):
                sizes = sizes[:axis] + sizes[axis + 1 :]
                if kinds.pop(axis) != "p":
                    return False
    return kinds == ["n", "c"]
