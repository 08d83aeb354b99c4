"""Whether the service lives and is ready, which models it has, and what it counts."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from fdconv_deploy.serve.errors import problem_docs
from fdconv_deploy.serve.model_cards import ModelCard, ModelList
from fdconv_deploy.serve.routes.common import service_of
from fdconv_deploy.serve.telemetry import CONTENT_TYPE_LATEST

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
    repository = service_of(request).repository
    return ModelList(models=[repository.card(model) for model in repository])


@router.get(
    "/v1/models/{name}",
    tags=["models"],
    summary="One model's card",
    responses=problem_docs(401, 404),
)
async def get_model(request: Request, name: str) -> ModelCard:
    """Classes, colours, sizes, modes, parity report and benchmark of the model called `name`."""
    repository = service_of(request).repository
    return repository.card(repository.get(name))
