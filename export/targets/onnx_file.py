"""A bundle's graph as one .onnx file of standard operators, for other runtimes than ours.

A bundle's graphs keep FDConv's layers as functions and their weights in a file beside them, which
ONNX Runtime reads from 1.25.1 on. Other runtimes know no functions. docs/runtimes.md says which
take the file.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.external_data_helper import load_external_data_for_model

from fdconv_deploy.atomic_write import atomic_path
from fdconv_deploy.errors import ExportError, in_the_way
from fdconv_deploy.export.options import Progress
from fdconv_deploy.export.passes.inlining import inline_functions
from fdconv_deploy.export.passes.opset import set_opset
from fdconv_deploy.export.validation.subprocess_run import fresh
from fdconv_deploy.ops import OPSET
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import Manifest
from fdconv_deploy.sample_images import sample_feeds

# Of the largest value. In the bundle's own opset, ONNX Runtime computes the same bits. In another,
# it fuses and rounds other operators: by float16's unit, or to another of eight bits' steps.
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-3, "int8": 1e-2}


@dataclass(frozen=True)
class OnnxFile:
    """A file that was written and proved.

    Attributes:
        path: where it is.
        opset: version of the standard operators.
        nodes: how many there are.
        max_rel: largest difference from the bundle's graph, as a share of the largest value.
    """

    path: Path
    opset: int
    nodes: int
    max_rel: float


def export_onnx(
    bundle: Bundle | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    opset: int = OPSET,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
) -> OnnxFile:
    """Write one of a bundle's graphs as a self-contained file of standard ONNX operators.

    The file is run by stock ONNX Runtime in a fresh process, and kept if it answers as the bundle's
    graph does, which was itself proved equal to the network.

    Args:
        bundle: the bundle, or its folder.
        output: the file to write, ``*.onnx``.
        size: (height, width) of the graph, of a bundle of several; its first if not given.
        batch: batch size of the graph; the smallest if not given.
        opset: version of the standard operators, 13 or newer; a detector's 16 to 21.
        overwrite: replace a file that is there.
        progress: called with a sentence as each step begins.

    Raises:
        BundleError: the bundle is damaged.
        ExportError: it has no such graph, the graph has no form in that opset, the file would be
            over 2 GB or does not answer as the bundle's graph, or ``output`` is in the way.
    """
    from fdconv_deploy.export.graph import check_model  # imports torch, which takes seconds

    path = Path(output)
    check_output(path, overwrite=overwrite)
    found = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, hold=True)
    found, batch = chosen_graph(found, size, batch)
    with tempfile.TemporaryDirectory(prefix="fdconv-export-") as name:
        files = found.copy_to(Path(name, "bundle"))
        progress("writing the operators out")
        model = standard_model(files, batch, opset)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            onnx.save(model, str(temporary))
            check_model(str(temporary))
            progress("comparing the file with the bundle's graph")
            max_rel = prove(files, batch, temporary, Path(name), opset)
        return OnnxFile(path, opset, len(model.graph.node), max_rel)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a name that is no .onnx file's, or taken.

    Raises:
        ExportError: with what to do.
    """
    if path.suffix != ".onnx":
        raise ExportError(f"The output is a file called *.onnx, not {path.name!r}.")
    if path.is_dir():
        raise ExportError(f"{path} is a folder. Give the name of a file in it.")
    if path.exists() and not overwrite:
        raise in_the_way(ExportError, f"The file {path} exists already.")


def chosen_graph(
    bundle: Bundle, size: tuple[int, int] | None, batch: int | None
) -> tuple[Bundle, int]:
    """The bundle at one input size, and the batch size of one of its graphs.

    Raises:
        ExportError: it has no such graph.
    """
    sizes = bundle.manifest.sizes
    if size is not None and size not in sizes:
        listed = ", ".join(f"{height}x{width}" for height, width in sizes) or "none"
        raise ExportError(f"the bundle has no graph of {size[0]}x{size[1]}; it has {listed}.")
    if batch is not None and batch not in bundle.batch_sizes:
        listed = ", ".join(map(str, bundle.batch_sizes))
        raise ExportError(f"the bundle has no graph of batch size {batch}; it has {listed}.")
    at = size or next(iter(sizes), None)
    return bundle if at is None else bundle.at(at), batch or bundle.batch_sizes[0]


def standard_model(bundle: Bundle, batch: int, opset: int) -> ModelProto:
    """A graph of a bundle with nothing but standard operators and tensors, weights included.

    Args:
        bundle: at one input size, its files in its folder.

    Raises:
        ExportError: see `set_opset`, and `check_one_file`.
    """
    from fdconv_deploy.export.graph import check_one_file

    graph = bundle.model_path(batch)
    model = inline_functions(onnx.load(str(graph), load_external_data=False))
    # Weights are joined last: what goes through onnx's C++ code must stay below 2 GB.
    model = set_opset(onnx.shape_inference.infer_shapes(model, data_prop=True), opset)
    check_one_file(model, "Keep the bundle, whose weights lie in a file of their own.")
    load_external_data_for_model(model, str(graph.parent))
    del model.metadata_props[:]
    for key, value in _metadata(bundle.manifest).items():
        model.metadata_props.add(key=key, value=value)
    return model


def _metadata(manifest: Manifest) -> dict[str, str]:
    """What a reader of the file needs to feed it and to name its answers, as JSON."""
    network = manifest.architecture or manifest.detector
    found: dict[str, Any] = {"kind": manifest.kind, "precision": manifest.precision}
    if network is not None:
        how = network.preprocessing
        found |= {
            "classes": network.classes,
            "palette": network.palette,
            "mean": how.mean,
            "std": how.std,
            "fit": manifest.fit,
        }
    return {f"fdconv.{key}": json.dumps(value) for key, value in found.items()}


def prove(bundle: Bundle, batch: int, path: Path, folder: Path, opset: int = OPSET) -> float:
    """Run a file and the bundle's graph; the largest difference, of the largest value.

    Args:
        bundle: its files in its folder.
        folder: for files of the comparison.
        opset: of the file.

    Raises:
        ExportError: the file does not load or run, or answers otherwise.
    """
    manifest = bundle.manifest
    network = manifest.architecture or manifest.detector
    feeds = sample_feeds(
        manifest.inputs[batch],
        None if network is None else network.preprocessing,
        vary_sizes=manifest.kind == "detector",
    )
    names = [spec.name for spec in manifest.outputs[batch]]
    expected = fresh(bundle.model_path(batch), names, folder)(feeds)
    advice = ""
    if opset != OPSET:
        advice = f" Choose the bundle's own opset, {OPSET}, in which nothing is rounded otherwise."
    try:
        found = fresh(path, names, folder)(feeds)
    except ExportError as error:  # of an operator that it has in other versions only
        raise ExportError(f"{error}.{advice}") from error
    errors = {name: _error(found[name], expected[name]) for name in names}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= (allowed := TOLERANCES[manifest.precision]):
        raise ExportError(
            f"the file's {worst} differs from the bundle's by {errors[worst]:.1e} of its largest "
            f"value, {allowed:.0e} is allowed. Nothing was kept.{advice}"
        )
    return errors[worst]


def _error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return np.inf
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(found, expected) else np.inf
    largest = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(found.astype(np.float64) - expected).max(initial=0.0)) / largest
