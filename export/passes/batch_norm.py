"""Fold each BatchNormalization into the convolution or FDConv layer before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from fdconv_deploy.export.torch_export import PLACEHOLDER

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """``scale · y + shift`` per channel, ``(C,)`` float64 each."""

    scale: Float64
    shift: Float64


def _constants(tensors: list[gs.Tensor]) -> list[Float64] | None:
    if not all(isinstance(t, gs.Constant) for t in tensors):
        return None
    return [t.values.astype(np.float64) for t in tensors]


def _only_consumer(tensor: gs.Tensor, graph: gs.Graph) -> gs.Node | None:
    used_elsewhere = len(tensor.outputs) != 1 or any(tensor is o for o in graph.outputs)
    return None if used_elsewhere else tensor.outputs[0]


def _fold_into_convolution(node: gs.Node, affine: Affine) -> bool:
    constants = _constants(node.inputs[1:])
    if constants is None:
        return False
    weight = constants[0] * affine.scale.reshape(-1, *[1] * (constants[0].ndim - 1))
    bias = affine.shift + (constants[1] * affine.scale if len(constants) > 1 else 0)
    name = node.inputs[1].name
    # New constants: the old ones may be shared with another convolution.
    node.inputs = [
        node.inputs[0],
        gs.Constant(f"{name}.folded.{node.outputs[0].name}", weight.astype(np.float32)),
        gs.Constant(f"{name}.bias.{node.outputs[0].name}", bias.astype(np.float32)),
    ]
    return True


def fold_batch_norms(graph: gs.Graph) -> dict[str, Affine]:
    """Fold what can be folded, where nobody else reads the normalised tensor.

    Returns:
        The normalisation that follows each placeholder, by its output tensor's name, which
        takes the place of the normalisation's output. Plain convolutions are folded here.
    """
    affines: dict[str, Affine] = {}
    for node in list(graph.nodes):
        if node.op not in ("Conv", PLACEHOLDER):
            continue
        follower = _only_consumer(node.outputs[0], graph)
        if follower is None or follower.op != "BatchNormalization":
            continue
        if node.op == PLACEHOLDER and len(node.attrs["shape"]) == 2:
            continue  # of tokens, a normalisation's channels are the tokens
        constants = _constants(follower.inputs[1:])
        if constants is None:
            continue
        weight, bias, mean, variance = constants
        scale = weight / np.sqrt(variance + follower.attrs.get("epsilon", 1e-5))
        affine = Affine(scale, bias - mean * scale)
        output = follower.outputs[0]
        if node.op == PLACEHOLDER:
            affines[output.name] = affine
        elif not _fold_into_convolution(node, affine):
            continue
        follower.outputs.clear()
        node.outputs = [output]
    graph.cleanup()
    return affines
