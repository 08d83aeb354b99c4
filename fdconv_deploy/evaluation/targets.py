"""Bundles and checkpoints, opened as the targets of an evaluation.

Checkpoints run in PyTorch, with the same steps around them as bundles. It is not imported where
there are none.
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
from fdconv_deploy.runtime.segmentation import (
    Mode,
    MultiScale,
    SegmentationPipeline,
    classes_of,
)
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
    "panoptic network": (
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
            if path in sessions:
                manifest = sessions[path].bundle.manifest
                target = bundle_target(sessions[path], mode=mode, fit=fit, scales=scales)
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
            target = torch_target(
                network,
                path,
                sizes=beside.sizes if beside else (),
                mode=mode,
                fit=fit or (beside.fit if beside else "stretch"),
                scales=scales,
            )
            targets.append(_asked(target, network.architecture, task))
        yield targets


def _asked(target: Target, network: SegmentorConfig | DetectorConfig | None, task: Task) -> Target:
    """The target as the task asks it.

    Raises:
        FDConvError: it does something else.
    """
    panoptic = network.panoptic if isinstance(network, SegmentorConfig) else None
    kind = "detector" if isinstance(network, DetectorConfig) else "segmentor"
    tasks, scored_on = _KINDS["panoptic network" if panoptic else kind]
    if task not in tasks:
        kind = f"{kind} of panoptic segments" if panoptic else kind
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
        found = answer.instances
        assert found is not None
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
    if not session.detects:
        details["mode"] = mode or session.segmentation.mode
        details |= scales.as_dict() if scales else {}

    segment = partial(session.segment, mode=mode, fit=fit, scales=scales)
    return Target(
        str(session.bundle.path),
        session.detect if session.detects else segment,
        session.classes,
        {**details, "size": list(session.input_size)},
        session.preprocessing,
    )


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
        FDConvError: ``slide`` is asked for, and neither a size nor a crop is known.
    """
    from fdconv_deploy.nn import Segmentor

    config = network.architecture
    details: dict[str, Any] = {
        "kind": "checkpoint", "backend": "pytorch", "precision": "fp32"
    }  # fmt: skip
    size = sizes[0] if sizes else None
    answer = _in_one_run(network, sizes, fit)
    if isinstance(network, Segmentor):
        segmentor = network.architecture
        mode = "whole" if segmentor.panoptic else mode or segmentor.test.mode
        details |= {"mode": mode, **(scales.as_dict() if scales else {})}
        if mode == "slide":
            size = size or segmentor.test.crop_size
            if size is None:
                raise FDConvError(
                    "The network records no crop to slide. Give the config it was tested with: "
                    "--config."
                )
            answer = _in_several_runs(network, sizes, fit, size, scales)
        elif scales:
            answer = _in_several_runs(network, sizes, fit, None, scales)
    details["size"] = None if size is None else list(size)
    return Target(str(path), answer, classes_of(config)[0], details, config.preprocessing)


def _in_one_run(
    network: Segmentor | Detector, sizes: Sequence[Size], fit: Fit
) -> Callable[[NDArray[Any]], Found]:
    """What runs the network once on each image, as published where there are no ``sizes``."""
    import torch

    config = network.architecture
    how = config.preprocessing
    divisor = SIZE_DIVISOR if isinstance(config, DetectorConfig) else how.size_divisor

    def answer(image: NDArray[Any]) -> Found:
        height, width = check_image(image, how).shape[:2]
        published = padded(published_size(height, width, how), divisor)
        steps = make_pipeline(config, sizes or [published], fit)
        prepared = steps.prepare(image)
        inputs = [torch.from_numpy(array[None]) for array in prepared.inputs.values()]
        start = time.perf_counter()
        with torch.inference_mode():
            outputs = network(*inputs)
        spent = time.perf_counter() - start
        tensors = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        found = zip(network.output_names, (tensor[0].numpy() for tensor in tensors), strict=True)
        return steps.finish(prepared, dict(found), spent)

    return answer


def _in_several_runs(
    network: Segmentor,
    sizes: Sequence[Size],
    fit: Fit,
    crop: Size | None,
    scales: MultiScale | None,
) -> Callable[[NDArray[Any]], Found]:
    """What slides a crop over each image, or without one looks at it at several scales."""
    import torch

    def run(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return network(torch.from_numpy(inputs)).numpy()

    pipeline = SegmentationPipeline(network.architecture, [crop] if crop else sizes, fit)

    def answer(image: NDArray[Any]) -> Found:
        if crop or scales is None:
            return pipeline.slide(image, run, 1, scales=scales, any_size=not sizes)
        base = best_size((image.shape[0], image.shape[1]), sizes) if sizes else None
        return pipeline.at_scales(image, scales, run, base)

    return answer
