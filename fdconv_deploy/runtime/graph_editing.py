"""Who gives and who reads the tensors of an ONNX graph, and changes of its nodes by that.

Graphs are messages of `onnx_messages`, or of the onnx package, whose fields have the same names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from numpy.typing import NDArray

from fdconv_deploy.runtime.bundle import Bytes
from fdconv_deploy.runtime.onnx_messages import tensor_values


class GraphIndex:
    """A graph's nodes, tensors' producers and readers; as it was when this was made.

    Attributes:
        nodes: the graph's. Others speak of them by their numbers in this list.
        producers, readers: nodes by the name of what they give and read.
        kept: names read from outside of the list: nothing may be fused past them.
        constants: the graph's, by name.

    Args:
        graph: the graph.
        external: the files that it keeps constants in.
    """

    def __init__(self, graph: Any, external: Mapping[str, Bytes]) -> None:
        self.nodes = list(graph.node)
        self.producers: dict[str, int] = {}
        self.readers: dict[str, list[int]] = defaultdict(list)
        self.kept = {value.name for value in graph.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self._external = external
        for number, node in enumerate(self.nodes):
            self.producers.update(dict.fromkeys(node.output, number))
            for name in node.input:
                self.readers[name].append(number)
            self.kept.update(captured(node))

    def producer(self, name: str, *operators: str) -> Any:
        """The node that gives a tensor; None where there is none, or none of those operators'."""
        number = self.producers.get(name)
        node = None if number is None else self.nodes[number]
        return node if node is None or not operators or node.op_type in operators else None

    def only_reader(self, name: str, *operators: str) -> int | None:
        """The node that alone reads a tensor; None where none does, or none of those operators'."""
        readers = self.readers[name]
        if len(readers) != 1 or name in self.kept:
            return None
        return readers[0] if not operators or self.nodes[readers[0]].op_type in operators else None

    def values(self, name: str) -> NDArray[Any] | None:
        """A constant's values; None where it is none."""
        tensor = self.constants.get(name)
        return None if tensor is None else tensor_values(tensor, self._external)


def set_nodes(graph: Any, nodes: Iterable[Any]) -> None:
    """Give a graph other nodes, but those, constants and shapes of which no output comes."""
    needed, kept = {value.name for value in graph.output}, []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            needed.update(node.input, captured(node))
            kept.append(node)
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    shapes = [value for value in graph.value_info if value.name in needed]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(constants)
    graph.value_info.extend(shapes)


def import_domain(model: Any, domain: str) -> None:
    """Let a model have operators of a domain's first version."""
    if all(known.domain != domain for known in model.opset_import):
        model.opset_import.add(domain=domain, version=1)


def captured(node: Any) -> set[str]:
    """Names that the graphs inside a node read."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            names.update(value.name for value in graph.output)
            for inner in graph.node:
                names.update(inner.input, captured(inner))
    return names


def copied(node: Any, inputs: Iterable[str], outputs: Iterable[str]) -> Any:
    """A node like another, between other tensors."""
    copy = type(node)()
    copy.CopyFrom(node)
    del copy.input[:], copy.output[:]
    copy.input.extend(inputs)
    copy.output.extend(outputs)
    return copy
