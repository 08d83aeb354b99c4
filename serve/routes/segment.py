"""Images in, segmentations out."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from fdconv_deploy.serve.errors import RefusedError, problem_docs
from fdconv_deploy.serve.model_versions import Model
from fdconv_deploy.serve.request_body import FIELD, NPY, Body
from fdconv_deploy.serve.responses import (
    JPEG,
    JSON,
    NPZ,
    PNG,
    ZIP,
    Form,
    MaskForm,
    Output,
    choose_form,
    form_for_several,
)
from fdconv_deploy.serve.routes.common import (
    NO_LIMIT,
    TimeoutMs,
    answered,
    service_of,
    while_connected,
)
from fdconv_deploy.serve.schemas import (
    Detection,
    Detections,
    ModelCard,
    Segmentation,
    Segmentations,
)
from fdconv_deploy.serve.segment_stages import Wanted, segment
from pydantic import BaseModel, ConfigDict, Field

from fdconv_deploy.runtime.detection import SHOWN_SCORE

router = APIRouter(tags=["segmentation"])


class SegmentOptions(BaseModel):
    """The query of a segment request."""

    model_config = ConfigDict(extra="forbid")

    output: Output | None = Field(
        default=None,
        description="'json', 'mask' (indexed PNG), 'overlay' (PNG, or JPEG if accepted rather) "
        "or, of segmentors, 'logits' (npz). When not given, the Accept header chooses.",
    )
    mask: MaskForm = Field(
        default="rle",
        description="How JSON holds masks: run lengths (of a detector's objects, COCO's), "
        "polygons, or not at all.",
    )
    classes: list[str] | None = Field(
        default=None,
        max_length=200,
        description="Only these classes, by name or number, several times or with commas. "
        "Elsewhere masks hold 255 (transparent), run lengths -1, and overlays the image.",
        examples=[["road", "3"]],
    )
    min_score: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Of a detector's objects; 0.3 when not given, 0 for all the network gives.",
    )
    opacity: float = Field(default=0.5, ge=0, le=1, description="Of the colours in an overlay.")
    size: Literal["original", "network"] | None = Field(
        default=None,
        description="Of the answer: the image's own, or the network's input as far as the image "
        "covers it. When not given: the image's own; for logits, as the network gives them.",
    )
    fit: Literal["stretch", "pad"] | None = Field(
        default=None,
        description="How an image of other proportions is fitted; see the model's card.",
    )
    mode: Literal["whole", "slide"] | None = Field(
        default=None, description="Whole image or sliding crop; see the model's card."
    )


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A JPEG, PNG, WebP, BMP or TIFF image, or several in one form; EXIF "
        "orientation is applied. A model of other bands than red, green and blue (see its card) "
        "takes TIFF files of them, and NumPy's .npy files (H, W, C). May be compressed with "
        "Content-Encoding gzip or deflate.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {FIELD: {**_FILES, "minItems": 1}},
                }
            },
            **{f"image/{k}": _BINARY for k in ("jpeg", "png", "webp", "bmp", "tiff")},
            NPY: _BINARY,
            "application/octet-stream": _BINARY,
        },
    }
}
_EXAMPLE = {
    "model": "street",
    "file": "street.jpg",
    "height": 2,
    "width": 4,
    "fit": "stretched",
    "mode": "whole",
    "classes": [
        {"id": 0, "name": "road", "color": [128, 64, 128], "area": 5, "share": 0.625},
        {"id": 1, "name": "car", "color": [0, 0, 142], "area": 3, "share": 0.375},
    ],
    "mask": {"size": [2, 4], "counts": [5, 3], "values": [0, 1]},
    "timings_ms": {
        "decode": 4.1,
        "preprocess": 2.0,
        "queue": 0.1,
        "inference": 35.2,
        "postprocess": 3.9,
    },
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Segmentation | Segmentations | Detection | Detections,
        "description": "The image's labels, or a detector's objects, or `results` for several "
        "images. As image/png: each pixel's value is its class, and the palette holds the "
        "classes' colours; of a detector, the number of its object, from 1. As application/zip: "
        "one file per image.",
        "content": {
            JSON: {"example": _EXAMPLE},
            PNG: _BINARY,
            JPEG: _BINARY,
            NPZ: _BINARY,
            ZIP: _BINARY,
        },
    },
    **problem_docs(401, 406, 408, 413, 414, 415, 422, 429, 431, 500, 503, 504),
}


@router.post(
    "/v1/segment",
    summary="Segment images with the default model",
    response_class=Response,
    responses=_RESPONSES,
    openapi_extra=_REQUEST_BODY,
)
async def segment_with_default(
    request: Request,
    options: Annotated[SegmentOptions, Query()],
    timeout_ms: TimeoutMs = NO_LIMIT,
) -> Response:
    """`curl -F image=@street.jpg -H 'Accept: image/png' localhost:8000/v1/segment -o mask.png`."""
    model = service_of(request).repository.default
    return await _segment(request, model, options, timeout_ms)


@router.post(
    "/v1/models/{name}/segment",
    summary="Segment images with one model",
    response_class=Response,
    responses={**_RESPONSES, **problem_docs(404)},
    openapi_extra=_REQUEST_BODY,
)
async def segment_with(
    request: Request,
    name: str,
    options: Annotated[SegmentOptions, Query()],
    timeout_ms: TimeoutMs = NO_LIMIT,
) -> Response:
    """As `/v1/segment`, with the model called `name`."""
    model = service_of(request).repository.get(name)
    return await _segment(request, model, options, timeout_ms)


async def _segment(
    request: Request, model: Model, options: SegmentOptions, timeout_ms: float
) -> Response:
    service = service_of(request)
    client = request.state.client
    accept = request.headers.get("accept", "")
    # Everything that can be refused without the body is refused before it is read.
    card = service.repository.card(model)
    wanted = _wanted(card, options, choose_form(accept, options.output))
    deadline = service.deadline(timeout_ms)
    service.check_loaded()
    service.admission.check_room(client)
    with Body(request, service.settings, service.budget) as body:
        uploads = await body.images()
        count = len(uploads)
        if count > 1:
            wanted = replace(wanted, form=form_for_several(accept, wanted.form))
        with service.admission.admit(client, count):
            async with service.repository.lease(model) as version:
                if version.card is not card:  # loaded, or replaced, in the meantime
                    wanted = _wanted(version.card, options, wanted.form)
                work = segment(service, version, uploads, wanted, deadline)
                found = await while_connected(request, work)
    timings = answered(request, version.name, count, found.stages)
    headers = {
        "Vary": "Accept",
        "X-Model": version.name,
        "X-Fit": ", ".join(dict.fromkeys(found.fits)),
        "X-Mode": wanted.mode,
        "Server-Timing": ", ".join(f"{k};dur={v}" for k, v in timings.items()),
    }
    return Response(found.body, media_type=found.media_type, headers=headers)


def _wanted(card: ModelCard, options: SegmentOptions, form: Form) -> Wanted:
    _check_kind(card, options, form)
    wanted = Wanted(
        form=form,
        mask=options.mask,
        opacity=options.opacity,
        kept=_kept(card, options.classes),
        fit=options.fit,
        mode=_mode(card, options, form.output),
        size=options.size,
        min_score=SHOWN_SCORE if options.min_score is None else options.min_score,
    )
    _check_mask(card, wanted)
    return wanted


def _check_kind(card: ModelCard, options: SegmentOptions, form: Form) -> None:
    """Refuse what only models of the other kind can do."""
    if card.instances is None:
        if options.min_score is not None:
            raise RefusedError(
                422, f"The model {card.name!r} labels pixels, which have no scores: no min_score."
            )
        return
    if form.output == "logits":
        raise RefusedError(
            406,
            f"The model {card.name!r} is a detector, which has no logits. Ask for {JSON}, or for "
            "its tensors at /v2.",
        )
    if form.output == "mask" and not card.instances.masks:
        raise RefusedError(
            406, f"The model {card.name!r} gives boxes and no masks. Ask for {JSON} or an overlay."
        )
    if options.size == "network" or options.fit == "stretch":
        raise RefusedError(
            422,
            f"The model {card.name!r} is a detector: images keep their proportions, and answers "
            "are in pixels of the image. Leave size and fit out.",
        )


def _mode(card: ModelCard, options: SegmentOptions, output: Output) -> Literal["whole", "slide"]:
    mode = options.mode or card.mode
    if mode not in card.modes:
        raise RefusedError(
            422,
            f"The model {card.name!r} does not run in mode {mode!r}, only in "
            f"{', '.join(card.modes)}: its bundle records no stride that fits its input.",
        )
    if mode == "slide" and (options.size == "network" or output == "logits"):
        raise RefusedError(
            422,
            "In mode 'slide' the network sees many crops, so there are no logits of one run and "
            "no one network size. Ask for mode=whole, or for labels at the original size.",
        )
    return mode


def _kept(card: ModelCard, wanted: list[str] | None) -> tuple[int, ...] | None:
    if wanted is None:
        return None
    by_name = {kind.name: kind.id for kind in card.classes}
    found: set[int] = set()
    for text in wanted:
        for part in [text] if text in by_name else text.split(","):
            name = part.strip()
            number = by_name.get(name)
            if number is None and name.isascii() and name.isdigit() and len(name) < 6:
                number = int(name) if int(name) < len(card.classes) else None
            if number is None:
                raise RefusedError(
                    422,
                    f"The model {card.name!r} has no class {name[:60]!r}; its card lists them, by "
                    "name and number.",
                )
            found.add(number)
    return tuple(sorted(found))


def _check_mask(card: ModelCard, wanted: Wanted) -> None:
    if wanted.form.output != "mask" or card.instances is not None:
        return
    most = 256 if wanted.kept is None else 255
    if len(card.classes) > most:
        raise RefusedError(
            406,
            f"An indexed PNG holds at most {most} classes"
            + ("" if wanted.kept is None else " beside the value for the others")
            + f", and the model {card.name!r} has {len(card.classes)}. Ask for {JSON} or "
            "?output=overlay.",
        )
