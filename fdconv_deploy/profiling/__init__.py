"""Where a network's time goes and how far two of its graphs drift apart, layer by layer.

Here: which module and layer of the network each node of its graph belongs to. An FDConv layer's
nodes carry its name. A plain convolution is named by its weight, and what has no name of its own
(activations, additions, resizes) goes with what it reads first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from fdconv_deploy.errors import BundleError, ExportError
from fdconv_deploy.ops import DOMAIN

if TYPE_CHECKING:  # profiles are told of where no onnx is installed
    from onnx import ModelProto

PARTS = ("convolutions", "kernel assembly", "band modulation", "attention", "rest")
# Runs of a profile before those that count.
WARM_UP = 2
WEIGHT = ".weight"


class LayerTime(BaseModel):
    """A layer's milliseconds by part, of ``PARTS``; those that it has none of are left out."""

    name: str
    ms: dict[str, float]


class Divergence(BaseModel):
    """How far a layer's output a is from b: max|a − b| / max|b|, and 1 − cosine of their angle."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    name: str
    max_rel: float
    angle: float


@dataclass(frozen=True)
class Label:
    """The module that a node came from, and the FDConv layer that it is part of, by their paths."""

    module: str
    layer: str | None


def enclosing_layer(name: str, layers: Collection[str]) -> str | None:
    """The layer that a node's or tensor's name lies in, as ``a.b`` does in ``a``; None for none."""
    while name := name.rpartition(".")[0]:
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
        layer = enclosing_layer(node.name, known)
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
