"""How far two graphs of one network drift apart, layer by layer.

Compared are the outputs of the FDConv layers, of the plain convolutions, and of the blocks that
they add up to.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto

from fdconv_deploy.errors import BundleError
from fdconv_deploy.profiling.layer_names import fdconv_layers, label_nodes
from fdconv_deploy.runtime.bundle import Bundle


@dataclass(frozen=True)
class Point:
    """A place that both graphs have: the name of a layer or block, and of its tensor."""

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


def compare_bundles(
    first: Bundle, second: Bundle, batch: int, feeds: dict[str, NDArray[np.generic]]
) -> list[Divergence]:
    """``second`` beside ``first`` at every layer that both have, on the same inputs.

    In ONNX Runtime's CPU provider. What both graphs answer at a layer is kept on the disk
    meanwhile: some gigabytes for a large network.

    Args:
        first: the exact one.
        second: of the same network.
        batch: a batch size of both.
        feeds: inputs of that batch size, by name.

    Raises:
        BundleError: they take other inputs, or have no layer in common.
    """
    mine, others = first.manifest.inputs[batch], second.manifest.inputs[batch]
    if mine != others:
        raise BundleError(
            f"{second.path.name} takes {_inputs(second, batch)}, {first.path.name} "
            f"{_inputs(first, batch)}: layers can be compared on equal inputs only."
        )
    with TemporaryDirectory(prefix="fdconv-divergence-") as name:
        folder = Path(name)
        points = [_exposed(bundle, batch, folder / f"{n}.onnx")
                  for n, bundle in enumerate((first, second))]  # fmt: skip
        common = [name for name in points[0] if name in points[1]]
        if not common:
            raise BundleError(
                f"{first.path.name} and {second.path.name} have no layer's name in common: they "
                "are of different networks."
            )
        exact, found = (
            [Point(name, of[name]) for name in common] for of in points
        )  # the same layers, whatever either graph calls their tensors
        answers = Answers(folder / "0.onnx", exact, feeds, folder)
        return answers.divergences(folder / "1.onnx", feeds, found)


def _exposed(bundle: Bundle, batch: int, path: Path) -> dict[str, str]:
    """Write the bundle's graph with every point among its outputs; tensors by layer."""
    files = path.with_suffix("")
    model = onnx.load(str(bundle.copy_to(files).model_path(batch)))
    shutil.rmtree(files)
    points = points_of(model, fdconv_layers(model))
    save_exposed(model, [point.tensor for point in points], path)
    return {point.name: point.tensor for point in points}


def _inputs(bundle: Bundle, batch: int) -> str:
    specs = bundle.manifest.inputs[batch]
    return ", ".join(f"{spec.name} {spec.shape} {spec.dtype}" for spec in specs)
