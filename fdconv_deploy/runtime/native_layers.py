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
ATTENTION, BY_ROWS = "KernelAttention", "ConvolutionByRows"
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
    functions = [node for node in index.nodes if node.domain == FUNCTIONS]
    for node in functions:
        if node.op_type.startswith(ATTENTION):
            node.op_type, node.domain = ATTENTION, DOMAIN
            set_attribute(node, "block", 0)
    by_rows = [node for node in functions if node.op_type.startswith(BY_ROWS)]
    kernels = {node.input[1] for node in by_rows if _join_rows(index, node)}
    # Their shapes in the file are of kernels by rows.
    for value in [value for value in graph.value_info if value.name in kernels]:
        graph.value_info.remove(value)
    set_nodes(graph, index.nodes)
    import_domain(fused.model, DOMAIN)
    return fused


def is_assembly(node: Any) -> bool:
    """Whether a node is a layer's assembly as exported."""
    return node.domain == FUNCTIONS and bool(node.op_type.startswith(ASSEMBLY))


def _join_rows(index: GraphIndex, node: Any) -> bool:
    """Let a node be one convolution with whole kernels, if it alone reads them; whether it is."""
    assembly = index.producer(node.input[1])
    if assembly is None or not is_assembly(assembly) or index.only_reader(node.input[1]) is None:
        return False
    assembly.op_type = assembly.op_type.replace("_ByRows", "")
    set_attribute(assembly, "by_rows", 0)
    given = attributes(node)
    geometry = {name: given[name] for name in ("strides", "pads", "dilations", "group")}
    node.CopyFrom(make_node("Conv", node.input, node.output, **geometry))
    return True
