"""Images in, segmentations or objects out: ``/v1/segment``, and the JSON of its answers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from fdconv_deploy.serve.errors import problem_docs
from fdconv_deploy.serve.model_cards import ModelClass
from fdconv_deploy.serve.responses import (
    JPEG,
    JSON,
    NPZ,
    PNG,
    ZIP,
    choose_form,
    form_for_several,
)
from fdconv_deploy.serve.routes import answered, service_of, while_connected
from fdconv_deploy.serve.segment_request import SegmentOptions, check_options, segment
from fdconv_deploy.serve.service import NO_LIMIT
from fdconv_deploy.serve.uploads import FIELD, NPY, Body

router = APIRouter(tags=["segmentation"])
TimeoutMs = Annotated[
    float,
    Header(
        alias="X-Timeout-Ms",
        ge=1,
        le=NO_LIMIT,
        description="Time limit in milliseconds, then a 504; the service's own limit also holds.",
    ),
]


class ClassArea(ModelClass):
    """One class of a segmentor, and how much of the image it covers."""

    area: int = Field(description="Pixels of this class in the image.")
    share: float = Field(description="`area` over the image's pixels, 0–1.")


class ClassCount(ModelClass):
    """One class of a detector, and how many of its objects the answer holds."""

    count: int


class _Sized(BaseModel):
    size: tuple[int, int] = Field(description="Height and width in pixels.")


class RunLengthMask(_Sized):
    """A label map as runs of equal pixels, read row by row from the top left.

    COCO's uncompressed RLE for many classes at once: run i is `counts[i]` pixels long and
    all of class `values[i]`. Unlike COCO's it runs along rows, not down columns. In numpy:
    `numpy.repeat(values, counts).reshape(size)`.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"size": [2, 4], "counts": [5, 3], "values": [0, 2]}]}
    )

    counts: list[int] = Field(description="Lengths of the runs; they sum to height × width.")
    values: list[int] = Field(description="The class id of each run.")


class ClassPolygons(BaseModel):
    """The outlines of one class."""

    id: int = Field(description="The class id.")
    rings: list[list[int]] = Field(
        description="Closed rings x0, y0, x1, y1, ... of pixel corners: (0, 0) is the image's "
        "top left corner, (width, height) its bottom right one. Filled by the even-odd rule "
        "they give exactly the class's pixels."
    )


class PolygonMask(_Sized):
    """A label map as polygons along the pixels' edges, of the classes that occur."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"size": [2, 4], "polygons": [{"id": 2, "rings": [[1, 0, 4, 0, 4, 2, 1, 2]]}]}
            ]
        }
    )

    polygons: list[ClassPolygons]


class CocoMask(_Sized):
    """An object's pixels as COCO's compressed run lengths, which pycocotools decodes."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"size": [2, 4], "counts": "042"}]})

    counts: str


class InstancePolygons(_Sized):
    """An object's outlines along the pixels' edges; see `ClassPolygons`."""

    rings: list[list[int]]


class Instance(BaseModel):
    """One object."""

    id: int = Field(description="Its pixels' value in the mask PNG: 1 for the best score.")
    label: int = Field(description="Its class id.")
    class_: str = Field(alias="class", description="The name of its class.")
    score: float = Field(description="0–1.")
    box: tuple[float, float, float, float] = Field(
        description="x1, y1, x2, y2 in pixels of the image; (0, 0) is its top left corner."
    )
    area: int | None = Field(description="Pixels of the mask, if the answer has masks.")
    mask: CocoMask | InstancePolygons | None = Field(
        description="As ?mask= asks: COCO's run lengths, polygons, or null for none; null also "
        "where the network gives no masks."
    )


class _ImageAnswer(BaseModel):
    model: str = Field(examples=["street"])
    file: str | None = Field(description="The file's name in the form, if it came with one.")
    height: int = Field(description="The image's in pixels; the mask's where size=network.")
    width: int
    timings_ms: dict[str, float] = Field(
        description="Milliseconds by stage.",
        examples=[{"decode": 4.1, "queue": 0.1, "preprocess": 2.0, "inference": 35.2}],
    )


class PanopticSegment(BaseModel):
    """One segment, in the words of COCO's panoptic files."""

    id: int = Field(description="Its pixels' value in segments_mask, from 1.")
    category_id: int = Field(description="Its class id.")
    isthing: bool = Field(description="Whether it is one object, not all of a class.")
    class_: str = Field(alias="class", description="The name of its class.")
    score: float = Field(description="0–1.")
    area: int = Field(description="Its pixels.")


class Segmentation(_ImageAnswer):
    """A segmentor's answer to one image."""

    fit: Literal["resized", "stretched", "letterboxed"] = Field(
        description="How the image was brought to the network's size. 'resized': in its own "
        "aspect ratio; 'stretched' and 'letterboxed' change the network's answer somewhat."
    )
    mode: Literal["whole", "slide"] = Field(
        description="The network saw the whole image at once, or crops whose logits were averaged."
    )
    classes: list[ClassArea]
    mask: RunLengthMask | PolygonMask | None = Field(
        description="As ?mask= asks: run lengths, polygons, or null for none."
    )
    segments: list[PanopticSegment] | None = Field(
        default=None, description="Of a panoptic network alone, as are the next two."
    )
    segments_mask: RunLengthMask | None = Field(
        default=None, description="The segment of each pixel, 0 for none; null for ?mask=none."
    )
    instances: list[Instance] | None = Field(
        default=None, description="Objects, which may overlap, the best score first."
    )


class Segmentations(BaseModel):
    """A segmentor's answers to several images, in the order they were sent."""

    results: list[Segmentation]


class Detection(_ImageAnswer):
    """A detector's answer to one image."""

    fit: Literal["resized", "letterboxed"] = Field(
        description="'resized': the image was padded as published. 'letterboxed': further, "
        "which changes the network's answer somewhat."
    )
    resized_to: tuple[int, int] = Field(
        description="Height and width of the image within the network's input."
    )
    classes: list[ClassCount]
    instances: list[Instance] = Field(description="The best score first.")


class Detections(BaseModel):
    """A detector's answers to several images, in the order they were sent."""

    results: list[Detection]


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
    service, client = service_of(request), request.state.client
    name, repository = request.path_params.get("name"), service.repository
    model = repository.default if name is None else repository.get(name)
    accept = request.headers.get("accept", "")
    # Everything that can be refused without the body is refused before it is read.
    form = choose_form(accept, options.output)
    wanted = check_options(model.current_card, options, form)
    deadline = service.deadline(timeout_ms)
    service.check_loaded()
    service.admission.check_room(client, deadline=deadline)
    with Body(request, service, deadline=deadline) as body:
        uploads = await body.images()
        if len(uploads) > 1:
            wanted = replace(wanted, form=form_for_several(accept, form))
        work = partial(segment, uploads=uploads, request=wanted)
        asked = service.answer(model, client, len(uploads), deadline, work)
        response, stages = await while_connected(request, asked)
    answered(request, model.name, len(uploads), stages)
    return response
