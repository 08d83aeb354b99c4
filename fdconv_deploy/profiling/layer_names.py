"""Which module and layer of the network each node of its graph, or optimised graph, belongs to.

An FDConv layer's nodes carry its name. A plain convolution is named by its weight, and what
has no name of its own (activations, additions, resizes) goes with what it reads first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from onnx import ModelProto, NodeProto

from fdconv_deploy.errors import BundleError, ExportError
from fdconv_deploy.ops import DOMAIN

NOWHERE = "elsewhere"
WEIGHT = ".weight"


@dataclass(frozen=True)
class Label:
    """The module that a node came from, and the FDConv layer that it is part of, by their paths."""

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
    """The error of a pattern that matches no node."""
    modules = sorted({label.layer or label.module for label in labels})
    return ExportError(
        f"--keep-fp32 {pattern!r} names no module of the exported graph. Give a module's path or "
        f"a pattern, e.g. {modules[len(modules) // 2]!r} or "
        f"{modules[0].partition('.')[0] + '.*'!r}."
    )


def fdconv_layers(exported: ModelProto) -> tuple[str, ...]:
    """Names of the FDConv layers of a graph, in its order.

    Raises:
        BundleError: the graph is of an older bundle format.
    """
    layers: dict[str, None] = {}
    for node in exported.graph.node:
        if node.domain == DOMAIN:
            name = next((a.s.decode() for a in node.attribute if a.name == "layer"), None)
            if name is None:
                raise BundleError(
                    f"node {node.name!r} of the graph does not name its layer, as nodes do since "
                    "bundle format 3. Export the bundle again with this version."
                )
            layers[name] = None
    return tuple(layers)


def layer_names(exported: ModelProto, optimised: ModelProto) -> list[str]:
    """A layer for each node of ``optimised``, which was made from ``exported``.

    By names where they survive optimisation: those of tensors, and of nodes fused or laid out
    anew. What was inside a function, and copies between layouts, belong to the layer that reads
    them; what nobody reads, to the layer that it reads. Activations and additions
    go with what they read first, see `label_nodes`.
    """
    layers = fdconv_layers(exported)
    labels = label_nodes(exported, layers)
    of_name: dict[str, str] = {}
    for node, label in zip(exported.graph.node, labels, strict=True):
        # A node fused with others may give its own name to what it makes.
        of_name |= dict.fromkeys([*node.output, node.name], label.layer or label.module)
    nodes = list(optimised.graph.node)
    found = [_named_layer(node, of_name, layers) for node in nodes]
    readers: defaultdict[str, list[int]] = defaultdict(list)
    makers: dict[str, int] = {}
    for number, node in enumerate(nodes):
        for name in node.input:
            readers[name].append(number)
        makers.update(dict.fromkeys(node.output, number))
    # The graph is in the order in which it runs: readers come last, makers first.
    for number in reversed(range(len(nodes))):
        if found[number] is None:
            uses = (found[reader] for name in nodes[number].output for reader in readers[name])
            found[number] = next((use for use in uses if use is not None), None)
    for number, node in enumerate(nodes):
        if found[number] is None:
            read = (found[makers[name]] for name in node.input if name in makers)
            found[number] = next((one for one in read if one is not None), None)
    return [name or NOWHERE for name in found]


def _named_layer(
    node: NodeProto, of_name: Mapping[str, str], layers: Collection[str]
) -> str | None:
    """The layer by the node's own names."""
    names = [_original(name) for name in (*node.output, node.name)]
    for name in names:
        if name in of_name:
            return of_name[name]
    for name in names:
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if (layer := ".".join(parts[:end])) in layers:
                return layer
    return None


def _original(name: str) -> str:
    """A name without what ONNX Runtime added: for fusing, float16 on a CPU, and layouts."""
    for mark in ("fused ", "InsertedPrecisionFreeCast_"):
        name = name.removeprefix(mark)
    return name.removesuffix("_nchwc")
