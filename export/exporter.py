"""Source network -> folded graphs -> validated -> bundle: all of it, or nothing."""

from __future__ import annotations

import hashlib
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.graph import build_graph, check_model, number_values
from fdconv_deploy.export.options import ExportOptions
from fdconv_deploy.export.quantization.reduce_precision import Reduction
from fdconv_deploy.export.source_network import SourceNetwork
from fdconv_deploy.export.torch_export import capture
from fdconv_deploy.export.validation.subprocess_run import fresh
from fdconv_deploy.export.validation.tolerance import TOLERANCES, Precision, counts_classes
from fdconv_deploy.export.validation.verdict import Judge, Subject, Verdict, refusal
from fdconv_deploy.folding.network import input_sizes
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.runtime.bundle import Bundle, BundleWriter
from fdconv_deploy.runtime.manifest import Manifest, ParityReport, SizedGraphs, TensorSpec
from fdconv_deploy.version import __version__

# Smaller tensors (shapes) stay in the graph itself: to refer to a tensor takes some 60 bytes.
INLINE_BYTES = 128
# ONNX Runtime maps aligned tensors from the file; 64 is a cache line.
ALIGNMENT = 64
WEIGHTS = "weights.bin"


@dataclass
class SizedExport:
    """The graphs of one input size as they are made, and what judges them.

    name: ends what is said of it, and begins its graphs' names, where there are several sizes.
    """

    source: SourceNetwork
    name: str
    judge: Judge
    reduction: Reduction
    models: dict[int, str] = field(default_factory=dict)
    inputs: dict[int, tuple[TensorSpec, ...]] = field(default_factory=dict)
    outputs: dict[int, tuple[TensorSpec, ...]] = field(default_factory=dict)
    group_maps: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    @property
    def graphs(self) -> dict[str, Any]:
        """Entries of the manifest that belong to one input size."""
        return {
            "models": self.models,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "parity": _parity(self.verdicts),
        }

    @property
    def found(self) -> dict[str, Any]:
        """What is written down about these graphs."""
        exactness = {str(batch): verdict.as_dict() for batch, verdict in self.verdicts.items()}
        return {**self.nodes, "exactness": exactness}


def write_bundle(
    sources: Sequence[SourceNetwork], output: str | os.PathLike[str], options: ExportOptions
) -> Bundle:
    """Export a network to a bundle, or leave nothing behind.

    Args:
        sources: the network at each input size, the bundle's own first.
        output: the bundle's folder.
        options: how it is exported; those of the sizes are in the sources.

    Raises:
        ExportError: the network cannot be exported, or a graph is too far from it.
        BundleError: ``output`` is in the way.
    """
    started = time.perf_counter()
    # A `with` of its own: entered through the stack, a signal could come before it is left by it.
    with BundleWriter(output, overwrite=options.overwrite) as writer, ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fdconv-export-")))
        sized = []
        for number, source in enumerate(sources):
            folder = scratch / str(number)
            folder.mkdir()
            judge = Judge(source, folder, progress=options.say)
            reduction = Reduction(source, options, folder)
            name = str(source.manifest["input"]) if len(sources) > 1 else ""
            sized.append(SizedExport(source, name, judge, reduction))
        with (writer.path / WEIGHTS).open("wb") as file:
            weights = SharedWeights(file)
            for number, one in enumerate(sized):
                _write_graphs(one, writer.path, f"{one.name}." * (number > 0), weights, options)
        for one in sized:
            for batch, name in one.models.items():
                path = writer.path / name
                check_model(str(path))
                one.verdicts[batch] = _validate(
                    one, batch, path, options.precision, options.allowed
                )
        first, *others = sized
        entries: dict[str, Any] = {
            **first.source.manifest.get("graph", {}),
            **first.found,
            **({"sizes": {one.name: one.found for one in others}} if others else {}),
            "fdconv_layers": len(dynamic_layers(first.source.module)),
            **({"precision": first.reduction.report} if first.reduction.report else {}),
            "export_seconds": round(time.perf_counter() - started, 1),
            "export_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        return writer.commit(
            Manifest(
                created_by=f"fdconv-deploy {__version__}",
                created_at=datetime.now(timezone.utc),
                precision=options.precision,
                **first.graphs,
                other_sizes=tuple(
                    SizedGraphs(input=one.source.manifest["input"], **one.graphs) for one in others
                ),
                weights=WEIGHTS,
                group_maps=first.group_maps,
                versions={n: version(n) for n in ("torch", "onnx", "onnxruntime", "numpy")},
                **{**first.source.manifest, "graph": entries},
            )
        )


def _write_graphs(
    one: SizedExport, folder: Path, prefix: str, weights: SharedWeights, options: ExportOptions
) -> None:
    """Write the graph of every batch size to a folder; large constants go to the weights."""
    source, sizes = one.source, None
    for batch in source.batches:
        at = ", ".join(filter(None, [one.name, f"batch {batch}"]))
        example = source.inputs[0].rows(batch)
        options.say(f"{at}: running the network")
        answers = one.judge.answers(source.inputs[0], batch)
        options.say(f"{at}: writing the graph")
        captured = capture(
            source.module,
            example,
            input_names=source.input_names,
            output_names=source.output_names,
        )
        if sizes is None:  # the same for every batch size
            sizes = input_sizes(source.module, tuple(tensor[:1] for tensor in example))
        graph = build_graph(captured, source.module, sizes, batch)
        del captured
        if options.precision != "fp32":
            exact = one.judge.folder / "fp32.onnx"
            onnx.save(graph.model, str(exact))
            _validate(one, batch, exact, "fp32", TOLERANCES["fp32"])
            exact.unlink()
            one.reduction.apply(graph.model, batch)
        if prefix:
            number_values(graph.model, source.module)
        weights.take(graph.model)
        one.models[batch] = f"model.{prefix}b{batch}.onnx"
        onnx.save(graph.model, str(folder / one.models[batch]))
        one.group_maps |= graph.group_maps
        one.nodes[f"nodes.b{batch}"] = len(graph.model.graph.node)
        one.inputs[batch] = _specs(source.feed(batch))
        one.outputs[batch] = _specs(answers)


class SharedWeights:
    """One weights file that all graphs share: equal tensors are stored once."""

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
    one: SizedExport, batch: int, model: Path, precision: Precision, limit: float
) -> Verdict:
    """Judge a graph, and refuse it where it is not the network.

    In float32 every layer is judged; what lower precision costs, `Reduction` measures
    layer by layer, and here the answer alone is compared with the tolerance.
    """
    exact, source, judge = precision == "fp32", one.source, one.judge
    run = fresh(model, source.output_names, judge.folder)
    subject = Subject(batch, run, precision, limit, model if exact else None)
    verdict = judge.judge(subject, source.inputs[:1], source.inputs[1:])
    if verdict.equal:
        return verdict
    of = f"batch {batch}" + (f" at {one.name}" if one.name else "")
    message = refusal(verdict, f"the exported {precision} graph of {of}")
    wrong = verdict.wrong
    if wrong is not None and wrong.parity is not None and counts_classes(wrong.parity, precision):
        message = (
            f"the int8 graph of {of} gives {wrong.error:.1%} of the positions another "
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
