"""Carries a recipe out: graphs, checks, manifest, all or nothing."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import onnx
import torch
from fdconv_deploy.export.graph import build_graph, check_model
from fdconv_deploy.export.quantization.reduce_precision import Reduction
from fdconv_deploy.export.shared_weights import WeightsFile
from fdconv_deploy.export.source_network import Precision, Recipe
from fdconv_deploy.export.torch_export import capture
from fdconv_deploy.export.validation.judge import Judge, Subject, fresh
from fdconv_deploy.export.validation.verdict import Verdict, refusal
from numpy.typing import NDArray

from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.network import dynamic_layers, input_sizes
from fdconv_deploy.runtime.bundle import Bundle, BundleWriter
from fdconv_deploy.runtime.manifest import Manifest, ParityReport, TensorSpec
from fdconv_deploy.version import __version__

FP32 = Precision()


def produce(recipe: Recipe, destination: str | os.PathLike[str], overwrite: bool) -> Bundle:
    """Write the bundle, or nothing.

    Raises:
        ExportError: the network cannot be exported, or a graph is too far from it.
        BundleError: ``destination`` is in the way.
    """
    started = time.perf_counter()
    network = recipe.network
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
        judge = Judge(
            network,
            recipe.rule,
            recipe.input_names,
            recipe.output_names,
            scratch,
            independent=recipe.rule.kind != "values",
            progress=recipe.progress,
        )
        verdicts: dict[int, Verdict] = {}
        reduction = Reduction(recipe, scratch)
        with WeightsFile(writer.path / "weights.bin") as weights:
            for batch in recipe.batches:
                example = recipe.source.rows(batch)
                recipe.progress(f"batch {batch}: running the network")
                answers = judge.answers(recipe.source, batch)
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
                    _prove(recipe, judge, batch, exact, scratch, FP32)
                    exact.unlink()
                    reduction.apply(graph.model, batch)
                weights.take(graph.model)
                models[batch] = f"model.b{batch}.onnx"
                onnx.save(graph.model, str(writer.path / models[batch]))
                group_maps |= graph.group_maps
                nodes[f"nodes.b{batch}"] = len(graph.model.graph.node)
                inputs[batch] = tuple(_spec(n, a) for n, a in recipe.feed(batch).items())
                outputs[batch] = tuple(_spec(n, a) for n, a in answers.items())
        for batch in recipe.batches:
            path = writer.path / models[batch]
            check_model(str(path))
            verdicts[batch] = _prove(recipe, judge, batch, path, scratch, recipe.precision)
        manifest = Manifest(
            created_by=f"fdconv-deploy {__version__}",
            created_at=datetime.now(timezone.utc),
            precision=recipe.precision.name,
            models=models,
            weights="weights.bin",
            inputs=inputs,
            outputs=outputs,
            group_maps=group_maps,
            parity=ParityReport(
                batches={batch: verdict.parity for batch, verdict in verdicts.items()},
                reference=f"PyTorch {torch.__version__}, float32, CPU",
                backend=f"ONNX Runtime {version('onnxruntime')}, CPU",
                inputs=", ".join(
                    dict.fromkeys(f.source for v in verdicts.values() for f in v.shown)
                ),
            ),
            graph={
                **recipe.manifest.get("graph", {}),
                **nodes,
                "fdconv_layers": len(dynamic_layers(network)),
                "exactness": {str(batch): v.as_dict() for batch, v in verdicts.items()},
                **({"precision": reduction.report} if reduction.report else {}),
                "export_seconds": round(time.perf_counter() - started, 1),
                "export_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            },
            versions={n: version(n) for n in ("torch", "onnx", "onnxruntime", "numpy")},
            **{k: v for k, v in recipe.manifest.items() if k != "graph"},
        )
        return writer.commit(manifest)


def _prove(
    recipe: Recipe, judge: Judge, batch: int, model: Path, scratch: Path, precision: Precision
) -> Verdict:
    """Judge a graph, and refuse it where it is not the network.

    In float32 that is asked of every layer; what lower precision costs, `Reduction` measures
    layer by layer, and here the answer alone is held against the tolerance.
    """
    exact = precision.name == "fp32"
    verdict = judge.judge(
        Subject(
            batch,
            fresh(model, recipe.output_names, scratch),
            precision.tolerance,
            model if exact else None,
            distance=precision.distance,
        ),
        [recipe.source],
        recipe.spares,
    )
    if verdict.equal:
        return verdict
    said = "" if precision is recipe.precision else ", in float32,"
    message = refusal(verdict, f"the exported graph of batch {batch}{said}")
    wrong = verdict.wrong
    if wrong is not None and wrong.parity is not None and precision.counts_classes(wrong.parity):
        message = (
            f"the int8 graph of batch {batch} gives {wrong.error:.1%} of the positions another "
            f"class than the network, {precision.tolerance:.1%} is allowed. Calibrate on pictures "
            "of the kind the network will see (--calibrate), compare on such (--image), keep "
            "modules in float32 (--keep-fp32), or raise --tolerance."
        )
    elif wrong is not None and not exact:
        message += " Keep modules in float32 (--keep-fp32), or raise --tolerance."
    elif wrong is not None:
        message += (
            " That is a fault of the export, not of the checkpoint or the pictures: please report "
            "it with this message."
        )
    raise ExportError(f"{message} Nothing was kept.")


def _spec(name: str, array: NDArray) -> TensorSpec:
    return TensorSpec(name=name, shape=array.shape, dtype=str(array.dtype))
