"""Bundles and checkpoints, opened as the targets of an evaluation.

Checkpoints run in PyTorch, with the same steps around them as bundles. It is not imported where
there are none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.config import SIZE_DIVISOR, DetectorConfig, SegmentorConfig
from fdconv_deploy.errors import FDConvError
from fdconv_deploy.evaluation.compare import Answer, Labels, Target
from fdconv_deploy.runtime import Detection, Session, open_session
from fdconv_deploy.runtime.bundle import bundles_and_checkpoints
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.preprocessing import best_size, check_image, published_input
from fdconv_deploy.runtime.segmentation import (
    Mode,
    MultiScale,
    SegmentationPipeline,
    class_names,
)
from fdconv_deploy.runtime.session import make_pipeline

if TYPE_CHECKING:
    from fdconv_deploy.nn import Segmentor
    from fdconv_deploy.nn.detection import Detector


@contextmanager
def open_targets(
    paths: Sequence[Path],
    *,
    detectors: bool = False,
    panoptic: bool = False,
    mode: Mode | None = None,
    fit: Fit | None = None,
    backend: str | None = None,
    threads: int | None = None,
    config: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
    scales: MultiScale | None = None,
) -> Iterator[list[Target[Any]]]:
    """The targets, in order, while the context lasts.

    Beside a bundle, checkpoints see images at the first bundle's size, fitted as it fits them, so
    that only the way of computing differs; alone, they see them as the published pipeline
    resizes (and pads) them.

    Args:
        paths: bundles' folders and checkpoint files.
        detectors: whether all must give objects, as detectors and panoptic networks do, and be
            asked for them; or else be segmentors.
        panoptic: whether all must be segmentors that answer with segments.
        mode: of segmentors, "whole" or "slide"; what each was tested in when not given.
        fit: of segmentors' bundles, and of checkpoints beside them; the first bundle's own when
            not given.
        backend: of bundles; "auto" when not given.
        threads: CPU threads of every target.
        config: the checkpoints' config.
        overrides: settings that the checkpoints do not contain.
        weights: which weights of each checkpoint, see `read_checkpoint`; those that the bundle
            beside it was exported from when not given.
        scales: of segmentors, at which sizes each image is looked at, if at several.

    Raises:
        FDConvError: a path is missing, cannot be opened, or an option is of no use here.
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
        for path, session in sessions.items():
            _check_kind(path, session, detectors, panoptic)
        first = next(iter(sessions.values()), None)
        targets = []
        for path in paths:
            if path in sessions:
                described = sessions[path].bundle.manifest.architecture
                target = bundle_target(sessions[path], mode=mode, fit=fit, scales=scales)
                targets.append(_of_objects(target, described) if detectors else target)
                continue
            from fdconv_deploy.checkpoints import load_checkpoint, load_segmentor
            from fdconv_deploy.checkpoints.loading import recorded_weights

            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            recorded = recorded_weights(first.bundle.manifest, path) if first else None
            network = (load_checkpoint if detectors else load_segmentor)(
                path,
                config=config,
                overrides=overrides,
                weights=weights or recorded,
                require_fdconv=False,
            )
            size, *others = first.sizes if first else (None,)
            own = first.bundle.manifest.fit if first else "stretch"
            architecture = network.architecture
            described = architecture if isinstance(architecture, SegmentorConfig) else None
            target = torch_target(
                network,
                path,
                size=size,
                other_sizes=others,
                mode=mode,
                fit=fit or own,
                scales=scales,
            )
            targets.append(_of_objects(target, described) if detectors else target)
        yield targets


def _of_objects(target: Target[Any], segmentor: SegmentorConfig | None) -> Target[Detection]:
    """A target asked for objects: a panoptic network's instances, of the classes of things.

    Args:
        target: of a detector or a segmentor.
        segmentor: None of a detector.
    """
    if segmentor is None:
        return target
    rule = segmentor.panoptic
    if rule is None or not rule.instance_on:
        raise FDConvError(
            f"{target.name} gives no objects, which --annotations alone score: it is a segmentor"
            + ("" if rule is None else " of panoptic segments, with panoptic.instance_on off")
            + ". Give --images and --masks"
            + ("." if rule is None else ", and --annotations.")
        )
    things = sorted(rule.thing_classes)
    names = class_names(segmentor)
    label_of = np.full(len(names), -1)
    label_of[things] = range(len(things))

    def instances(image: NDArray[Any]) -> Answer[Detection]:
        answer = target.answer(image)
        found = answer.found.instances
        return replace(answer, found=replace(found, labels=label_of[found.labels]))

    return replace(target, answer=instances, classes=tuple(names[thing] for thing in things))


def _check_kind(path: Path, session: Session, detectors: bool, panoptic: bool) -> None:
    if panoptic and not session.panoptic:
        raise FDConvError(
            f"The bundle {path} gives no panoptic segments, which --annotations with --masks "
            "score. Of a detector give --annotations alone, of another segmentor --masks alone."
        )
    if session.panoptic and not panoptic and not detectors:
        raise FDConvError(
            f"The bundle {path} gives panoptic segments, which are scored on COCO's panoptic "
            "files: give --annotations (the JSON), --masks (the folder of its PNGs) and --images; "
            "its objects are, on COCO's instances: give --annotations (their JSON) and --images."
        )
    if detectors and not (session.detects or session.panoptic):
        raise FDConvError(
            f"The bundle {path} is of a {session.bundle.manifest.kind}, not of a detector, which "
            "alone is scored on annotated objects. Give --images and --masks."
        )
    if session.detects and not detectors:
        raise FDConvError(
            f"The bundle {path} is of a detector, which is scored on objects annotated as COCO's: "
            "give --annotations and --images, or a --data folder of COCO's layout."
        )


def bundle_target(
    session: Session,
    *,
    mode: Mode | None = None,
    fit: Fit | None = None,
    scales: MultiScale | None = None,
) -> Target[Any]:
    """A bundle's target.

    Args:
        session: on the bundle; the caller closes it.
        mode: of a segmentor, "whole" or "slide"; what it was tested in when not given.
        fit: see `Session.segment`.
        scales: see `Session.segment`.
    """
    details: dict[str, Any] = {
        "kind": "bundle",
        "backend": session.backend,
        "operators": session.operators,
        "precision": session.bundle.manifest.precision,
    }
    if not session.detects:
        details["mode"] = mode or session.segmentation.mode
        details |= scales.as_dict() if scales else {}

    def segment(image: NDArray[Any]) -> Answer[Any]:
        found: Any = session.segment(image, mode=mode, fit=fit, scales=scales)
        answer = found if session.panoptic else found.labels
        return Answer(answer, found.timings["inference"])

    def detect(image: NDArray[Any]) -> Answer[Detection]:
        found = session.detect(image)
        return Answer(found, found.timings["inference"])

    return Target(
        str(session.bundle.path),
        detect if session.detects else segment,
        session.classes,
        {**details, "size": list(session.input_size)},
        session.preprocessing,
    )


def torch_target(
    network: Segmentor | Detector,
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    other_sizes: Sequence[tuple[int, int]] = (),
    mode: Mode | None = None,
    fit: Fit = "stretch",
    scales: MultiScale | None = None,
) -> Target[Any]:
    """The published network's target.

    Args:
        network: in eval mode.
        path: where it comes from, for the report.
        size: (height, width) that images are brought to, a bundle's; when not given, each image
            is resized (and padded) as the published pipeline does it, and ``slide`` uses the crop
            that the network was tested with.
        other_sizes: of the same bundle; an image takes that nearest to its proportions.
        mode: of a segmentor, "whole" or "slide"; what it was tested in when not given.
        fit: how images of another aspect ratio are brought to ``size``.
        scales: of a segmentor, at which sizes each image is looked at, if at several.

    Raises:
        FDConvError: ``slide`` is asked for, and neither ``size`` nor a crop is known.
    """
    from fdconv_deploy.nn.detection import Detector

    sizes = () if size is None else (size, *other_sizes)
    details: dict[str, Any] = {
        "kind": "checkpoint", "backend": "pytorch", "precision": "fp32"
    }  # fmt: skip
    architecture = network.architecture
    if isinstance(network, Detector):
        answer, mode = _in_one_run(network, sizes, fit), None
    elif network.architecture.panoptic is not None:
        answer, mode = _in_one_run(network, sizes, fit), "whole"
    else:
        test = network.architecture.test
        mode, crop = mode or test.mode, size or test.crop_size
        answer = _labels(network, sizes, crop if mode == "slide" else None, mode, fit, scales)
        size = crop if mode == "slide" else size
        details |= scales.as_dict() if scales else {}
    if mode is not None:
        details["mode"] = mode
    details["size"] = None if size is None else list(size)
    classes = class_names(architecture)
    return Target(str(path), answer, classes, details, architecture.preprocessing)


def _in_one_run(
    network: Segmentor | Detector, sizes: Sequence[tuple[int, int]], fit: Fit
) -> Callable[[NDArray[Any]], Answer[Any]]:
    """What runs the network, in eval mode, once on each image.

    It is brought to one of ``sizes``, or where there are none to what is published.
    """
    import torch

    architecture = network.architecture
    how, detects = architecture.preprocessing, isinstance(architecture, DetectorConfig)

    def answer(image: NDArray[Any]) -> Answer[Any]:
        height, width = check_image(image, how).shape[:2]
        shape = (height, width)
        published = published_input(shape, how, SIZE_DIVISOR if detects else None)
        steps = make_pipeline(architecture, sizes or [published], fit)
        prepared = steps.prepare(image)
        inputs = [torch.from_numpy(array[None]) for array in prepared.inputs.values()]
        start = time.perf_counter()
        with torch.inference_mode():
            outputs = network(*inputs)
        spent = time.perf_counter() - start
        tensors = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        found = zip(network.output_names, (tensor[0].numpy() for tensor in tensors), strict=True)
        return Answer(steps.finish(prepared, dict(found), spent), spent)

    return answer


def _labels(
    network: Segmentor,
    sizes: Sequence[tuple[int, int]],
    crop: tuple[int, int] | None,
    mode: Mode,
    fit: Fit,
    scales: MultiScale | None,
) -> Callable[[NDArray[Any]], Answer[Labels]]:
    """What finds the classes of an image's pixels; ``crop`` is that of mode "slide"."""
    import torch

    architecture = network.architecture
    if mode == "slide" and crop is None:
        raise FDConvError(
            "The network records no crop to slide. Give the config it was tested with: --config."
        )
    whole = _in_one_run(network, sizes, fit)

    def run(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return network(torch.from_numpy(inputs)).numpy()

    def answer(image: NDArray[Any]) -> Answer[Labels]:
        if crop is None and scales is None:
            once = whole(image)
            return Answer(once.found.labels, once.inference)
        if crop is None:
            assert scales is not None
            base = best_size((image.shape[0], image.shape[1]), sizes) if sizes else None
            pipeline = SegmentationPipeline(architecture, sizes, fit)
            found = pipeline.at_scales(image, scales, run, base)
        else:
            pipeline = SegmentationPipeline(architecture, [crop], fit)
            found = pipeline.slide(image, run, 1, scales=scales, any_size=not sizes)
        return Answer(found.labels, found.timings["inference"])

    return answer
