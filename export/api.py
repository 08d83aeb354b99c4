"""The whole way from a network to a bundle that is proved equal to it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from fdconv_deploy.export.detector_export import export_detector
from fdconv_deploy.export.exporter import produce
from fdconv_deploy.export.image_folders import for_network
from fdconv_deploy.export.options import (
    TOLERANCES,
    Activations,
    PrecisionName,
    batch_sizes,
    check_precision,
)
from fdconv_deploy.export.outputs import flatten_outputs
from fdconv_deploy.export.quantization.agreement import Evaluation
from fdconv_deploy.export.source_network import (
    Precision,
    Progress,
    Recipe,
    Source,
    choices_entry,
    graph_size,
    refuse_training,
)
from fdconv_deploy.export.validation.comparison import Rule
from fdconv_deploy.export.validation.input_sources import drawn, mirrored
from fdconv_deploy.export.validation.sample_inputs import Picture, normalised
from numpy.typing import NDArray
from torch import Tensor, nn

from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.checkpoints.shards import digest_of
from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.network import dynamic_layers
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.from_published import convert_published
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import CheckpointInfo, InputSize

__all__ = ["TOLERANCE", "export_checkpoint", "export_detector", "export_module", "export_segmentor"]

# A float32 graph further from its network than this, relative to the largest value, is not kept.
TOLERANCE = TOLERANCES["fp32"]
Labels = NDArray[np.integer]


def export_checkpoint(
    checkpoint: str | Path,
    destination: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    batches: Sequence[int] = (1,),
    config: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    weights: str | None = None,
    frequency_order: Literal["auto", "torch", "stable"] = "auto",
    fit: Literal["stretch", "pad"] = "stretch",
    pictures: Sequence[Picture] = (),
    precision: PrecisionName = "fp32",
    tolerance: float | None = None,
    keep_fp32: Sequence[str] = (),
    calibration: Sequence[Picture] = (),
    activations: Activations = "unsigned",
    evaluation: Sequence[Picture] = (),
    masks: Sequence[Labels | None] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a trained segmentor's or detector's checkpoint; its names tell which it is.

    Args:
        checkpoint: see `fdconv_deploy.checkpoints.load_checkpoint`, as are ``config``,
            ``overrides``, ``weights`` and ``frequency_order``.
        destination: the bundle's folder.
        size: height and width of the graphs, in pixels; if not given, the crop size of a
            network tested in ``slide`` mode, or what a detector's published resize makes of
            a landscape image.
        batches: one graph each.
        fit: how images of another shape are brought to ``size``; detectors always pad.
        pictures: images of any size to compare the graphs with the network on, HxWx3 uint8
            RGB or of the network's bands, or `image_folders.Pictures`; drawn street scenes if
            none are given.
        precision: ``fp16`` computes plain parts in float16, ``int8`` plain convolutions in
            eight bits; what makes FDConv's kernels stays float32. The graphs take and give
            float32 all the same.
        tolerance: fp32, fp16: the largest error, relative to the largest value, that is kept,
            in fp16 of each layer's output too. int8: the largest share of positions of
            another class. `fdconv_deploy.export.options.TOLERANCES` if not given.
        keep_fp32: paths of modules, or shell patterns of them, that stay float32.
        calibration: pictures to learn the ranges of activations from, for int8.
        activations: ``unsigned`` for ONNX Runtime, ``signed`` for TensorRT, in int8.
        evaluation: pictures to compare the classes of pixels on, lower precision with float32.
        masks: ``(H, W)`` classes (255: does not count) or None for each of them; the mean
            IoU is reported of those that have one.
        overwrite: replace a bundle that is there.
        progress: told of each step as it begins.

    Raises:
        CheckpointError: the checkpoint is not of a network known here with FDConv layers.
        ExportError: the size does not suit the network, or the graph is not equal to it.
        BundleError: ``destination`` is in the way.
    """
    say = progress or (lambda _: None)
    say("reading the checkpoint")
    network = load_checkpoint(
        checkpoint,
        config=config,
        overrides=overrides,
        weights=weights,
        frequency_order=frequency_order,
    )
    assumed = {fact.field: fact.value for fact in network.inference.assumed}
    if network.order.assumed:
        assumed["frequency_order"] = network.order.name
    source = CheckpointInfo(name=Path(checkpoint).name, sha256=digest_of(Path(checkpoint)))
    if isinstance(network, Detector):
        return export_detector(
            network,
            destination,
            size=size,
            batches=batches,
            pictures=pictures,
            precision=precision,
            tolerance=tolerance,
            overwrite=overwrite,
            progress=progress,
            checkpoint=source,
            assumed=assumed,
        )
    return export_segmentor(
        network,
        destination,
        size=size,
        batches=batches,
        fit=fit,
        pictures=pictures,
        precision=precision,
        tolerance=tolerance,
        keep_fp32=keep_fp32,
        calibration=calibration,
        activations=activations,
        evaluation=evaluation,
        masks=masks,
        overwrite=overwrite,
        progress=progress,
        checkpoint=source,
        assumed=assumed,
    )


def export_segmentor(
    network: Segmentor,
    destination: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    batches: Sequence[int] = (1,),
    fit: Literal["stretch", "pad"] = "stretch",
    pictures: Sequence[Picture] = (),
    precision: PrecisionName = "fp32",
    tolerance: float | None = None,
    keep_fp32: Sequence[str] = (),
    calibration: Sequence[Picture] = (),
    activations: Activations = "unsigned",
    evaluation: Sequence[Picture] = (),
    masks: Sequence[Labels | None] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    checkpoint: CheckpointInfo | None = None,
    assumed: Mapping[str, Any] | None = None,
) -> Bundle:
    """Export a segmentor; arguments as `export_checkpoint`'s.

    ``assumed``: fields of the architecture that nothing told, for the manifest.
    """
    refuse_training(network)
    architecture = network.architecture
    preprocessing = architecture.preprocessing
    pictures, calibration, evaluation = (
        for_network(given, preprocessing) for given in (pictures, calibration, evaluation)
    )
    size = graph_size(network, size)
    if not dynamic_layers(network):
        # A plain twin is exported all the same: benchmarks need both sides.
        (progress or (lambda _: None))("note: this network has no FDConv layer")
    sources = drawn(network, size)
    if pictures:
        given = normalised(pictures, size, preprocessing)
        sources.insert(
            0,
            Source(
                f"{len(pictures)} pictures given",
                lambda batch: (given[torch.arange(batch) % len(given)],),
            ),
        )
    allowed = check_precision(
        precision,
        tolerance=tolerance,
        keep_fp32=keep_fp32,
        calibration=calibration,
        evaluation=evaluation,
        activations=activations,
    )
    masks = [None] * len(evaluation) if masks is None else masks
    manifest = {
        "kind": "segmentor",
        "architecture": architecture,
        "input": InputSize(height=size[0], width=size[1]),
        "fit": fit,
        "checkpoint": checkpoint,
        "graph": {
            "assumed": {k: str(v) for k, v in (assumed or {}).items()},
            **choices_entry(network),
        },
    }
    recipe = Recipe(
        network, sources[0], batch_sizes(batches), ["images"], ["logits"],
        Rule("classes", threshold=architecture.decode_head.label_threshold), manifest,
        Precision(
            precision, allowed, tuple(keep_fp32), activations,
            _Prepared(calibration, size, preprocessing),
            Evaluation(evaluation, masks, architecture, size) if len(evaluation) else None,
        ),
        sources[1:],
    )  # fmt: skip
    if progress is not None:
        recipe.progress = progress
    return produce(recipe, destination, overwrite)


@dataclass(frozen=True)
class _Prepared:
    """Pictures as a segmentor's inputs, each prepared when it is its turn."""

    pictures: Sequence[Picture]
    size: tuple[int, int]
    preprocessing: Preprocessing

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        # By index: a sequence that reads files need not hold all of them.
        for index in range(len(self.pictures)):
            yield normalised([self.pictures[index]], self.size, self.preprocessing).numpy()


def export_module(
    module: nn.Module,
    example: Tensor,
    destination: str | os.PathLike[str],
    *,
    batches: Sequence[int] | None = None,
    input_name: str = "input",
    outputs: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    precision: PrecisionName = "fp32",
    tolerance: float | None = None,
    keep_fp32: Sequence[str] = (),
    calibration: Sequence[Tensor] = (),
    activations: Activations = "unsigned",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export any module with FDConv layers in it.

    Args:
        module: in eval mode, taking one tensor and giving tensors, batch first: one, or several
            in tuples, lists and dicts, nested at will. Its layers may be `FDConv2d` layers or
            those of a copy of the published class: those are told by their structure, converted
            in a copy of the module, and compared with their originals on the example.
        example: an input; its shape past the batch is the graphs', its values are what the
            graphs are checked on.
        batches: one graph each; if not given, the example's own batch size.
        outputs: names of the outputs to export, in this order; all of them if not given. An
            output is called by where it stands in the module's answer: ``output`` where it is
            the only one, else ``output0``, ``boxes``, ``output1.feats.2``.
        output_names: what to call them in the graphs instead, one per output.
        precision, tolerance, keep_fp32, activations: as `export_checkpoint`'s, except that
            no class is chosen, so that the tolerance is about errors in int8, too.
        calibration: for int8, inputs of the example's shape, any batch.

    Raises:
        ExportError: the module cannot be exported, or the graph is not equal to it.
        UnsupportedLayerError: a layer is a variant of the published one, with what differs.
    """
    # What torch.compile gives traces a second time; the module in it is the same network.
    module = getattr(module, "_orig_mod", module)
    refuse_training(module)
    if not isinstance(example, Tensor) or example.dtype != torch.float32:
        found = f"a tensor of {example.dtype}" if isinstance(example, Tensor) else type(example)
        raise ExportError(
            f"the example must be one float32 torch tensor, got {found}. Convert it, and the "
            "module, with .float(); a module of several inputs needs a wrapper of one."
        )
    allowed = check_precision(
        precision,
        tolerance=tolerance,
        keep_fp32=keep_fp32,
        calibration=calibration,
        activations=activations,
    )
    for tensor in calibration:
        if tensor.shape[1:] != example.shape[1:] or tensor.dtype != torch.float32:
            raise ExportError(
                f"calibration inputs must be float32 of the example's shape past the batch, "
                f"{tuple(example.shape[1:])}, got {tensor.dtype} {tuple(tensor.shape)}."
            )
    module, names = flatten_outputs(
        module, example, chosen=outputs, given=output_names, progress=progress or (lambda _: None)
    )
    if input_name in names:
        raise ExportError(
            f"an output is called {input_name!r} as the input is: give another input_name, or "
            "output_names=[...]."
        )
    module, assumed = convert_published(module, example, progress)
    manifest: dict[str, Any] = {"kind": "module"}
    if assumed:
        told = {name: "; ".join(phrases) for name, phrases in assumed.items() if phrases}
        manifest["graph"] = {"converted_layers": sorted(assumed), "assumed": told}
    sizes = batch_sizes(batches if batches is not None else [example.shape[0]])

    def rows(batch: int) -> tuple[Tensor, ...]:
        return (example[torch.arange(batch) % example.shape[0]].contiguous(),)

    inputs = [image[None].numpy() for tensor in calibration for image in tensor]
    recipe = Recipe(
        module, Source("the example given", rows), sizes, [input_name], names, Rule("values"),
        manifest, Precision(precision, allowed, tuple(keep_fp32), activations, inputs),
        mirrored(example),
    )  # fmt: skip
    if progress is not None:
        recipe.progress = progress
    return produce(recipe, destination, overwrite)
