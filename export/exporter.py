"""Source network -> folded graphs -> validated -> bundle: all of it, or nothing."""

from __future__ import annotations

import hashlib
import os
import resource
import tempfile
import time
from contextlib import ExitStack
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.graph import build_graph, check_model
from fdconv_deploy.export.options import ExportOptions
from fdconv_deploy.export.quantization.reduce_precision import Reduction
from fdconv_deploy.export.source_network import SourceNetwork
from fdconv_deploy.export.torch_export import capture
from fdconv_deploy.export.validation.subprocess_run import fresh
from fdconv_deploy.export.validation.tolerance import TOLERANCES, Precision, counts_classes
from fdconv_deploy.export.validation.verdict import Judge, Subject, Verdict, refusal
from fdconv_deploy.folding.network import foldable_layers, input_sizes
from fdconv_deploy.runtime.bundle import Bundle, BundleWriter
from fdconv_deploy.runtime.manifest import Manifest, ParityReport, TensorSpec
from fdconv_deploy.version import __version__

# Smaller tensors (shapes, biases tiled per batch size) stay in the graph itself.
INLINE_BYTES = 1024
# ONNX Runtime maps aligned tensors from the file; 64 is a cache line.
ALIGNMENT = 64
WEIGHTS = "weights.bin"


def write_bundle(
    source: SourceNetwork, output: str | os.PathLike[str], options: ExportOptions
) -> Bundle:
    """Export a network to a bundle, or leave nothing behind.

    Raises:
        ExportError: the network cannot be exported, or a graph is too far from it.
        BundleError: ``output`` is in the way.
    """
    started = time.perf_counter()
    network = source.module
    inputs: dict[int, tuple[TensorSpec, ...]] = {}
    outputs: dict[int, tuple[TensorSpec, ...]] = {}
    models: dict[int, str] = {}
    group_maps: dict[str, str] = {}
    nodes: dict[str, int] = {}
    sizes: dict[str, tuple[int, int]] | None = None
    # A `with` of its own: entered through the stack, a signal could come before it is left by it.
    with BundleWriter(output, overwrite=options.overwrite) as writer, ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fdconv-export-")))
        judge = Judge(source, scratch, progress=options.say)
        reduction = Reduction(source, options, scratch)
        with (writer.path / WEIGHTS).open("wb") as file:
            weights = SharedWeights(file)
            for batch in source.batches:
                example = source.inputs[0].rows(batch)
                options.say(f"batch {batch}: running the network")
                answers = judge.answers(source.inputs[0], batch)
                options.say(f"batch {batch}: writing the graph")
                captured = capture(
                    network,
                    example,
                    input_names=source.input_names,
                    output_names=source.output_names,
                )
                if sizes is None:  # the same for every batch size
                    sizes = input_sizes(network, tuple(tensor[:1] for tensor in example))
                graph = build_graph(captured, network, sizes, batch)
                del captured
                if options.precision != "fp32":
                    exact = scratch / "fp32.onnx"
                    onnx.save(graph.model, str(exact))
                    _validate(source, judge, batch, exact, "fp32", TOLERANCES["fp32"])
                    exact.unlink()
                    reduction.apply(graph.model, batch)
                weights.take(graph.model)
                models[batch] = f"model.b{batch}.onnx"
                onnx.save(graph.model, str(writer.path / models[batch]))
                group_maps |= graph.group_maps
                nodes[f"nodes.b{batch}"] = len(graph.model.graph.node)
                inputs[batch] = _specs(source.feed(batch))
                outputs[batch] = _specs(answers)
        verdicts: dict[int, Verdict] = {}
        for batch, name in models.items():
            path = writer.path / name
            check_model(str(path))
            verdicts[batch] = _validate(
                source, judge, batch, path, options.precision, options.allowed
            )
        entries: dict[str, Any] = {
            **source.manifest.get("graph", {}),
            **nodes,
            "fdconv_layers": len(foldable_layers(network)),
            "exactness": {str(batch): verdict.as_dict() for batch, verdict in verdicts.items()},
            **({"precision": reduction.report} if reduction.report else {}),
            "export_seconds": round(time.perf_counter() - started, 1),
            "export_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        return writer.commit(
            Manifest(
                created_by=f"fdconv-deploy {__version__}",
                created_at=datetime.now(timezone.utc),
                precision=options.precision,
                models=models,
                weights=WEIGHTS,
                inputs=inputs,
                outputs=outputs,
                group_maps=group_maps,
                parity=_parity(verdicts),
                versions={n: version(n) for n in ("torch", "onnx", "onnxruntime", "numpy")},
                **{**source.manifest, "graph": entries},
            )
        )


class SharedWeights:
    """One weights file that the graphs of all batch sizes share: equal tensors are stored once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._name = file, Path(file.name).name
        self._offsets: dict[str, int] = {}

    def take(self, model: ModelProto) -> None:
        """Move a model's large initializers here; it then refers to this file by name."""
        for tensor in model.graph.initializer:
            if not tensor.HasField("raw_data"):
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
            if len(tensor.raw_data) <= INLINE_BYTES:
                continue
            offset, length = self._store(tensor.raw_data), len(tensor.raw_data)
            onnx.external_data_helper.set_external_data(tensor, self._name, offset, length)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL

    def _store(self, data: bytes) -> int:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._offsets[key] = self._file.tell()
            self._file.write(data)
        return self._offsets[key]


def _validate(
    source: SourceNetwork, judge: Judge, batch: int, model: Path, precision: Precision, limit: float
) -> Verdict:
    """Judge a graph, and refuse it where it is not the network.

    In float32 every layer is judged; what lower precision costs, `Reduction` measures
    layer by layer, and here the answer alone is compared with the tolerance.
    """
    exact = precision == "fp32"
    run = fresh(model, source.output_names, judge.folder)
    subject = Subject(batch, run, precision, limit, model if exact else None)
    verdict = judge.judge(subject, source.inputs[:1], source.inputs[1:])
    if verdict.equal:
        return verdict
    message = refusal(verdict, f"the exported {precision} graph of batch {batch}")
    wrong = verdict.wrong
    if wrong is not None and wrong.parity is not None and counts_classes(wrong.parity, precision):
        message = (
            f"the int8 graph of batch {batch} gives {wrong.error:.1%} of the positions another "
            f"class than the network, {limit:.1%} is allowed. Calibrate on pictures "
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


def _parity(verdicts: dict[int, Verdict]) -> ParityReport:
    shown = [finding.source for verdict in verdicts.values() for finding in verdict.shown]
    return ParityReport(
        batches={batch: verdict.parity for batch, verdict in verdicts.items()},
        reference=f"PyTorch {torch.__version__}, float32, CPU",
        backend=f"ONNX Runtime {version('onnxruntime')}, CPU",
        inputs=", ".join(dict.fromkeys(shown)),
    )


def _specs(arrays: dict[str, NDArray]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=name, shape=array.shape, dtype=str(array.dtype))
        for name, array in arrays.items()
    )
