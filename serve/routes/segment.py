"""Images in, segmentations or objects out: ``/v1/segment``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from fdconv_deploy.serve.errors import problem_docs
from fdconv_deploy.serve.responses import (
    JPEG,
    JSON,
    NPZ,
    PNG,
    ZIP,
    choose_form,
    form_for_several,
)
from fdconv_deploy.serve.routes.common import (
    TimeoutMs,
    answered,
    service_of,
    while_connected,
)
from fdconv_deploy.serve.schemas import Detection, Detections, Segmentation, Segmentations
from fdconv_deploy.serve.segment_options import SegmentOptions, check_options
from fdconv_deploy.serve.segment_request import segment
from fdconv_deploy.serve.service import NO_LIMIT
from fdconv_deploy.serve.telemetry import milliseconds
from fdconv_deploy.serve.uploads import FIELD, NPY, Body

router = APIRouter(tags=["segmentation"])

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
_REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A JPEG, PNG, WebP, BMP or TIFF image, or several in one form; EXIF "
        "orientation is applied. A model of other bands than red, green and blue (see its card) "
        "takes TIFF files of them, and NumPy's .npy files (H, W, C). May be compressed with "
        "Content-Encoding gzip or deflate.",
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "required": [FIELD], "properties": {FIELD: _FILES}}
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
    "timings_ms": {"decode": 4.1, "preprocess": 2.0, "inference": 35.2, "postprocess": 3.9},
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Segmentation | Segmentations | Detection | Detections,
        "description": "The image's labels, or a detector's objects, or `results` for several "
        "images. As image/png: each pixel's value is its class id, and the palette holds the "
        "classes' colours; of a detector, the number of its object, from 1. As application/zip: "
        "one file per image.",
        "content": {JSON: {"example": _EXAMPLE}, **dict.fromkeys((PNG, JPEG, NPZ, ZIP), _BINARY)},
    },
    **problem_docs(401, 406, 408, 413, 414, 415, 422, 429, 431, 500, 503, 504),
}


_OPTIONS: dict[str, Any] = {"response_class": Response, "openapi_extra": _REQUEST_BODY}


@router.post(
    "/v1/models/{name}/segment",
    summary="Segment images with one model",
    responses={**_RESPONSES, **problem_docs(404)},
    **_OPTIONS,
)
@router.post(
    "/v1/segment",
    summary="Segment images with the default model",
    responses=_RESPONSES,
    **_OPTIONS,
)
async def segment_images(
    request: Request,
    options: Annotated[SegmentOptions, Query()],
    timeout_ms: TimeoutMs = NO_LIMIT,
) -> Response:
    """`curl -F image=@street.jpg -H 'Accept: image/png' localhost:8000/v1/segment -o mask.png`."""
    repository = service_of(request).repository
    name = request.path_params.get("name")
    model = repository.default if name is None else repository.get(name)
    service, client = service_of(request), request.state.client
    accept = request.headers.get("accept", "")
    # Everything that can be refused without the body is refused before it is read.
    card = repository.card(model)
    wanted = check_options(card, options, choose_form(accept, options.output))
    deadline = service.deadline(timeout_ms)
    service.check_loaded()
    service.admission.check_room(client, deadline=deadline)
    with Body(request, service.settings, service.budget, deadline=deadline) as body:
        uploads = await body.images()
        count = len(uploads)
        if count > 1:
            wanted = replace(wanted, form=form_for_several(accept, wanted.form))
        with (
            service.admission.admit(client, count, deadline),
            await repository.lease(model, deadline) as version,
        ):
            if version.card is not card:  # loaded, or replaced, in the meantime
                wanted = check_options(version.card, options, wanted.form)
            work = segment(service, version, uploads, wanted, deadline)
            found = await while_connected(request, work)
    answered(request, version.name, count, found.stages)
    headers = {
        "Vary": "Accept",
        "X-Model": version.name,
        "X-Fit": ", ".join(dict.fromkeys(found.fits)),
        "X-Mode": wanted.mode,
        "Server-Timing": ", ".join(f"{k};dur={v}" for k, v in milliseconds(found.stages).items()),
    }
    return Response(found.body, media_type=found.media_type, headers=headers)
