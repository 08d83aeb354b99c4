"""The network that is exported: what it takes and gives, and what its graphs are compared on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from fdconv_deploy.export.options import ExportOptions
from fdconv_deploy.export.outputs import flatten_outputs
from fdconv_deploy.export.validation.comparison import Comparison
from fdconv_deploy.export.validation.sample_inputs import (
    CalibrationImages,
    InputSource,
    PreparedPictures,
    decoded_for,
    example_sources,
    picture_source,
    sample_sources,
)
from numpy.typing import NDArray
from torch import Tensor, nn

from fdconv_deploy.checkpoints import LoadedDetector, LoadedSegmentor
from fdconv_deploy.config import SIZE_DIVISOR
from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.network import dynamic_layers
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.from_published import convert_published
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime.manifest import CheckpointInfo, InputSize


@dataclass(frozen=True, eq=False)
class SourceNetwork:
    """A network, with all that an export or a comparison needs to know about it.

    Attributes:
        module: in eval mode.
        inputs: to compare on. Graphs are traced on the first; the others are tried where those
            before cannot tell whether a graph is the network.
        batches: batch sizes to export.
        calibration: inputs ``(1, …)`` float32 for int8.
        manifest: entries of the bundle's manifest that say what the network is.
    """

    module: nn.Module
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    comparison: Comparison
    inputs: Sequence[InputSource]
    batches: tuple[int, ...] = (1,)
    calibration: CalibrationImages = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def feed(self, batch: int) -> dict[str, NDArray]:
        """The inputs that graphs of a batch size are traced on, by name."""
        tensors = zip(self.input_names, self.inputs[0].rows(batch), strict=True)
        return {name: tensor.numpy() for name, tensor in tensors}


def network_of(network: Segmentor | Detector, size: tuple[int, int]) -> SourceNetwork:
    """A segmentor or detector at a height and width, to be compared on packaged pictures."""
    detects = isinstance(network, Detector)
    return SourceNetwork(
        network,
        ("images", "sizes") if detects else ("images",),
        tuple(network.output_names) if isinstance(network, Detector) else ("logits",),
        Comparison.of(network.architecture),
        sample_sources(network, size),
    )


def network_to_export(
    network: Segmentor | Detector, options: ExportOptions, checkpoint: CheckpointInfo | None = None
) -> SourceNetwork:
    """A segmentor or detector, ready to be exported.

    Raises:
        ExportError: the network or the options do not allow it.
    """
    _refuse_training(network)
    if isinstance(network, Detector):
        detects, size = True, _detector_size(network, options)
    else:
        detects, size = False, _segmentor_size(network, options)
    if not dynamic_layers(network):
        # A plain baseline is exported all the same: benchmarks compare with it.
        options.say("note: this network has no FDConv layer")
    how = network.architecture.preprocessing
    source = network_of(network, size)
    inputs = list(source.inputs)
    if len(options.pictures):
        inputs.insert(0, picture_source(network, options.pictures, size))
    return replace(
        source,
        inputs=inputs,
        batches=tuple(options.batches or (1,)),
        calibration=PreparedPictures(decoded_for(options.calibration, how), size, how),
        manifest={
            "kind": "detector" if detects else "segmentor",
            "detector" if detects else "architecture": network.architecture,
            "input": InputSize(height=size[0], width=size[1]),
            "fit": "pad" if detects else options.fit,
            "checkpoint": checkpoint,
            "graph": _how_it_was_read(network),
        },
    )


def module_to_export(
    module: nn.Module,
    example: Tensor,
    options: ExportOptions,
    *,
    input_name: str,
    outputs: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> SourceNetwork:
    """Any module, ready to be exported; arguments as `export_module`'s.

    Raises:
        ExportError: the module, the example or the options do not allow it.
        UnsupportedLayerError: an FDConv layer is a variant of the published one.
    """
    # What torch.compile gives traces a second time; the module in it is the same network.
    module = getattr(module, "_orig_mod", module)
    _refuse_training(module)
    if not isinstance(example, Tensor) or example.dtype != torch.float32:
        found = f"a tensor of {example.dtype}" if isinstance(example, Tensor) else type(example)
        raise ExportError(
            f"the example must be one float32 torch tensor, got {found}. Convert it, and the "
            "module, with .float(); a module of several inputs needs a wrapper of one."
        )
    if options.size is not None or options.fit != "stretch" or len(options.pictures):
        raise ExportError(
            "size, fit and pictures are for checkpoints: a module is exported at its example's "
            "shape and compared on the example. Leave them out."
        )
    for tensor in options.calibration:
        if tensor.shape[1:] != example.shape[1:] or tensor.dtype != torch.float32:
            raise ExportError(
                f"calibration inputs must be float32 of the example's shape past the batch, "
                f"{tuple(example.shape[1:])}, got {tensor.dtype} {tuple(tensor.shape)}."
            )
    module, names = flatten_outputs(
        module, example, chosen=outputs, given=output_names, progress=options.say
    )
    if input_name in names:
        raise ExportError(
            f"an output is called {input_name!r} as the input is: give another input_name, or "
            "output_names=[...]."
        )
    module, assumed = convert_published(module, example, options.progress)
    manifest: dict[str, Any] = {"kind": "module"}
    if assumed:
        phrases = {name: "; ".join(found) for name, found in assumed.items() if found}
        manifest["graph"] = {"converted_layers": sorted(assumed), "assumed": phrases}
    return SourceNetwork(
        module,
        (input_name,),
        tuple(names),
        Comparison.of(None),
        example_sources(example),
        tuple(options.batches or (example.shape[0],)),
        [image[None].numpy() for tensor in options.calibration for image in tensor],
        manifest,
    )


def _refuse_training(network: nn.Module) -> None:
    if network.training:
        raise ExportError("the network is in training mode; call .eval() before exporting.")


def _segmentor_size(network: Segmentor, options: ExportOptions) -> tuple[int, int]:
    """The height and width given, or the crop of a sliding network."""
    test, size = network.architecture.test, options.size
    crop = test.crop_size if test.mode == "slide" else None
    if size is None:
        if crop is None:
            raise ExportError(
                "a network tested on whole images has no size of its own: give the graph's, "
                "e.g. --size 512x512."
            )
        return crop
    if crop is not None and size != crop:
        raise ExportError(
            f"this network was tested by sliding a {crop[0]}x{crop[1]} crop (height x width), "
            f"and its answers depend on the crop, but --size is {size[0]}x{size[1]}. Leave "
            "--size out, or say --mode whole to run it on whole images at that size."
        )
    backbone, head = network.architecture.backbone, network.architecture.decode_head
    deepest = max(backbone.out_indices[i] for i in head.in_index)
    # Pixels that one position of the deepest feature map used covers, in a row.
    stride = 4 * int(np.prod(backbone.strides[: deepest + 1]))
    if min(size) < stride:
        raise ExportError(
            f"this network shrinks its input {stride} times, so that of {size[0]}x{size[1]} "
            f"pixels (height x width) nothing would be left to tell apart. Give {stride} or "
            "more each way; networks do best near the size they were trained at."
        )
    return size


def _detector_size(network: Detector, options: ExportOptions) -> tuple[int, int]:
    """The height and width given, or the padded size of a landscape image as published."""
    size = options.size or network.architecture.published_size
    if any(side % SIZE_DIVISOR for side in size):
        nearest = "x".join(str(-(-side // SIZE_DIVISOR) * SIZE_DIVISOR) for side in size)
        raise ExportError(
            f"a detector's height and width must be multiples of {SIZE_DIVISOR}, as its published "
            f"pipeline pads them; got {size[0]}x{size[1]}. Give {nearest}."
        )
    if options.precision != "fp32":
        raise ExportError(
            f"detectors are exported in float32 only so far, not in {options.precision}: "
            "coordinates of boxes need float32. Leave --precision out."
        )
    return size


def _how_it_was_read(network: nn.Module) -> dict[str, Any]:
    """For the manifest: which weights and order a checkpoint was read with, what was assumed."""
    if not isinstance(network, LoadedSegmentor | LoadedDetector):
        return {"assumed": {}}
    assumed = {fact.field: str(fact.value) for fact in network.inference.assumed}
    if network.order.assumed:
        assumed["frequency_order"] = network.order.name
    weights = {} if network.weights is None else {"weights": network.weights}
    return {"assumed": assumed, "frequency_order": network.order.name, **weights}
