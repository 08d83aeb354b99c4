"""What the plugin pass does to any node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from fdconv_deploy.export.layers.nodes import Nodes
from numpy.typing import NDArray

from fdconv_deploy.errors import ExportError
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.ops.tensorrt_plugins import NAMESPACE

FLOAT32, FLOAT16 = 1, 10


def constant_of(tensor: gs.Tensor) -> NDArray[Any]:
    """A constant's values.

    Raises:
        ExportError: it is none.
    """
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    producer = tensor.inputs[0] if tensor.inputs else None
    if producer is not None and producer.op == "Constant" and "value" in producer.attrs:
        return np.asarray(producer.attrs["value"].values)
    raise unknown(tensor.name)


def unknown(name: str) -> ExportError:
    """The error of a graph that is not as this version writes it."""
    return ExportError(
        f"the graph is not as this version of fdconv-deploy writes it (at {name!r}), so its "
        "layers cannot be handed to plugins. Export the bundle again, or build with "
        "--plugins off."
    )


def plugin_node(
    nodes: Nodes, op: str, name: str, inputs: Sequence[gs.Tensor], **attributes: Any
) -> gs.Variable:
    """A node that asks for a plugin, compiled ahead of time; else its function is meant."""
    return nodes(op, name, *inputs, domain=DOMAIN, plugin_namespace=NAMESPACE, aot=1, **attributes)


def take_over(nodes: Nodes, old: gs.Node, new: gs.Variable, half: bool) -> None:
    """Let ``new``, float16 where ``half``, stand for what ``old`` gives, a float32 tensor."""
    (output,) = old.outputs
    old.outputs.clear()
    old.inputs.clear()
    if half:
        for reader in [n for n in output.outputs if n.op == "Cast" and n.attrs["to"] == FLOAT16]:
            (cast,) = reader.outputs
            for other in list(cast.outputs):
                other.inputs = [new if t is cast else t for t in other.inputs]
            reader.inputs.clear()
        if not output.outputs:
            return
        new = nodes("Cast", "single", new, to=FLOAT32)
    producer = new.inputs[0]
    producer.outputs[producer.outputs.index(new)] = output


def ancestors(tensor: gs.Tensor, prefix: str) -> Iterator[gs.Tensor]:
    """A tensor and what it is made of, as far back as nodes are named ``prefix…``."""
    waiting, seen = [tensor], set()
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        for producer in current.inputs:
            if producer.name.startswith(prefix):
                waiting += producer.inputs
