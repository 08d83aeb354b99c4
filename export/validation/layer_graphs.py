"""A graph cut at the inputs of its FDConv layers and of its decisions.

In each piece the layers get the network's own inputs, so that an error is a layer's own and no
other layer amplifies it; and what is decided is what the network decides. A piece ends where the
next layer's input is computed, or at the graph's outputs; its nodes and constants are the
graph's own.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor

from fdconv_deploy.nn.heads.query_head import Decision
from fdconv_deploy.profiling import label_nodes

_USE = re.compile(r"\.(use\d+)\.")


@dataclass(frozen=True)
class Piece:
    """What computes some tensors from FDConv layers' inputs.

    tensors: those it ends in. use: the use of a layer that reads them; "" where they are the
    graph's outputs. layers: the uses of layers within.
    """

    tensors: tuple[str, ...]
    use: str
    layers: tuple[str, ...]


class CutGraph:
    """The pieces of a written model, and models of them.

    Args:
        path: of the model; its external data lies beside it.
        layers: names of the network's FDConv layers.
        decisions: of the network, by name; no two of one operator.

    Attributes:
        cuts: the tensors that pieces end in; of each, the first use of a layer that reads it.
        decided: uses of decisions; of each, the tensor that it decides on.
        pieces: those that end in a cut, and that of the outputs.
    """

    def __init__(
        self, path: Path, layers: Collection[str], decisions: Mapping[str, Decision] | None = None
    ) -> None:
        self._folder = path.parent
        self._model = onnx.load(str(path), load_external_data=False)
        graph = self._model.graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {out: i for i, n in enumerate(graph.node) for out in n.output if out}
        self._shapes = {v.name: s for v in graph.value_info if (s := _shape(v)) is not None}
        self._inputs = {value.name: value for value in graph.input}
        self._uses = _uses(self._model, layers)
        self.decided = dict(self._find(decisions or {}))
        self.cuts: dict[str, str] = {}  # tensor -> the first use that reads it
        for index, use in enumerate(self._uses):
            if use and use not in self._uses[:index]:
                tensor = self._root(self._entry(graph.node[index]))
                if tensor in self._producers:
                    self.cuts.setdefault(tensor, use)
        self.pieces = [self._piece((tensor,), use) for tensor, use in self.cuts.items()]
        if self.cuts:
            self.pieces.append(self._piece(tuple(output.name for output in graph.output), ""))

    def _find(self, decisions: Mapping[str, Decision]) -> Iterator[tuple[str, str]]:
        """Name the nodes that decide, which run in the order of the network's uses."""
        for name, decision in decisions.items():
            wanted, count = decision.constant, 0
            for index, node in enumerate(self._model.graph.node):
                if node.op_type != decision.operator or self._uses[index]:
                    continue
                if wanted is not None and self._value(node.input[1]) != wanted:
                    continue
                count += 1
                self._uses[index] = name if count == 1 else f"{name}.use{count}"
                if (tensor := self._entry(node)) in self._producers:
                    yield self._uses[index], tensor

    def _value(self, name: str) -> np.float32 | None:
        """The number that a constant holds, if it is one."""
        tensor = self._constants.get(name)
        if tensor is None or math.prod(tensor.dims) != 1:
            return None
        return np.float32(onnx.numpy_helper.to_array(tensor).reshape(-1)[0])

    def _entry(self, node: NodeProto) -> str:
        """What a layer's first node reads: the layer's input."""
        return next((name for name in node.input if name and name not in self._constants), "")

    def _root(self, tensor: str) -> str:
        """The same numbers before they were reshaped: others may read them there."""
        while tensor in self._producers:
            node = self._model.graph.node[self._producers[tensor]]
            if node.op_type != "Reshape" or node.input[0] not in self._shapes:
                break
            tensor = node.input[0]
        return tensor

    def _reach(self, tensors: Iterable[str], cuts: Collection[str]) -> tuple[set[int], set[str]]:
        """Nodes that compute tensors from cuts and inputs, and which of these they read."""
        nodes: set[int] = set()
        read: set[str] = set()
        waiting = [self._producers[name] for name in tensors if name in self._producers]
        while waiting:
            index = waiting.pop()
            if index in nodes:
                continue
            nodes.add(index)
            for name in _reads(self._model.graph.node[index]):
                if name in cuts or name in self._inputs:
                    read.add(name)
                elif name in self._producers:
                    waiting.append(self._producers[name])
        return nodes, read

    def _piece(self, tensors: tuple[str, ...], use: str) -> Piece:
        nodes, _ = self._reach(tensors, self.cuts)
        # What is behind a layer may be reshaped in the layer's name.
        works = (i for i in sorted(nodes) if self._model.graph.node[i].op_type != "Reshape")
        within = dict.fromkeys(self._uses[i] for i in works if self._uses[i])
        return Piece(tensors, use, tuple(within))

    def write(
        self, tensors: Iterable[str], path: Path, shapes: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Write a model of what computes tensors from layers' inputs, with its data.

        Args:
            tensors: a piece's, or any.
            path: the file to write.
            shapes: of each use's input, batch included. If there are none, nothing is cut.

        Returns:
            What it takes, by tensor the use whose input it is ("" for an input of the graph's
            own); and what it gives, by tensor its name among the model's outputs.
        """
        cuts, graph = self.cuts if shapes else {}, self._model.graph
        chosen, read = self._reach(tensors, cuts)
        # One output may be computed from another, which is given then.
        given = {t: f"{t}.computed" if t in cuts else t for t in tensors}
        nodes = [copy.deepcopy(graph.node[index]) for index in sorted(chosen)]
        for node in nodes:
            node.output[:] = [given.get(name, name) for name in node.output]
        inputs = []
        for name in sorted(read):
            value = self._inputs.get(name)
            if value is None:
                shape = self._shapes.get(name) or shapes[cuts[name]]
                value = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            inputs.append(value)
        made = {name for node in nodes for name in node.output} - set(given.values())
        outputs = [onnx.ValueInfoProto(name=name) for name in given.values()]
        data = list(self._data({name for node in nodes for name in _reads(node)}))
        known = [value for value in graph.value_info if value.name in made]
        model = helper.make_model(
            helper.make_graph(nodes, "piece", inputs, outputs, data, value_info=known),
            opset_imports=self._model.opset_import,
            functions=self._model.functions,
            ir_version=self._model.ir_version,
        )
        onnx.save(model, str(path))
        return {name: cuts.get(name, "") for name in read}, given

    def _data(self, names: set[str]) -> Iterator[TensorProto]:
        """Constants with their values."""
        for name in sorted(names & self._constants.keys()):
            tensor = TensorProto()
            tensor.CopyFrom(self._constants[name])
            if tensor.data_location == TensorProto.EXTERNAL:
                load_external_data_for_tensor(tensor, str(self._folder))
                tensor.data_location = TensorProto.DEFAULT
                del tensor.external_data[:]
            yield tensor


def _uses(model: ModelProto, layers: Collection[str]) -> list[str]:
    """For each node, the use of a layer that it is part of, or ""."""
    uses = []
    for node, label in zip(model.graph.node, label_nodes(model, layers), strict=True):
        if label.layer is None:
            uses.append("")
            continue
        again = _USE.match(node.name[len(label.layer) :])
        uses.append(f"{label.layer}.{again[1]}" if again else label.layer)
    return uses


def _reads(node: NodeProto) -> Iterator[str]:
    """Names a node reads, those within its branches included."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)


def _shape(value: onnx.ValueInfoProto) -> list[int] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(d.HasField("dim_value") for d in tensor.shape.dim):
        return None
    return [d.dim_value for d in tensor.shape.dim]
