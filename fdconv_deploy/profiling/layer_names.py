"""Which of the network's layers each node of its optimised graph works for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from onnx import ModelProto, NodeProto

from fdconv_deploy.errors import BundleError
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.profiling.node_labels import label_nodes

NOWHERE = "elsewhere"


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

    Names tell where they survive optimisation: those of tensors, and of nodes fused or laid
    out anew. What was inside a function, and copies between layouts, work for who reads them;
    what nobody reads, for whom they read. Activations and additions go with what they read
    first, see `label_nodes`.
    """
    layers = fdconv_layers(exported)
    labels = label_nodes(exported, layers)
    of_name: dict[str, str] = {}
    for node, label in zip(exported.graph.node, labels, strict=True):
        # A node fused with others may give its own name to what it makes.
        of_name |= dict.fromkeys([*node.output, node.name], label.layer or label.module)
    nodes = list(optimised.graph.node)
    found = [_told(node, of_name, layers) for node in nodes]
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


def _told(node: NodeProto, of_name: Mapping[str, str], layers: Collection[str]) -> str | None:
    """What the node's own names tell."""
    names = [_before(name) for name in (*node.output, node.name)]
    for name in names:
        if name in of_name:
            return of_name[name]
    for name in names:
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if (layer := ".".join(parts[:end])) in layers:
                return layer
    return None


def _before(name: str) -> str:
    """A name without what ONNX Runtime adds: for fusing, float16 on a CPU, and layouts."""
    for mark in ("fused ", "InsertedPrecisionFreeCast_"):
        name = name.removeprefix(mark)
    return name.removesuffix("_nchwc")
