"""How far two graphs of one network drift apart, layer by layer.

Compared are the outputs of the FDConv layers, of the plain convolutions, and of the blocks that
they add up to.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto

from fdconv_deploy.errors import BundleError
from fdconv_deploy.profiling import Divergence, fdconv_layers, label_nodes
from fdconv_deploy.runtime.bundle import Bundle


def points_of(model: ModelProto, layers: Collection[str]) -> dict[str, str]:
    """Outputs of FDConv layers, of plain convolutions and of the sums they are added up in.

    Returns:
        The tensors of a graph that are compared, each with the name of its layer or block.
    """
    nodes = list(model.graph.node)
    labels = label_nodes(model, layers)
    read_in: dict[str, set[str | None]] = {}
    for node, label in zip(nodes, labels, strict=True):
        for name in node.input:
            read_in.setdefault(name, set()).add(label.layer)
    for output in model.graph.output:
        read_in.setdefault(output.name, set()).add(None)
    found: dict[str, str] = {}
    for node, label in zip(nodes, labels, strict=True):
        for tensor in node.output:
            if label.layer is not None:
                if read_in.get(tensor, set()) - {label.layer}:
                    found[tensor] = label.layer
            elif node.op_type == "Conv":
                found[tensor] = label.module
            elif node.op_type == "Add":
                found[tensor] = f"{label.module.rpartition('.')[0] or label.module} (sum)"
    return found


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


def compare_graphs(
    first: Path,
    second: Path,
    feeds: Mapping[str, NDArray[Any]],
    points: Mapping[str, str],
    tensors: Sequence[str] | None = None,
) -> list[Divergence]:
    """``second`` beside ``first``, the exact one, at every point, on the same inputs.

    In ONNX Runtime's CPU provider. What the first gives is kept on the disk meanwhile, beside its
    file: together it may be gigabytes. Both files are as `save_exposed` writes them.

    Args:
        points: tensors of the first, each with its name; see `points_of`.
        tensors: of the second, in the same order; the same if not given.
    """

    def run(model: Path, tensors: Sequence[str]) -> list[NDArray[Any]]:
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        answers: list[NDArray[Any]] = session.run(tensors, feeds)
        return answers

    with TemporaryDirectory(dir=first.parent) as folder:
        for place, values in enumerate(run(first, list(points))):
            np.save(f"{folder}/{place}.npy", values)
        return [
            _between(name, np.load(f"{folder}/{place}.npy"), values)
            for place, (name, values) in enumerate(
                zip(points.values(), run(second, tensors or list(points)), strict=True)
            )
        ]


def _between(name: str, exact: NDArray, found: NDArray) -> Divergence:
    a, b = found.astype(np.float64).ravel(), exact.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return Divergence(name=name, max_rel=float("inf"), angle=1.0)
    largest = float(np.abs(b).max(initial=0)) or 1.0
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norm if norm else 1.0
    difference = float(np.abs(a - b).max(initial=0))
    return Divergence(name=name, max_rel=difference / largest, angle=max(1 - cosine, 0.0))


def compare_bundles(
    first: Bundle, second: Bundle, batch: int, feeds: Mapping[str, NDArray[Any]]
) -> list[Divergence]:
    """``second`` beside ``first`` at every layer that both have; see `compare_graphs`.

    Raises:
        BundleError: they take other inputs, or have no layer in common.
    """
    if first.manifest.inputs[batch] != second.manifest.inputs[batch]:
        raise BundleError(
            f"{second.path.name} takes {_inputs(second, batch)}, {first.path.name} "
            f"{_inputs(first, batch)}: layers can be compared on equal inputs only."
        )
    with TemporaryDirectory(prefix="fdconv-divergence-") as folder:
        exact, found = Path(folder) / "first.onnx", Path(folder) / "second.onnx"
        mine, others = _exposed(first, batch, exact), _exposed(second, batch, found)
        points = {tensor: name for name, tensor in mine.items() if name in others}
        if not points:
            raise BundleError(
                f"{first.path.name} and {second.path.name} have no layer's name in common: they "
                "are of different networks."
            )
        tensors = [others[name] for name in points.values()]
        return compare_graphs(exact, found, feeds, points, tensors)


def _exposed(bundle: Bundle, batch: int, path: Path) -> dict[str, str]:
    """Write the bundle's graph with every point among its outputs; tensors by their names."""
    files = path.with_suffix("")
    model = onnx.load(str(bundle.copy_to(files).model_path(batch)))
    shutil.rmtree(files)
    points = points_of(model, fdconv_layers(model))
    save_exposed(model, points, path)
    return {name: tensor for tensor, name in points.items()}


def _inputs(bundle: Bundle, batch: int) -> str:
    specs = bundle.manifest.inputs[batch]
    return ", ".join(f"{spec.name} {spec.shape} {spec.dtype}" for spec in specs)
