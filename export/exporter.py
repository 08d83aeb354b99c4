"""Source network -> folded graphs -> validated -> bundle: all of it, or nothing."""

from __future__ import annotations

import hashlib
import os
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
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
from fdconv_deploy.export.torch_export import capture
from fdconv_deploy.export.validation.sample_inputs import SourceNetwork
from fdconv_deploy.export.validation.subprocess_run import fresh
from fdconv_deploy.export.validation.tolerance import TOLERANCES, Precision
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
    with (
        BundleWriter(output, overwrite=options.overwrite) as writer,
        tempfile.TemporaryDirectory(prefix="fdconv-export-") as scratch,
    ):
        folders = [Path(tempfile.mkdtemp(dir=scratch)) for _ in sources]
        sized = [
            _SizedExport(source, options, folder, several=len(sources) > 1)
            for source, folder in zip(sources, folders, strict=True)
        ]
        first, *others = sized
        with (writer.path / WEIGHTS).open("wb") as file:
            weights = SharedWeights(file)
            for one in sized:
                one.write(writer.path, weights, prefix="" if one is first else f"{one.name}.")
        for one in sized:
            one.validate(writer.path)
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


class _SizedExport:
    """The graphs of one input size, by batch size, and what judges them.

    name: the input size, where there are ``several``.
    """

    def __init__(
        self, source: SourceNetwork, options: ExportOptions, folder: Path, *, several: bool
    ) -> None:
        self.source, self.options, self.folder = source, options, folder
        self.name = str(source.manifest["input"]) if several else ""
        self.judge = Judge(source, folder, progress=options.say)
        self.reduction = Reduction(source, options, folder)
        self.models: dict[int, str] = {}
        self.inputs: dict[int, tuple[TensorSpec, ...]] = {}
        self.outputs: dict[int, tuple[TensorSpec, ...]] = {}
        self.group_maps: dict[str, str] = {}
        self.nodes: dict[str, int] = {}
        self.verdicts: dict[int, Verdict] = {}

    @property
    def graphs(self) -> dict[str, Any]:
        """Entries of the manifest that belong to one input size."""
        shown = [finding.source for verdict in self.verdicts.values() for finding in verdict.shown]
        parity = ParityReport(
            batches={batch: verdict.parity for batch, verdict in self.verdicts.items()},
            reference=f"PyTorch {torch.__version__}, float32, CPU",
            backend=f"ONNX Runtime {version('onnxruntime')}, CPU",
            inputs=", ".join(dict.fromkeys(shown)),
        )
        specs = {"inputs": self.inputs, "outputs": self.outputs}
        return {"models": self.models, **specs, "parity": parity}

    @property
    def found(self) -> dict[str, Any]:
        """What is written down about these graphs."""
        exactness = {str(batch): verdict.as_dict() for batch, verdict in self.verdicts.items()}
        return {**self.nodes, "exactness": exactness}

    def write(self, folder: Path, weights: SharedWeights, *, prefix: str) -> None:
        """Write the graph of every batch size to a folder; large constants go to the weights."""
        source, say = self.source, self.options.say
        sizes: dict[str, tuple[int, int]] | None = None
        for batch in source.batches:
            at = ", ".join(filter(None, [self.name, f"batch {batch}"]))
            say(f"{at}: running the network")
            answers = self.judge.answers(source.inputs[0], batch)
            say(f"{at}: writing the graph")
            captured = capture(
                source.module,
                source.inputs[0].rows(batch),
                input_names=source.input_names,
                output_names=source.output_names,
            )
            if sizes is None:  # the same for every batch size
                sizes = input_sizes(source.module, source.inputs[0].rows(1))
            model, group_maps = build_graph(captured, source.module, sizes, batch)
            del captured
            if self.options.precision != "fp32":
                exact = self.folder / "fp32.onnx"
                onnx.save(model, str(exact))
                self._judged(batch, exact, "fp32", TOLERANCES["fp32"])
                exact.unlink()
                self.reduction.apply(model, batch)
            if prefix:
                number_values(model, source.module)
            weights.take(model)
            self.models[batch] = f"model.{prefix}b{batch}.onnx"
            onnx.save(model, str(folder / self.models[batch]))
            self.group_maps |= group_maps
            self.nodes[f"nodes.b{batch}"] = len(model.graph.node)
            self.inputs[batch] = _specs(source.feed(batch))
            self.outputs[batch] = _specs(answers)

    def validate(self, folder: Path) -> None:
        """Check and judge the graphs that were written to a folder."""
        for batch, name in self.models.items():
            check_model(str(folder / name))
            options = self.options
            verdict = self._judged(batch, folder / name, options.precision, options.allowed)
            self.verdicts[batch] = verdict

    def _judged(self, batch: int, model: Path, precision: Precision, limit: float) -> Verdict:
        """The verdict on a graph; an ExportError where it is not the network.

        In float32 every layer is judged; what lower precision costs, `Reduction` measures
        layer by layer, and here the answer alone is compared with the tolerance.
        """
        exact, source = precision == "fp32", self.source
        run = fresh(model, source.output_names, self.folder)
        subject = Subject(batch, run, precision, limit, model if exact else None)
        verdict = self.judge.judge(subject, source.inputs[:1], source.inputs[1:])
        if verdict.equal:
            return verdict
        of = f"batch {batch}" + (f" at {self.name}" if self.name else "")
        message = refusal(verdict, f"the exported {precision} graph of {of}")
        wrong = verdict.wrong
        if wrong is not None and wrong.counts_classes:
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
                " That is a fault of the export, not of the checkpoint or the pictures: please "
                "report it with this message."
            )
        raise ExportError(f"{message} Nothing was kept.")


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


def _specs(arrays: Mapping[str, NDArray]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=name, shape=array.shape, dtype=str(array.dtype))
        for name, array in arrays.items()
    )
