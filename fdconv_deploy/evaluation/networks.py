"""Bundles and checkpoints, opened as the targets of an evaluation.

Checkpoints run in PyTorch, which is not imported where there are none, with a bundle's own steps
around them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.config import SIZE_DIVISOR, DetectorConfig, SegmentorConfig
from fdconv_deploy.errors import FDConvError
from fdconv_deploy.evaluation.compare import Found, Target
from fdconv_deploy.runtime import Detection, Session, open_session
from fdconv_deploy.runtime.bundle import bundles_and_checkpoints
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.panoptic import PanopticSegmentation
from fdconv_deploy.runtime.preprocessing import best_size, check_image, padded, published_size
from fdconv_deploy.runtime.segmentation import Mode, MultiScale, SegmentationPipeline, classes_of
from fdconv_deploy.runtime.session import make_pipeline

if TYPE_CHECKING:
    from fdconv_deploy.nn import Segmentor
    from fdconv_deploy.nn.detection import Detector

Size = tuple[int, int]
Task = Literal["labels", "objects", "segments"]
"""What networks are asked for: classes of pixels, objects, or panoptic segments."""

# What each kind of network can be asked for, and what it is scored on.
_KINDS: dict[str, tuple[tuple[Task, ...], str]] = {
    "segmentor": (("labels",), "masks: give --images and --masks"),
    "detector": (
        ("objects",),
        "objects annotated as COCO's: give --annotations and --images, or a --data folder of "
        "COCO's layout",
    ),
    "segmentor of panoptic segments": (
        ("segments", "objects"),
        "COCO's panoptic files: give --annotations (the JSON), --masks (the folder of its PNGs) "
        "and --images; its objects are, on COCO's instances: give --annotations (their JSON) and "
        "--images",
    ),
}


@contextmanager
def open_targets(
    paths: Sequence[Path],
    task: Task,
    *,
    mode: Mode | None = None,
    fit: Fit | None = None,
    backend: str | None = None,
    threads: int | None = None,
    config: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
    scales: MultiScale | None = None,
) -> Iterator[list[Target]]:
    """The targets, in order, while the context lasts.

    Beside a bundle, checkpoints see images at the first bundle's size, fitted as it fits them
    unless a ``fit`` is given, and with the weights that it was exported from unless others are
    named, so that only the way of computing differs; alone, they see them as the published
    pipeline resizes (and pads) them. For ``mode``, ``fit`` and ``scales`` see `Session.segment`,
    for ``config``, ``overrides`` and ``weights`` `load_checkpoint`.

    Raises:
        FDConvError: a path is missing or cannot be opened, a network does not do the task, or an
            option is of no use here.
    """
    paths = bundles_and_checkpoints(paths)
    bundles = [path for path in paths if path.is_dir()]
    if not bundles and (fit or backend):
        raise FDConvError(
            "A fit and a backend are a bundle's, and there is none here: checkpoints run in "
            "PyTorch, with images as the published pipeline resizes them."
        )
    with ExitStack() as stack:
        sessions = {
            path: stack.enter_context(open_session(path, backend or "auto", threads=threads))
            for path in bundles
        }
        beside = sessions[bundles[0]].bundle.manifest if bundles else None
        targets = []
        for path in paths:
            if session := sessions.get(path):
                manifest = session.bundle.manifest
                target = bundle_target(session, mode=mode, fit=fit, scales=scales)
                targets.append(_asked(target, manifest.architecture or manifest.detector, task))
                continue
            from fdconv_deploy.checkpoints import load_checkpoint
            from fdconv_deploy.checkpoints.loading import recorded_weights

            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            network = load_checkpoint(
                path,
                config=config,
                overrides=overrides,
                weights=weights or (recorded_weights(beside, path) if beside else None),
                require_fdconv=False,
            )
            sizes, fitted = (beside.sizes, fit or beside.fit) if beside else ((), "stretch")
            target = torch_target(network, path, sizes=sizes, mode=mode, fit=fitted, scales=scales)
            targets.append(_asked(target, network.architecture, task))
        yield targets


def _asked(target: Target, network: SegmentorConfig | DetectorConfig | None, task: Task) -> Target:
    """The target as the task asks it; ``FDConvError`` if it does something else."""
    panoptic = network.panoptic if isinstance(network, SegmentorConfig) else None
    kind = "detector" if isinstance(network, DetectorConfig) else "segmentor"
    kind += " of panoptic segments" if panoptic else ""
    tasks, scored_on = _KINDS[kind]
    if task not in tasks:
        raise FDConvError(f"{target.name} is of a {kind}, which is scored on {scored_on}.")
    if task != "objects" or panoptic is None:
        return target
    if not panoptic.instance_on:
        raise FDConvError(
            f"{target.name} is of panoptic segments, with panoptic.instance_on off: it gives no "
            "objects, which --annotations alone score. Give --masks as well."
        )
    things = sorted(panoptic.thing_classes)
    label_of = np.full(len(target.classes), -1)
    label_of[things] = range(len(things))

    def instances(image: NDArray[Any]) -> Detection:
        answer = cast("PanopticSegmentation", target.answer(image))
        found = cast("Detection", answer.instances)
        return replace(found, labels=label_of[found.labels], timings=answer.timings)

    classes = tuple(target.classes[thing] for thing in things)
    return replace(target, answer=instances, classes=classes)


def bundle_target(
    session: Session,
    *,
    mode: Mode | None = None,
    fit: Fit | None = None,
    scales: MultiScale | None = None,
) -> Target:
    """A bundle's target. The caller closes the session; for the rest see `Session.segment`."""
    details: dict[str, Any] = {
        "kind": "bundle",
        "backend": session.backend,
        "operators": session.operators,
        "precision": session.bundle.manifest.precision,
    }
    answer: Callable[[NDArray[Any]], Found] = session.detect
    if not session.detects:
        answer = partial(session.segment, mode=mode, fit=fit, scales=scales)
        details["mode"] = mode or session.segmentation.mode
        details |= scales.as_dict() if scales else {}
    details["size"] = list(session.input_size)
    path = str(session.bundle.path)
    return Target(path, answer, session.classes, details, session.preprocessing)


def torch_target(
    network: Segmentor | Detector,
    path: Path,
    *,
    sizes: Sequence[Size] = (),
    mode: Mode | None = None,
    fit: Fit = "stretch",
    scales: MultiScale | None = None,
) -> Target:
    """The published network's target.

    Args:
        network: in eval mode.
        path: where it comes from, for the report.
        sizes: (height, width) that images are brought to, a bundle's: each that nearest to its
            proportions. Without any, each image is resized (and padded) as the published pipeline
            does it, and ``slide`` uses the crop that the network was tested with.
        mode: of a segmentor, "whole" or "slide"; what it was tested in when not given.
        fit: how images of another aspect ratio are brought to a size.
        scales: of a segmentor of classes alone, at which sizes each image is looked at, if at
            several.

    Raises:
        FDConvError: ``slide`` is asked for, and neither a size nor a crop is known; or ``scales``
            of a network of panoptic segments.
    """
    import torch

    config = network.architecture
    how = config.preprocessing
    divisor = SIZE_DIVISOR if isinstance(config, DetectorConfig) else how.size_divisor
    details: dict[str, Any] = {"kind": "checkpoint", "backend": "pytorch", "precision": "fp32"}
    crop: Size | None = None
    if isinstance(config, SegmentorConfig):
        if scales and config.panoptic:
            raise FDConvError(
                f"{path} gives panoptic segments, which are not merged over several sizes or "
                "mirror images. Leave scales out."
            )
        mode = "whole" if config.panoptic else mode or config.test.mode
        details |= {"mode": mode, **(scales.as_dict() if scales else {})}
        if mode == "slide":
            crop = sizes[0] if sizes else config.test.crop_size
            if crop is None:
                raise FDConvError(
                    "The network records no crop to slide. Give the config it was tested with: "
                    "--config."
                )
    details["size"] = list(crop or sizes[0]) if crop or sizes else None

    def run(*inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            outputs = network(*map(torch.from_numpy, inputs))
        tensors = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return dict(zip(network.output_names, (one.numpy() for one in tensors), strict=True))

    def answer(image: NDArray[Any]) -> Found:
        height, width = check_image(image, how).shape[:2]
        published = padded(published_size(height, width, how), divisor)
        steps = make_pipeline(config, [crop] if crop else sizes or [published], fit)
        if isinstance(steps, SegmentationPipeline) and (crop or scales):

            def logits(images: NDArray[Any]) -> NDArray[np.float32]:
                return run(images)["logits"]

            if crop:
                return steps.slide(image, logits, 1, scales=scales, any_size=not sizes)
            assert scales is not None
            base = best_size((height, width), sizes) if sizes else None
            return steps.at_scales(image, scales, logits, base)
        prepared = steps.prepare(image)
        start = time.perf_counter()
        found = run(*(one[None] for one in prepared.inputs.values()))
        spent = time.perf_counter() - start
        return steps.finish(prepared, {name: value[0] for name, value in found.items()}, spent)

    return Target(str(path), answer, classes_of(config)[0], details, how)
