"""A layer's attentions in one node: from the mean over its input to the gates.

An exported graph computes them in about ten nodes of standard operators, of which each takes longer
to start than to run. The native operator ``fdconv.nchwc::KernelAttention`` takes their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fdconv_deploy.runtime.bundle import Bytes
from fdconv_deploy.runtime.onnx_messages import (
    attributes,
    drop_unread,
    make_node,
    read_model,
    shape_of,
    tensor_values,
)

DOMAIN = "fdconv.nchwc"


def with_fused_attentions(model: bytes, external: Mapping[str, Bytes]) -> tuple[bytes, int]:
    """A graph's file with its FDConv layers' attentions in one node each.

    Args:
        model: an exported graph.
        external: the files that it keeps constants in.

    Returns:
        The file, and how many layers' attentions were fused; none: the file as it was.
    """
    read = read_model(model)
    fused = fuse_attentions(read.graph, external)
    if not fused:
        return model, 0
    read.opset_import.add(domain=DOMAIN, version=1)
    return read.SerializeToString(), fused


def fuse_attentions(graph: Any, external: Mapping[str, Bytes]) -> int:
    """Put one node in the place of each FDConv layer's attentions, where they are as exported.

    Args:
        graph: a ``GraphProto`` of `onnx_messages.read_model`, changed in place.
        external: the files that it keeps constants in.

    Returns:
        How many layers' were. The graph then needs ``DOMAIN`` among its operator sets.
    """
    nodes = list(graph.node)
    producers = {name: number for number, node in enumerate(nodes) for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {v.name: shape_of(v) for v in (*graph.input, *graph.value_info, *graph.output)}
    search = _Search(nodes, producers, constants, shapes, external)
    taken: dict[int, Any] = {}  # by the first node whose answer it gives
    replaced: set[int] = set()
    for node in nodes:
        if node.domain != "fdconv" or not node.op_type.startswith("FrequencyAssembly"):
            continue
        split = search.producer(node.input[0])
        gates = split.input[0] if split is not None and split.op_type == "Split" else node.input[0]
        if gates not in producers or producers[gates] in replaced:
            continue
        found = search.attention(gates)
        if found is None:
            continue
        outputs = [gates]
        for name in node.input:
            number = producers.get(name)
            if number not in (None, *replaced) and search.normalised(name, found):
                outputs.append(name)
                break
        places = [producers[name] for name in outputs]
        taken[min(places)] = found.node(outputs, attributes(node)["layer"])
        replaced.update(places)
    if taken:
        del graph.node[:]
        for number, node in enumerate(nodes):
            if number in taken:
                graph.node.append(taken[number])
            elif number not in replaced:
                graph.node.append(node)
        drop_unread(graph)
    return len(taken)


@dataclass
class _Attention:
    """What one node is made of; ``average`` is the tensor that it starts from."""

    x: str
    average: str
    weights: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    local: list[str] = field(default_factory=list)

    def node(self, outputs: list[str], layer: bytes) -> Any:
        inputs = [self.x, *self.weights, *self.local]
        return make_node(
            "KernelAttention", inputs, outputs, DOMAIN, block=0, layer=layer,
            local=int(bool(self.local)), **self.attributes,
        )  # fmt: skip


@dataclass
class _Search:
    nodes: list[Any]
    producers: dict[str, int]
    constants: dict[str, Any]
    shapes: dict[str, tuple[int, ...] | None]
    external: Mapping[str, Bytes]

    def producer(self, name: str, *operators: str) -> Any:
        """The node that gives a tensor; None where it is none of those operators'."""
        number = self.producers.get(name)
        node = None if number is None else self.nodes[number]
        return node if node is None or not operators or node.op_type in operators else None

    def attention(self, gates: str) -> _Attention | None:
        """All that leads from a layer's input to its gates."""
        logits, softmax, sizes = self._activations(gates)
        heads = self._affine(logits)
        if heads is None or not sizes:
            return None
        hidden = self.producer(heads[0], "Mul")
        squared = hidden is not None and hidden.input[0] == hidden.input[1]
        relu = self.producer(hidden.input[0] if squared else heads[0], "Relu")
        if relu is None:
            return None
        name, norm, given = self._norm(relu.input[0])
        first = self._affine(name)
        x = None if first is None else self._averaged(first[0])
        if first is None or x is None:
            return None
        given |= {"softmax": int(softmax), "squared": int(squared), "head_sizes": sizes}
        return _Attention(x, first[0], [*first[1:], *norm, *heads[1:]], given)

    def _activations(self, gates: str) -> tuple[str, bool, list[int]]:
        """Logits, whether each head is a softmax, and the heads' lengths."""
        node = self.producer(gates, "Sigmoid", "Softmax", "Concat")
        if node is None:
            return "", False, []
        if node.op_type != "Concat":
            gemm = self.producer(node.input[0], "Gemm")
            weight = None if gemm is None else self.constants.get(gemm.input[1])
            length = [] if weight is None else [int(weight.dims[0])]
            return node.input[0], node.op_type == "Softmax", length
        parts = [self.producer(name, "Softmax") for name in node.input]
        split = None if None in parts else self.producer(parts[0].input[0], "Split")
        if split is None or [part.input[0] for part in parts] != list(split.output):
            return "", False, []
        lengths = tensor_values(self.constants[split.input[1]], self.external)
        return split.input[0], True, [int(length) for length in lengths]

    def _affine(self, name: str) -> tuple[str, str, str] | None:
        """Input, weight and bias of a linear layer."""
        node = self.producer(name, "Gemm")
        if node is None or len(node.input) != 3 or attributes(node) != {"transB": 1}:
            return None
        x, weight, bias = node.input
        return (x, weight, bias) if {weight, bias} <= set(self.constants) else None

    def _norm(self, name: str) -> tuple[str, list[str], dict[str, Any]]:
        """What is normalised, the norm's constants and attributes."""
        node = self.producer(name, "LayerNormalization", "Mul")
        if node is None:
            return name, [], {"norm": 0}
        if node.op_type == "LayerNormalization":
            epsilon = attributes(node).get("epsilon", 1e-5)
            return node.input[0], list(node.input[1:]), {"norm": 1, "norm_epsilon": epsilon}
        scaled = self.producer(node.input[0], "Div")
        root = None if scaled is None else self.producer(scaled.input[1], "Sqrt")
        mean = None if root is None else self.producer(root.input[0], "Add")
        if mean is None or mean.input[1] not in self.constants:
            return "", [], {}
        epsilon = float(tensor_values(self.constants[mean.input[1]], self.external)[0])
        return scaled.input[0], [node.input[1]], {"norm": 2, "norm_epsilon": epsilon}

    def _averaged(self, average: str) -> str | None:
        """What a (images, channels) mean is the mean of: features or tokens."""
        chain = []
        name = average
        while (node := self.producer(name, "ReduceMean", "Reshape")) is not None:
            if len(node.input) != 2 or node.input[1] not in self.constants:
                return None
            chain.append(node)
            name = node.input[0]
            shape = self.shapes.get(name)
            if shape is not None and self._means(list(shape), chain[::-1]):
                return name
        return None

    def _means(self, sizes: list[int], chain: list[Any]) -> bool:
        """Whether nodes take the mean over all positions of features or tokens of a shape."""
        # Each place's axis: images, channels or positions.
        kinds = {4: ["n", "c", "p", "p"], 3: ["n", "p", "c"]}.get(len(sizes), [])
        if not kinds:
            return False
        for node in chain:
            values = tensor_values(self.constants[node.input[1]], self.external).tolist()
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

    def normalised(self, name: str, found: _Attention) -> bool:
        """Whether a tensor is the average as the local attention takes it; then it is noted."""
        node = self.producer(name, "LayerNormalization")
        if node is None or node.input[0] != found.average or len(node.input) != 3:
            return False
        found.local = list(node.input[1:])
        found.attributes["local_epsilon"] = attributes(node).get("epsilon", 1e-5)
        return True
