"""Health, metrics, models, and the browser pages; nothing of these is loaded from elsewhere."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from fdconv_deploy.serve.errors import RefusedError, problem_docs
from fdconv_deploy.serve.model_cards import ModelCard, ModelList
from fdconv_deploy.serve.routes import service_of

router = APIRouter()


class Health(BaseModel):
    """Whether the service lives, or is ready."""

    status: Literal["ok", "ready"]


@router.get("/healthz", tags=["health"], summary="Is the process alive?")
async def healthz() -> Health:
    """Always 200 while the process can answer at all."""
    return Health(status="ok")


@router.get(
    "/readyz", tags=["health"], summary="Is it ready for requests?", responses=problem_docs(503)
)
async def readyz(request: Request) -> Health:
    """200 once every model that is loaded at the start has been run; 503 before and at the end."""
    service_of(request).check_ready()
    return Health(status="ready")


_TEXT = {
    "schema": {"type": "string"},
    "example": 'fdconv_requests_total{route="/v1/segment",status="200"} 12.0\n',
}


@router.get(
    "/metrics",
    tags=["health"],
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "Requests, latency by stage, queue, batch sizes, rejections, memory.",
            "content": {"text/plain": _TEXT},
        }
    },
)
async def metrics(request: Request) -> Response:
    """In Prometheus' text format. Needs the API key where there is one."""
    text = service_of(request).metrics.text()
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/v1/models", tags=["models"], summary="List the models", responses=problem_docs(401))
async def list_models(request: Request) -> ModelList:
    """Every model's card; the default model is first."""
    return ModelList(models=[model.current_card for model in service_of(request).repository])


@router.get(
    "/v1/models/{name}",
    tags=["models"],
    summary="One model's card",
    responses=problem_docs(401, 404),
)
async def get_model(request: Request, name: str) -> ModelCard:
    """Classes, colours, sizes, modes, parity report and benchmark of the model called `name`."""
    return service_of(request).repository.get(name).current_card


_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "jpg": "image/jpeg",
}
_HEADERS = {
    # Nothing from elsewhere, nothing inline, in no frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
_STATIC, _SAMPLES = ("fdconv_deploy.serve", "static"), ("fdconv_deploy.sample_images", "")
_PAGES = {"/": "index.html", "/docs": "docs.html", "/favicon.ico": "icon.svg"}


@router.get("/", include_in_schema=False)
@router.get("/docs", include_in_schema=False)
@router.get("/favicon.ico", include_in_schema=False)
async def page(request: Request) -> Response:
    """Try a model on an image; the API's documentation, drawn from /openapi.json; the icon."""
    return _file(_STATIC, _PAGES[request.scope["route"].path])


@router.get("/static/{name}", include_in_schema=False)
async def static(name: str) -> Response:
    """A script, a style sheet, a picture."""
    return _file(_STATIC, name)


@router.get("/samples", include_in_schema=False)
async def samples() -> JSONResponse:
    """The names of the sample scenes."""
    return JSONResponse({"samples": sorted(_files(*_SAMPLES))})


@router.get("/samples/{name}", include_in_schema=False)
async def sample(name: str) -> Response:
    """A sample scene."""
    return _file(_SAMPLES, name)


@lru_cache
def _files(package: str, folder: str) -> dict[str, bytes]:
    # Read once, by name from a list: no path is ever made from what a client sends.
    found = (files(package) / folder).iterdir()
    return {one.name: one.read_bytes() for one in found if one.name.rpartition(".")[2] in _TYPES}


def _file(where: tuple[str, str], name: str) -> Response:
    if (data := _files(*where).get(name)) is None:
        raise RefusedError(404, "There is nothing at this address; /docs lists what there is.")
    kind = _TYPES[name.rpartition(".")[2]]
    return Response(data, headers={**_HEADERS, "Content-Type": kind})
