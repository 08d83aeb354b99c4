"""The models' cards."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fdconv_deploy.serve.errors import problem_docs
from fdconv_deploy.serve.model_cards import ModelCard, ModelList
from fdconv_deploy.serve.routes.common import service_of

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="List the models", responses=problem_docs(401))
async def list_models(request: Request) -> ModelList:
    """Every model's card; the default model is first."""
    repository = service_of(request).repository
    return ModelList(models=[repository.card(model) for model in repository])


@router.get("/v1/models/{name}", summary="One model's card", responses=problem_docs(401, 404))
async def get_model(request: Request, name: str) -> ModelCard:
    """Classes, colours, sizes, modes, parity report and benchmark of the model called `name`."""
    repository = service_of(request).repository
    return repository.card(repository.get(name))
