"""A model's card: what its bundle says about it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime import Bundle
from fdconv_deploy.runtime.postprocessing import check_classes
from fdconv_deploy.runtime.segmentation import class_names, class_palette
from fdconv_deploy.runtime.tiling import slide_stride

from .schemas import InputSize, ModelCard, ModelClass, OutputParity

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

    :raises BundleError: it is no segmentor of two classes or more, or is tested by sliding
        with a stride that cannot.
    """
    manifest = bundle.manifest
    if manifest.architecture is None or manifest.input is None:
        raise BundleError(
            f"The bundle {bundle.path} is of a {manifest.kind}, which does not segment images, "
            "so it cannot be served. Name a segmentor's bundle."
        )
    names, colours = class_names(manifest.architecture), class_palette(manifest.architecture)
    check_classes(len(names))
    size = manifest.input.height, manifest.input.width
    test = manifest.architecture.test
    modes: list[Literal["whole", "slide"]] = ["whole"]
    if test.mode == "slide" or test.stride is not None:
        try:
            slide_stride(test, size)
            modes.append("slide")
        except BundleError:
            if test.mode == "slide":
                raise
    parity = manifest.parity.batches if manifest.parity else {}
    checkpoint = manifest.checkpoint
    logits = manifest.outputs[bundle.batch_sizes[0]][0].shape
    return ModelCard(
        name=name,
        default=default,
        state="unloaded",
        version="0",
        classes=[
            ModelClass(id=number, name=label, color=colour)
            for number, (label, colour) in enumerate(zip(names, colours, strict=True))
        ],
        input=InputSize(height=size[0], width=size[1]),
        output=InputSize(height=logits[2], width=logits[3]),
        batch_sizes=list(bundle.batch_sizes),
        mode=test.mode,
        modes=modes,
        fit=manifest.fit,
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


def model_bytes(bundle: Bundle) -> int:
    """What a loaded model holds at least: every graph, each with its own copy of the weights."""
    manifest = bundle.manifest
    weights = manifest.files[manifest.weights].bytes if manifest.weights else 0
    return sum(manifest.files[name].bytes + weights for name in manifest.models.values())
