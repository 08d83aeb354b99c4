"""The addresses of the service."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from fdconv_deploy.runtime import read_image

from .answers import JSON, PNG, Output, choose_form, render
from .models import ServedModel
from .problems import RefusedError, problem_docs
from .schemas import Health, ModelCard, ModelList, Segmentation
from .state import ServiceState
from .uploads import FIELD, read_upload

router = APIRouter()


class SegmentOptions(BaseModel):
    """The query of a segment request."""

    model_config = ConfigDict(extra="forbid")

    output: Output | None = Field(
        default=None,
        description="'json', 'mask' (indexed PNG) or 'overlay' (PNG, or JPEG if accepted "
        "rather). When not given, the Accept header chooses between JSON and mask.",
    )
    opacity: float = Field(default=0.5, ge=0, le=1, description="Of the colours in an overlay.")
    fit: Literal["stretch", "pad"] | None = Field(
        default=None,
        description="How an image of other proportions is fitted; see the model's card.",
    )
    mode: Literal["whole", "slide"] | None = Field(
        default=None, description="Whole image or sliding crop; see the model's card."
    )


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A JPEG, PNG, WebP, BMP or TIFF image; EXIF orientation is applied.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {FIELD: {"type": "string", "format": "binary"}},
                }
            },
            **{f"image/{k}": _BINARY for k in ("jpeg", "png", "webp", "bmp", "tiff")},
        },
    }
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Segmentation,
        "description": "The image's labels. As image/png: each pixel's value is its class, "
        "and the palette holds the classes' colours.",
        "content": {"image/png": _BINARY, "image/jpeg": _BINARY},
    },
    **problem_docs(406, 413, 415, 422, 500, 503),
}


@router.post(
    "/v1/segment",
    summary="Segment an image with the default model",
    response_class=Response,
    responses=_RESPONSES,
    openapi_extra=_REQUEST_BODY,
    tags=["segmentation"],
)
async def segment_with_default(
    request: Request, options: Annotated[SegmentOptions, Query()]
) -> Response:
    """`curl -F image=@street.jpg -H 'Accept: image/png' localhost:8000/v1/segment -o mask.png`."""
    return await _segment(request, _state(request).models.default, options)


@router.post(
    "/v1/models/{name}/segment",
    summary="Segment an image with one model",
    response_class=Response,
    responses={**_RESPONSES, **problem_docs(404)},
    openapi_extra=_REQUEST_BODY,
    tags=["segmentation"],
)
async def segment_with(
    request: Request, name: str, options: Annotated[SegmentOptions, Query()]
) -> Response:
    """As `/v1/segment`, with the model called `name`."""
    return await _segment(request, _state(request).models.get(name), options)


@router.get("/v1/models", summary="List the models", tags=["models"])
async def list_models(request: Request) -> ModelList:
    """Every model's card; the default model is first."""
    return ModelList(models=[model.card for model in _state(request).models])


@router.get(
    "/v1/models/{name}", summary="One model's card", responses=problem_docs(404), tags=["models"]
)
async def get_model(request: Request, name: str) -> ModelCard:
    """Classes, colours, input size, modes and parity report of the model called `name`."""
    return _state(request).models.get(name).card


@router.get("/healthz", summary="Is the process alive?", tags=["health"])
async def healthz() -> Health:
    """Always 200 while the process can answer at all."""
    return Health(status="ok")


@router.get(
    "/readyz", summary="Is it ready for requests?", responses=problem_docs(503), tags=["health"]
)
async def readyz(request: Request) -> Health:
    """200 once every model has been loaded and run; 503 before that."""
    _state(request).check_ready()
    return Health(status="ready")


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    """Lead a browser to the documentation."""
    return RedirectResponse("/docs")


def _state(request: Request) -> ServiceState:
    state: ServiceState = request.app.state.service
    return state


async def _segment(request: Request, model: ServedModel, options: SegmentOptions) -> Response:
    state = _state(request)
    # Everything that can be refused without the body is refused before it is read.
    form = choose_form(request.headers.get("accept", ""), options.output)
    model.check_mode(options.mode)
    state.check_ready()
    state.workers.check_room()
    if form.media_type == PNG and form.output == "mask" and len(model.card.classes) > 256:
        raise RefusedError(
            406,
            f"An indexed PNG holds at most 256 classes, and the model {model.name!r} has "
            f"{len(model.card.classes)}. Ask for {JSON} or ?output=overlay.",
        )
    data = await read_upload(request, state.settings.max_body_bytes)
    with state.workers.admit():
        clock = _Clock()
        image = await state.workers.code(
            partial(read_image, data, max_pixels=state.settings.max_pixels)
        )
        clock.lap("decode")
        answer = await state.workers.infer(
            partial(model.session.segment, image, fit=options.fit, mode=options.mode)
        )
        stages = {name: seconds * 1e3 for name, seconds in answer.timings.items()}
        clock.lap("queue", without=sum(stages.values()))
        clock.times.update(stages)
        body = await state.workers.code(
            partial(render, form, model.name, answer, image, options.opacity, clock.rounded())
        )
        clock.lap("encode")
    headers = {
        "Vary": "Accept",
        "X-Model": model.name,
        "X-Fit": answer.fit,
        "X-Mode": answer.mode,
        "Server-Timing": ", ".join(f"{k};dur={v}" for k, v in clock.rounded().items()),
    }
    return Response(body, media_type=form.media_type, headers=headers)


class _Clock:
    """Milliseconds by stage."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str, without: float = 0.0) -> None:
        now = time.perf_counter()
        self.times[name] = max((now - self._last) * 1e3 - without, 0.0)
        self._last = now

    def rounded(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in self.times.items()}
