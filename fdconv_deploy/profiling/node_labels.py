"""Which module of the network each node came from, told by names in the graph.

An FDConv layer's nodes carry its name. A plain convolution is named by its weight, and what
has no name of its own (activations, additions, resizes) goes with what it reads first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from onnx import ModelProto, NodeProto

from fdconv_deploy.errors import ExportError

WEIGHT = ".weight"


@dataclass(frozen=True)
class Label:
    """``module``: the module's path. ``layer``: that of the FDConv layer a node is part of."""

    module: str
    layer: str | None


def _layer_of(node: NodeProto, layers: Collection[str]) -> str | None:
    parts = node.name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if name in layers:
            return name
    return None


def label_nodes(model: ModelProto, layers: Collection[str]) -> list[Label]:
    """A label for each node of the graph, in its order.

    Args:
        layers: names of the network's FDConv layers; "" is the network itself.
    """
    known = {name or "layer" for name in layers}
    constants = {tensor.name for tensor in model.graph.initializer}
    # In eight bits, a weight is read through a node that makes it a float again.
    floats = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    of_tensor: dict[str, str] = {}
    labels = []
    for node in model.graph.node:
        layer = _layer_of(node, known)
        read_late = [floats.get(name, name) for name in node.input[1:]]
        weights = [i for i in read_late if i in constants and WEIGHT in i]
        if layer is not None:
            module = node.name
        elif weights:
            module = weights[0].partition(WEIGHT)[0]
        else:
            read = (of_tensor[name] for name in node.input if name in of_tensor)
            module = next(read, node.name)
        labels.append(Label(module, layer))
        of_tensor.update(dict.fromkeys(node.output, layer or module))
    return labels


def matches(pattern: str, label: Label) -> bool:
    """Whether a module's path, or a shell pattern of paths, means a node."""
    names = {label.module, label.layer or label.module}
    return any(n.startswith(f"{pattern}.") or fnmatchcase(n, pattern) for n in names)


def unknown_pattern(pattern: str, labels: Sequence[Label]) -> ExportError:
    """What to say of a pattern that matches no node."""
    modules = sorted({label.layer or label.module for label in labels})
    return ExportError(
        f"--keep-fp32 {pattern!r} names no module of the exported graph. Give a module's path or "
        f"a pattern, e.g. {modules[len(modules) // 2]!r} or "
        f"{modules[0].partition('.')[0] + '.*'!r}."
    )
