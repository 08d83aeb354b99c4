"""A model's card: what its bundle says about it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from fdconv_deploy.serve.schemas import (
    RGB,
    InputSize,
    InstanceLimits,
    ModelCard,
    ModelClass,
    OutputParity,
)

from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime import Bundle
from fdconv_deploy.runtime.detection import SHOWN_SCORE, detector_classes, detector_palette
from fdconv_deploy.runtime.segmentation import class_names, class_palette
from fdconv_deploy.runtime.sliding_window import slide_stride

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def model_name(path: Path) -> str:
    """The name a bundle is served under: its folder's.

    :raises BundleError: it cannot be part of an address.
    """
    if not _NAME.fullmatch(path.name):
        raise BundleError(
            f"The bundle {path} is served under its folder's name, which may hold letters, "
            "digits, '.', '_' and '-' only. Rename the folder."
        )
    return path.name


def model_card(name: str, bundle: Bundle, *, default: bool) -> ModelCard:
    """The card of a model that is not loaded.

    :raises BundleError: it is neither a detector nor a segmentor, or is tested
        by sliding with a stride that cannot.
    """
    manifest = bundle.manifest
    if manifest.input is None or manifest.kind == "module":
        raise BundleError(
            f"The bundle {bundle.path} is of a {manifest.kind}, which does not segment images, "
            "so it cannot be served. Name a segmentor's or a detector's bundle."
        )
    told = _detector(bundle) if manifest.kind == "detector" else _segmentor(bundle)
    described = manifest.architecture or manifest.detector
    assert described is not None
    parity = manifest.parity.batches if manifest.parity else {}
    checkpoint = manifest.checkpoint
    return ModelCard(
        **told,
        name=name,
        kind=manifest.kind,
        default=default,
        state="unloaded",
        version="0",
        input=InputSize(
            channels=manifest.inputs[bundle.batch_sizes[0]][0].shape[1],
            height=manifest.input.height,
            width=manifest.input.width,
        ),
        preprocessing=described.preprocessing.model_dump(mode="json"),
        batch_sizes=list(bundle.batch_sizes),
        precision=manifest.precision,
        backend=None,
        bytes=model_bytes(bundle),
        checkpoint=Path(checkpoint.name).name if checkpoint else None,
        checkpoint_sha256=checkpoint.sha256 if checkpoint else None,
        parity=[
            OutputParity(batch=batch, **output.model_dump())
            for batch, outputs in parity.items()
            for output in outputs
        ],
        benchmark=[],
        created_at=manifest.created_at,
        created_by=manifest.created_by,
    )


def _segmentor(bundle: Bundle) -> dict[str, Any]:
    """What a segmentor's card alone says."""
    manifest = bundle.manifest
    architecture, size = manifest.architecture, manifest.input
    assert architecture is not None
    assert size is not None
    names = class_names(architecture)
    test = architecture.test
    modes: list[Literal["whole", "slide"]] = ["whole"]
    if test.mode == "slide" or test.stride is not None:
        try:
            slide_stride(test, (size.height, size.width))
            modes.append("slide")
        except BundleError:
            if test.mode == "slide":
                raise
    logits = manifest.outputs[bundle.batch_sizes[0]][0].shape
    return {
        "classes": _classes(names, class_palette(architecture)),
        "output": InputSize(channels=logits[1], height=logits[2], width=logits[3]),
        "threshold": architecture.decode_head.label_threshold,
        "instances": None,
        "mode": test.mode,
        "modes": modes,
        "fit": manifest.fit,
    }


def _detector(bundle: Bundle) -> dict[str, Any]:
    """What a detector's card alone says."""
    detector = bundle.manifest.detector
    assert detector is not None
    rcnn = detector.test.rcnn
    return {
        "classes": _classes(detector_classes(detector), detector_palette(detector)),
        "output": None,
        "threshold": None,
        "instances": InstanceLimits(
            masks=detector.mask_head is not None,
            mask_size=detector.mask_size,
            most=rcnn.max_per_img,
            lowest_score=rcnn.score_thr,
            min_score=SHOWN_SCORE,
        ),
        "mode": "whole",
        "modes": ["whole"],
        "fit": "pad",
    }


def _classes(names: tuple[str, ...], colours: tuple[RGB, ...]) -> list[ModelClass]:
    return [
        ModelClass(id=number, name=name, color=colour)
        for number, (name, colour) in enumerate(zip(names, colours, strict=True))
    ]


def model_bytes(bundle: Bundle) -> int:
    """What a loaded model holds at least: every graph, each with its own copy of the weights."""
    manifest = bundle.manifest
    weights = manifest.files[manifest.weights].bytes if manifest.weights else 0
    return sum(manifest.files[name].bytes + weights for name in manifest.models.values())
