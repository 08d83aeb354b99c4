"""A graph's FDConv layers as the native operators take them: what every native way begins with.

- A layer's attentions are the native operator. Its exported function is about ten nodes of standard
  operators, of which each takes longer to start than to run.
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
    attributes,
    import_domain,
    make_node,
    read_model,
    set_attribute,
    set_nodes,
)

# Of operators that no exported graph has, and of those that it has functions for.
DOMAIN, FUNCTIONS = "fdconv.nchwc", "fdconv"
ASSEMBLY, BANDS = "FrequencyAssembly", "FrequencyBandModulation"
ATTENTION = "KernelAttention"
BAND_ATTRIBUTES = ("layer", "groups", "feature_size", "complex_rows", "softmax")


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
    """The native operator in the place of each layer's attentions, one node in its convolutions'.

    What is not as an export writes it stays. model, external: a graph, with its functions, and the
    files that it keeps constants in.
    """
    fused = NativeGraph(read_model(model), dict(external))
    graph = fused.model.graph
    index = GraphIndex(graph, external)
    layers = [node for node in index.nodes if is_assembly(node)]
    joined = _joined_rows(index, layers)
    # Their shapes in the file are of kernels by rows.
    kernels = {node.input[1] for node in joined.values()}
    for value in [value for value in graph.value_info if value.name in kernels]:
        graph.value_info.remove(value)
    nodes = [joined.get(number, node) for number, node in enumerate(index.nodes)]
    for node in nodes:
        if node.domain == FUNCTIONS and node.op_type.startswith(ATTENTION):
            node.op_type, node.domain = ATTENTION, DOMAIN
            set_attribute(node, "block", 0)
    set_nodes(graph, nodes)
    import_domain(fused.model, DOMAIN)
    return fused


def is_assembly(node: Any) -> bool:
    """Whether a node is a layer's assembly as exported."""
    return node.domain == FUNCTIONS and bool(node.op_type.startswith(ASSEMBLY))


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
