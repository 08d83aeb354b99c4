"""How far two graphs of one network drift apart, layer by layer.

The answer alone says that something is lost. Where, the outputs of the FDConv layers, of the
plain convolutions and of the blocks they add up to tell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto

from export.passes.labels import label_nodes


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


def exposed(model: ModelProto, points: Sequence[Point]) -> ModelProto:
    """The model with every point among its outputs. It shares nothing with the one given."""
    result = ModelProto()
    result.CopyFrom(model)
    there = {output.name for output in result.graph.output}
    for point in points:
        if point.tensor not in there:
            result.graph.output.append(onnx.ValueInfoProto(name=point.tensor))
    return result


def divergences(
    reference: ModelProto,
    other: ModelProto,
    points: Sequence[Point],
    inputs: dict[str, NDArray],
    folder: Path,
) -> Iterator[Divergence]:
    """Run both models on the same inputs and compare them at every point, in order.

    Args:
        folder: for the models' files, which may be too large to hand over in memory.
    """
    if not points:
        return
    names = [point.tensor for point in points]
    answers = []
    for model in (reference, other):
        path = folder / "compared.onnx"
        onnx.save(exposed(model, points), str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        answers.append(session.run(names, inputs))
        del session
        path.unlink()
    for point, exact, found in zip(points, *answers, strict=True):
        yield _between(point.name, exact, found)


def _between(name: str, exact: NDArray, found: NDArray) -> Divergence:
    a, b = found.astype(np.float64).ravel(), exact.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return Divergence(name, float("inf"), 0.0)
    largest = float(np.abs(b).max(initial=0)) or 1.0
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norm if norm else 1.0
    return Divergence(name, float(np.abs(a - b).max(initial=0)) / largest, min(cosine, 1.0))
