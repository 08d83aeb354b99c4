"""Plain convolutions in eight bits, by ONNX Runtime's `quantize_static`.

Which convolutions are quantised is decided here. The first, whose input is the image, and the
last, whose output is the answer, stay float32; so do FDConv layers, what the caller names, and
convolutions too small for eight bits to save anything.

Weights are int8, symmetric, with a scale for each output channel; biases stay float32.
Activations take one of two forms:

- ``unsigned``: uint8, for ONNX Runtime, which computes in integers only between two quantised
  tensors: outputs are quantised as well, after their Relu.
- ``signed``: int8 with zero point 0, the only form TensorRT accepts. Inputs alone are
  quantised: TensorRT fuses what follows a convolution into it.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quantize_static,
)

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.options import Activations
from fdconv_deploy.export.quantization.fp16 import kept_nodes, tensor_types
from fdconv_deploy.export.validation.sample_inputs import CalibrationImages
from fdconv_deploy.profiling import label_nodes

# The few values beyond are cut off, so that all others are stored more finely.
PERCENTILE = 99.99
# A convolution with less than this share of all multiplications stays float32: pooled
# branches cost nothing, and what they lose, every pixel sees.
SMALLEST_SHARE = 1e-3


def quantizable(
    model: ModelProto, layers: Collection[str], keep: Iterable[str] = ()
) -> dict[str, str]:
    """The convolutions to quantise: each node's name and the path of its module.

    Arguments are those of `to_half_precision`.

    Raises:
        ExportError: a pattern matches no module, or no convolution is left.
    """
    nodes = list(model.graph.node)
    labels = label_nodes(model, layers)
    kept = kept_nodes(labels, keep)
    ends = _nearest(nodes, model.graph.input, lambda n: (n.input, n.output))
    ends |= _nearest(nodes[::-1], model.graph.output, lambda n: (n.output, n.input))
    types = tensor_types(model)
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    work = {  # multiplications of each convolution with a constant kernel
        node.name: math.prod(types[node.output[0]].shape or ())
        * math.prod(weights[node.input[1]][1:])
        for node in nodes
        if node.op_type == "Conv" and node.input[1] in weights
    }
    least = SMALLEST_SHARE * sum(work.values())
    found = {
        node.name: label.module
        for index, (node, label) in enumerate(zip(nodes, labels, strict=True))
        if work.get(node.name, -1) >= least
        and node.name not in ends
        and label.layer is None
        and index not in kept
    }
    if not found:
        raise ExportError(
            "this network has no plain convolution to compute in eight bits, besides its "
            "first and last. Export it in fp16, or keep fewer modules in float32."
        )
    return found


def _nearest(
    nodes: Sequence[NodeProto],
    ends: Iterable[onnx.ValueInfoProto],
    tensors: Callable[[NodeProto], tuple[Iterable[str], Iterable[str]]],
) -> set[str]:
    """Names of the convolutions that are reached from a graph's ends through no other one."""
    reached, found = {value.name for value in ends}, set()
    for node in nodes:
        near, far = tensors(node)
        if reached.isdisjoint(near):
            continue
        if node.op_type == "Conv":
            found.add(node.name)
        else:
            reached.update(far)
    return found


@dataclass
class CalibrationInputs(CalibrationDataReader):
    """Inputs to learn the ranges of activations from, handed to ONNX Runtime one by one."""

    name: str
    images: CalibrationImages
    batch: int
    progress: Callable[[str], None]
    # While ONNX Runtime is silenced, progress still reaches whoever prints it.
    stdout: TextIO = field(default_factory=lambda: sys.stdout)

    def __len__(self) -> int:
        return len(self.images)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Hand out these next; called once for each image, see ``CalibStridedMinMax``."""
        self._places = iter(range(start_index, end_index))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next input, repeated to the graph's batch size; None after the last."""
        place = next(self._places, None)
        if place is None:
            return None
        with contextlib.redirect_stdout(self.stdout):
            self.progress(f"learning the ranges of activations: image {place + 1}")
        image = self.images[place]
        if not np.isfinite(image).all():  # NaN would be left out of the histograms
            raise ValueError(f"image {place + 1} is not finite")
        return {self.name: np.repeat(image, self.batch, axis=0)}


def quantize(
    model: ModelProto,
    convolutions: Collection[str],
    activations: Activations,
    inputs: CalibrationInputs,
    folder: Path,
) -> None:
    """Put quantisation around convolutions, in place.

    Args:
        model: a float32 graph; its initializers hold their data.
        convolutions: names of nodes, from `quantizable`.
        activations: their form, see the module.
        inputs: read unless a graph of the same tensor names was calibrated in ``folder``.
        folder: keeps the ranges for the graphs of other batch sizes, which name their tensors
            the same.

    Raises:
        ExportError: a calibration image gives activations without a finite range.
    """
    signed = activations == "signed"
    names = list(convolutions)
    if not signed:  # Relus that alone read a quantised convolution
        outputs = {node.output[0] for node in model.graph.node if node.name in convolutions}
        reads = Counter(name for node in model.graph.node for name in node.input)
        names += [
            node.name
            for node in model.graph.node
            if node.op_type == "Relu" and node.input[0] in outputs and reads[node.input[0]] == 1
        ]
    chosen = [node for node in model.graph.node if node.name in names]
    tensors = tuple(name for node in chosen for name in (node.input[0], node.output[0]))
    options = {
        "CalibPercentile": PERCENTILE,
        "CalibStridedMinMax": 1,  # one image's activations in memory at a time
        "QuantizeBias": False,
        "QDQKeepRemovableActivations": True,  # a Relu's name is a place to compare graphs at
        "ActivationSymmetric": signed,
        "OpTypesToExcludeOutputQuantization": ["Conv"] if signed else [],
    }
    # Or its logger complains of a model that its own optimiser has not prepared.
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    path = folder / "int8.onnx"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
            quantize_static(
                model,
                path,
                inputs,
                op_types_to_quantize=["Conv", "Relu"],
                nodes_to_quantize=names,
                per_channel=True,
                activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
                calibrate_method=CalibrationMethod.Percentile,
                calibration_cache_path=folder / f"ranges-{hash(tensors):x}.json",
                extra_options=options,
            )
    except (ValueError, OverflowError) as error:  # of numpy's histograms
        raise ExportError(
            f"the ranges of activations cannot be learned from the calibration images: {error}. "
            "The network must give finite numbers for each of them."
        ) from error
    model.graph.CopyFrom(onnx.load(path).graph)
    del model.metadata_props[:]
    path.unlink()
