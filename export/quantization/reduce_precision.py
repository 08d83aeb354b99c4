"""A finished float32 graph to lower precision, with the report of what that cost."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onnx import ModelProto

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.options import ExportOptions
from fdconv_deploy.export.quantization.fp16 import rounding_model, to_half_precision
from fdconv_deploy.export.quantization.int8 import CalibrationInputs, quantizable, quantize
from fdconv_deploy.export.validation.sample_inputs import SourceNetwork
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.profiling.divergence import compare_graphs, points_of, save_exposed

NAMED = 3


class Reduction:
    """Converts the graphs of one export, one batch size after the other.

    The first graph is compared with its float32 form, layer by layer; `report` holds what
    was found, for the manifest. Ranges of activations are learned on it, too.
    """

    def __init__(self, source: SourceNetwork, options: ExportOptions, folder: Path) -> None:
        self.source, self.options, self.folder = source, options, folder
        self.layers = list(dynamic_layers(source.module))
        self.report: dict[str, Any] = {}

    def apply(self, model: ModelProto, batch: int) -> None:
        """Convert a float32 graph in place, or refuse it where float16 goes too far astray."""
        if self.report:
            self._convert(model, batch)
            return
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            self._first(model, batch, Path(name))

    def _first(self, model: ModelProto, batch: int, folder: Path) -> None:
        """Convert and compare. One copy of the weights at a time is kept in memory."""
        reference, reduced = folder / "reference.onnx", folder / "reduced.onnx"
        points = points_of(model, self.layers)
        save_exposed(model, points, reference)
        self._convert(model, batch)
        measured = rounding_model(model) if self.options.precision == "fp16" else model
        save_exposed(measured, points, reduced)
        del measured
        self.options.say(f"batch {batch}: comparing it with float32, layer by layer")
        found = compare_graphs(reference, reduced, self.source.feed(batch), points)
        self.report["layers"] = {
            d.name: [float(f"{d.max_rel:.2e}"), float(f"{d.angle:.1e}")] for d in found
        }
        worst = sorted(found, key=lambda d: -d.max_rel)
        self.report["worst"] = [d.name for d in worst[:NAMED]]
        far = [d for d in found if d.max_rel > self.options.allowed]
        if self.options.precision == "fp16" and far:
            worst = sorted(far, key=lambda d: -d.max_rel)[:NAMED]
            named = ", ".join(f"{d.name} ({d.max_rel:.1e})" for d in worst)
            start = far[0].name.removesuffix(" (sum)")
            raise ExportError(
                f"in fp16, {len(far)} of {len(found)} layers' outputs are further from float32's "
                f"than {self.options.allowed:.0e} of their largest value. Worst: {named}. The "
                f"first is {start}: keep it in float32 (--keep-fp32 {start!r}; may be repeated), "
                "or raise the tolerance. Nothing was kept."
            )

    def _convert(self, model: ModelProto, batch: int) -> None:
        if self.options.precision == "fp16":
            self.options.say(f"batch {batch}: converting to float16")
            done = to_half_precision(model, self.layers, self.options.keep_fp32)
            self.report = self.report or asdict(done)
            return
        images = self.source.calibration
        inputs = CalibrationInputs(self.source.input_names[0], images, batch, self.options.say)
        found = quantizable(model, self.layers, self.options.keep_fp32)
        self.options.say(f"batch {batch}: quantising {len(found)} convolutions")
        quantize(model, found, self.options.activations, inputs, self.folder)
        self.report = self.report or {
            "quantized": list(found.values()),
            "activations": self.options.activations,
            "calibration_images": len(images),
            "kept": list(self.options.keep_fp32),
        }
