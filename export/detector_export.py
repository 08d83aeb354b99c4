"""Export of two-stage detectors: what differs from segmentors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fdconv_deploy.export.exporter import produce
from fdconv_deploy.export.image_folders import for_network
from fdconv_deploy.export.options import (
    PrecisionName,
    batch_sizes,
    check_precision,
    check_size,
)
from fdconv_deploy.export.source_network import (
    Precision,
    Progress,
    Recipe,
    Source,
    choices_entry,
    refuse_training,
)
from fdconv_deploy.export.validation.comparison import Rule
from fdconv_deploy.export.validation.detector_inputs import placed
from fdconv_deploy.export.validation.input_sources import drawn
from fdconv_deploy.export.validation.sample_inputs import Picture

from fdconv_deploy.config import SIZE_DIVISOR
from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.network import dynamic_layers
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import CheckpointInfo, InputSize


def export_detector(
    network: Detector,
    destination: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    batches: Sequence[int] = (1,),
    pictures: Sequence[Picture] = (),
    precision: PrecisionName = "fp32",
    tolerance: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    checkpoint: CheckpointInfo | None = None,
    assumed: Mapping[str, Any] | None = None,
) -> Bundle:
    """Export a detector; arguments as `export_checkpoint`'s.

    Args:
        size: height and width of the graphs, multiples of 32; if not given, what the
            published resize makes of a landscape image.
        tolerance: the largest error of boxes and scores, relative to the largest value; masks
            may err ten times that. Both sides must find the same objects, see
            `fdconv_deploy.export.validation.detections`.
    """
    refuse_training(network)
    size = _graph_size(network, size)
    _refuse_precision(precision)
    allowed = check_precision(
        precision, tolerance=tolerance, keep_fp32=(), calibration=(), activations="unsigned"
    )
    say = progress or (lambda _: None)
    if not dynamic_layers(network):
        # A plain twin is exported all the same: benchmarks need both sides.
        say("note: this network has no FDConv layer")
    architecture = network.architecture
    preprocessing = architecture.preprocessing
    sources = drawn(network, size)
    if pictures:
        pictures = for_network(pictures, preprocessing)
        images, sizes = placed(pictures, size, preprocessing)

        def rows(batch: int) -> tuple[torch.Tensor, ...]:
            index = torch.arange(batch) % len(images)
            return images[index], sizes[index]

        sources.insert(0, Source(f"{len(pictures)} pictures given", rows))
    manifest = {
        "kind": "detector",
        "detector": architecture,
        "input": InputSize(height=size[0], width=size[1]),
        "fit": "pad",
        "checkpoint": checkpoint,
        "graph": {
            "assumed": {k: str(v) for k, v in (assumed or {}).items()},
            **choices_entry(network),
        },
    }
    recipe = Recipe(
        network,
        sources[0],
        batch_sizes(batches),
        ["images", "sizes"],
        network.output_names,
        Rule("detections", architecture.test.rcnn.score_thr),
        manifest,
        Precision(precision, allowed),
        sources[1:],
        say,
    )
    return produce(recipe, destination, overwrite)


def _graph_size(network: Detector, size: tuple[int, int] | None) -> tuple[int, int]:
    """Those given, or the padded size of a landscape image as published.

    Raises:
        ExportError: they do not suit the network.
    """
    if size is None:
        return network.architecture.published_size
    check_size(size)
    if any(side % SIZE_DIVISOR for side in size):
        nearest = "x".join(str(-(-side // SIZE_DIVISOR) * SIZE_DIVISOR) for side in size)
        raise ExportError(
            f"a detector's height and width must be multiples of {SIZE_DIVISOR}, as its published "
            f"pipeline pads them; got {size[0]}x{size[1]}. Give {nearest}."
        )
    return size


def _refuse_precision(precision: str) -> None:
    if precision in ("fp16", "int8"):
        raise ExportError(
            f"detectors are exported in float32 only so far, not in {precision}: coordinates of "
            "boxes need float32. Leave --precision out."
        )
