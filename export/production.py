"""Carries a recipe out: graphs, checks, manifest, all or nothing."""

from __future__ import annotations

import copy
import math
import os
import resource
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

import fdconv_deploy
from export.capture import capture
from export.detection_parity import compare_detections, perturbed
from export.graph import build_graph, check_model
from export.parity import measure
from export.recipe import Precision, Recipe, finite_answers, outputs_of
from export.reduction import Reduction
from export.weights import WeightsFile
from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.network import dynamic_layers, input_sizes
from fdconv_deploy.runtime.bundle import Bundle, BundleWriter
from fdconv_deploy.runtime.manifest import Manifest, OutputParity, ParityReport, TensorSpec

FP32 = Precision()


def produce(recipe: Recipe, destination: str | os.PathLike[str], overwrite: bool) -> Bundle:
    """Write the bundle, or nothing.

    Raises:
        ExportError: the network cannot be exported, or a graph is too far from it.
        BundleError: ``destination`` is in the way.
    """
    started = time.perf_counter()
    network = recipe.network
    parity: dict[int, tuple[OutputParity, ...]] = {}
    inputs: dict[int, tuple[TensorSpec, ...]] = {}
    outputs: dict[int, tuple[TensorSpec, ...]] = {}
    models: dict[int, str] = {}
    group_maps: dict[str, str] = {}
    nodes: dict[str, int] = {}
    sizes: dict[str, tuple[int, int]] | None = None
    with (
        BundleWriter(destination, overwrite=overwrite) as writer,
        tempfile.TemporaryDirectory(prefix="fdconv-export-") as name,
    ):
        scratch = Path(name)
        answers: dict[int, dict[str, NDArray]] = {}
        reduction = Reduction(recipe, scratch)
        with WeightsFile(writer.path / "weights.bin") as weights:
            for batch, example in recipe.examples.items():
                recipe.progress(f"batch {batch}: running the network")
                answers[batch] = finite_answers(recipe, example)
                recipe.progress(f"batch {batch}: writing the graph")
                captured = capture(
                    network,
                    example,
                    input_names=recipe.input_names,
                    output_names=recipe.output_names,
                )
                if sizes is None:  # the same for every batch size
                    sizes = input_sizes(network, tuple(tensor[:1] for tensor in example))
                graph = build_graph(captured, network, sizes, batch)
                del captured
                if recipe.precision.name != "fp32":
                    exact = scratch / "fp32.onnx"
                    onnx.save(graph.model, str(exact))
                    _prove(recipe, batch, exact, answers[batch], scratch, FP32)
                    exact.unlink()
                    reduction.apply(graph.model, batch)
                weights.take(graph.model)
                models[batch] = f"model.b{batch}.onnx"
                onnx.save(graph.model, str(writer.path / models[batch]))
                group_maps |= graph.group_maps
                nodes[f"nodes.b{batch}"] = len(graph.model.graph.node)
                inputs[batch] = tuple(_spec(n, a) for n, a in recipe.feed(batch).items())
                outputs[batch] = tuple(_spec(n, a) for n, a in answers[batch].items())
        for batch in recipe.examples:
            path = writer.path / models[batch]
            check_model(str(path))
            parity[batch] = _prove(recipe, batch, path, answers[batch], scratch, recipe.precision)
        manifest = Manifest(
            created_by=f"fdconv-deploy {fdconv_deploy.__version__}",
            created_at=datetime.now(timezone.utc),
            precision=recipe.precision.name,
            models=models,
            weights="weights.bin",
            inputs=inputs,
            outputs=outputs,
            group_maps=group_maps,
            parity=ParityReport(
                batches=parity,
                reference=f"PyTorch {torch.__version__}, float32, CPU",
                backend=f"ONNX Runtime {version('onnxruntime')}, CPU",
                inputs=recipe.inputs_said,
            ),
            graph={
                **recipe.manifest.get("graph", {}),
                **nodes,
                "fdconv_layers": len(dynamic_layers(network)),
                **({"precision": reduction.report} if reduction.report else {}),
                "export_seconds": round(time.perf_counter() - started, 1),
                "export_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            },
            versions={n: version(n) for n in ("torch", "onnx", "onnxruntime", "numpy")},
            **{k: v for k, v in recipe.manifest.items() if k != "graph"},
        )
        return writer.commit(manifest)


def _prove(
    recipe: Recipe,
    batch: int,
    model: Path,
    expected: dict[str, NDArray],
    scratch: Path,
    precision: Precision,
) -> tuple[OutputParity, ...]:
    """Compare a graph with the network's answers, and refuse it past the tolerance."""
    said = "" if precision is recipe.precision else " in float32 first"
    recipe.progress(f"batch {batch}: checking it{said} against the network")
    found = measure(
        model,
        recipe.feed(batch),
        expected,
        scratch,
        rule=recipe.rule,
        others=perturbed(partial(_ask, recipe), recipe.feed(batch)),
    )

    def distance(output: OutputParity) -> float:
        return precision.distance(output) / recipe.rule.slack(output.name)

    worst = max(found, key=distance)
    if distance(worst) <= precision.tolerance:
        return found
    if precision.counts_classes(worst):
        raise ExportError(
            f"the int8 graph of batch {batch} gives {precision.distance(worst):.1%} of the "
            f"positions another class than the network, {precision.tolerance:.1%} is allowed. "
            "Nothing was kept. Calibrate on pictures of the kind the network will see "
            "(--calibrate), compare on such (--image), keep modules in float32 (--keep-fp32), or "
            "raise --tolerance."
        )
    # Whose fault it is: what rounding alone does to the network on these inputs.
    own = _own_error(recipe, batch, expected, worst.name)
    raise ExportError(
        f"the exported graph of batch {batch}{said and ', in float32,'} is not equal to the "
        f"network: output {worst.name!r} differs by {worst.max_rel:.1e} of its largest value, "
        f"{precision.tolerance:.0e} is allowed. Nothing was kept. The PyTorch network's own "
        f"rounding error on these inputs ({recipe.inputs_said}) is {own:.1e}: if that is much, "
        "compare on pictures of the kind it was trained on (--image)"
        + (", or raise the tolerance." if not said else ".")
    )


def _own_error(recipe: Recipe, batch: int, expected: dict[str, NDArray], name: str) -> float:
    """How far the network's output ``name`` is from its own in float64: infinitely, if a
    detector then finds other objects."""
    double = copy.deepcopy(recipe.network).double()
    outputs = outputs_of(double, tuple(tensor.double() for tensor in recipe.examples[batch]))
    exact = {n: o.numpy() for n, o in zip(recipe.output_names, outputs, strict=True)}
    if recipe.rule.kind == "detections":
        try:
            found = compare_detections(expected, exact, recipe.rule.score_thr)
        except ExportError:
            return math.inf
        return next(output.max_rel for output in found if output.name == name)
    reference = exact[name]
    return float(np.abs(expected[name] - reference).max() / np.abs(reference).max())


def _ask(recipe: Recipe, feed: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """The network's answers to other inputs."""
    outputs = outputs_of(recipe.network, tuple(map(torch.from_numpy, feed.values())))
    return {n: o.numpy() for n, o in zip(recipe.output_names, outputs, strict=True)}


def _spec(name: str, array: NDArray) -> TensorSpec:
    return TensorSpec(name=name, shape=array.shape, dtype=str(array.dtype))
