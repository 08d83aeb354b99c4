"""How far two graphs of one network drift apart, layer by layer.

The answer alone says that something is lost. Where, the outputs of the FDConv layers, of the
plain convolutions and of the blocks they add up to tell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto

from fdconv_deploy.profiling.node_labels import label_nodes


@dataclass(frozen=True)
class Point:
    """A place both graphs have: a layer's or a block's name and its tensor's."""

    name: str
    tensor: str


@dataclass(frozen=True)
class Divergence:
    """At one point: max|a − b| / max|b|, and the cosine of the angle between a and b."""

    name: str
    max_rel: float
    cosine: float


def points_of(model: ModelProto, layers: Collection[str]) -> list[Point]:
    """Outputs of FDConv layers, of plain convolutions and of the sums they are added up in."""
    nodes = list(model.graph.node)
    labels = label_nodes(model, layers)
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        for name in node.input:
            readers.setdefault(name, []).append(index)
    outputs = {output.name for output in model.graph.output}
    found: dict[str, Point] = {}
    for node, label in zip(nodes, labels, strict=True):
        for tensor in node.output:
            after = [labels[i].layer for i in readers.get(tensor, [])]
            if label.layer is not None and (
                tensor in outputs or any(x != label.layer for x in after)
            ):
                found[tensor] = Point(label.layer, tensor)
            elif label.layer is None and node.op_type == "Conv":
                found[tensor] = Point(label.module, tensor)
            elif label.layer is None and node.op_type == "Add":
                block = label.module.rpartition(".")[0] or label.module
                found[tensor] = Point(f"{block} (sum)", tensor)
    return list(found.values())


def save_exposed(model: ModelProto, tensors: Iterable[str], path: Path) -> None:
    """Write a model with these tensors among its outputs; the model itself stays as it is."""
    own = len(model.graph.output)
    there = {output.name for output in model.graph.output}
    for name in dict.fromkeys(tensors):
        if name not in there:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    try:
        onnx.save(model, str(path))
    finally:
        del model.graph.output[own:]


class Answers:
    """What a model gives at every point, kept in files: together they may be gigabytes.

    Args:
        model: with every point among its outputs.
        folder: for the files, one per point.
    """

    def __init__(
        self, model: Path, points: Sequence[Point], inputs: dict[str, NDArray], folder: Path
    ) -> None:
        self.points, self.folder = points, folder
        for place, values in enumerate(_run(model, points, inputs)):
            np.save(folder / f"{place}.npy", values)

    def divergences(
        self, model: Path, inputs: dict[str, NDArray], points: Sequence[Point] | None = None
    ) -> list[Divergence]:
        """Another model's answers to the same inputs, beside these.

        Args:
            model: with every point among its outputs.
            points: what it calls them, in the same order; the same if not given.
        """
        found = _run(model, points or self.points, inputs)
        return [
            _between(point.name, np.load(self.folder / f"{place}.npy"), values)
            for place, (point, values) in enumerate(zip(self.points, found, strict=True))
        ]


def _run(model: Path, points: Sequence[Point], inputs: dict[str, NDArray]) -> list[NDArray]:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    answers: list[NDArray] = session.run([point.tensor for point in points], inputs)
    return answers


def _between(name: str, exact: NDArray, found: NDArray) -> Divergence:
    a, b = found.astype(np.float64).ravel(), exact.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return Divergence(name, float("inf"), 0.0)
    largest = float(np.abs(b).max(initial=0)) or 1.0
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norm if norm else 1.0
    return Divergence(name, float(np.abs(a - b).max(initial=0)) / largest, min(cosine, 1.0))
