"""KServe's Open Inference Protocol over REST, with binary tensors and the repository index."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from fdconv_deploy.serve.errors import RefusedError, problem_docs
from fdconv_deploy.serve.kserve.inference import EXTENSIONS, infer, model_metadata
from fdconv_deploy.serve.kserve.model_config import model_config, model_statistics
from fdconv_deploy.serve.kserve.repository_index import index_of, require_control
from fdconv_deploy.serve.kserve.rest import (
    HEADER_LENGTH,
    SMALL_JSON,
    json_length,
    read_request,
    write_answer,
)
from fdconv_deploy.serve.request_body import Body
from fdconv_deploy.serve.routes.common import Parts, answered, service_of, while_connected
from fdconv_deploy.serve.schemas import (
    InferAnswer,
    ModelConfig,
    ModelIndexEntry,
    ModelMetadata,
    ModelStatisticsList,
    ServerLive,
    ServerMetadata,
    ServerReady,
)

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.version import __version__

router = APIRouter(prefix="/v2", tags=["KServe v2"])
_NOT_FOUND = problem_docs(401, 404)


@router.get("", summary="What this server is", responses=problem_docs(401))
async def server_metadata() -> ServerMetadata:
    """Name, version and extensions."""
    return ServerMetadata(name="fdconv-deploy", version=__version__, extensions=list(EXTENSIONS))


@router.get("/health/live", summary="Is the process alive?")
async def live() -> ServerLive:
    """As `/healthz`."""
    return ServerLive(live=True)


@router.get("/health/ready", summary="Is it ready for requests?", responses=problem_docs(503))
async def ready(request: Request) -> ServerReady:
    """As `/readyz`."""
    service_of(request).check_ready()
    return ServerReady(ready=True)


@router.get(
    "/models/stats",
    summary="What every model has done",
    response_model=ModelStatisticsList,
    responses=problem_docs(401),
)
async def all_statistics(request: Request) -> JSONResponse:
    """Counts and times of each loaded model since it was loaded.

    A model called `stats` has its metadata at this address as well: the answer holds both.
    """
    service = service_of(request)
    found = model_statistics(service)
    for model in service.repository:
        if model.name == "stats":
            found |= model_metadata(model.version, service.repository.card(model))
    return JSONResponse(found)


@router.get("/models/{name}/stats", summary="What a model has done", responses=_NOT_FOUND)
@router.get(
    "/models/{name}/versions/{version}/stats",
    summary="What a model has done, in one version",
    responses=_NOT_FOUND,
)
async def statistics(request: Request, name: str, version: str = "") -> ModelStatisticsList:
    """Counts and times since it was loaded; none of a model that is not."""
    found = model_statistics(service_of(request), name, version)
    return ModelStatisticsList.model_validate(found)


@router.get(
    "/models/{name}/config",
    summary="A model's configuration",
    response_model_exclude_none=True,
    responses=_NOT_FOUND,
)
@router.get(
    "/models/{name}/versions/{version}/config",
    summary="A model's configuration, of one version",
    response_model_exclude_none=True,
    responses=_NOT_FOUND,
)
async def config(request: Request, name: str, version: str = "") -> ModelConfig:
    """Inputs, outputs and batching, as Triton's ModelConfig has them."""
    service = service_of(request)
    model = service.repository.get_version(name, version)
    found = model_config(service.repository.card(model), service.settings)
    return ModelConfig.model_validate(found)


@router.get("/models/{name}", summary="A model's inputs and outputs", responses=_NOT_FOUND)
@router.get(
    "/models/{name}/versions/{version}",
    summary="A model's inputs and outputs, of one version",
    responses=_NOT_FOUND,
)
async def metadata(request: Request, name: str, version: str = "") -> ModelMetadata:
    """Names, datatypes and shapes; -1 stands for the batch."""
    repository = service_of(request).repository
    model = repository.get_version(name, version)
    found = model_metadata(model.version, repository.card(model))
    return ModelMetadata.model_validate(found)


_READY = {**problem_docs(401, 404, 503)}


@router.get("/models/{name}/ready", summary="Is a model loaded?", responses=_READY)
@router.get(
    "/models/{name}/versions/{version}/ready",
    summary="Is a model loaded in this version?",
    responses=_READY,
)
async def model_ready(request: Request, name: str, version: str = "") -> ServerReady:
    """200 if it is, 503 if not."""
    service = service_of(request)
    if service.repository.get_version(name, version).version is None:
        raise RefusedError(
            503, f"The model {name!r} is not loaded.", service.admission.retry_after()
        )
    return ServerReady(ready=True)


_INFER_BODY: dict[str, Any] = {
    "parameters": [
        {
            "name": HEADER_LENGTH,
            "in": "header",
            "required": False,
            "schema": {"type": "integer", "minimum": 0},
            "description": "Of the JSON in bytes, where binary tensors follow it.",
        }
    ],
    "requestBody": {
        "required": True,
        "description": "One input 'images': FP32 [N, 3, H, W] normalised, or UINT8 [N, H, W, 3] "
        "RGB. A detector takes 'sizes' as well: FP32 [N, 2], height and width of each image within "
        "its input, all of it without. Tensors are in the JSON's 'data' or, in binary, behind it.",
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/InferCall"},
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}
_INFER_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": InferAnswer,
        "description": "The outputs asked for, all when none is. In binary where the request "
        f"wanted it; {HEADER_LENGTH} is then the JSON's length.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    **problem_docs(400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504),
}


@router.post(
    "/models/{name}/infer",
    summary="Run a model on a tensor",
    response_class=Response,
    responses=_INFER_ANSWERS,
    openapi_extra=_INFER_BODY,
)
@router.post(
    "/models/{name}/versions/{version}/infer",
    summary="Run a model of one version on a tensor",
    response_class=Response,
    responses=_INFER_ANSWERS,
    openapi_extra=_INFER_BODY,
)
async def run(request: Request, name: str, version: str = "") -> Response:
    """Logits at the network's own resolution and labels at its input's size.

    Of a detector, its graph's boxes (in pixels of the input), scores, labels, count and masks.
    The parameter `timeout` is a time limit in microseconds.
    """
    service = service_of(request)
    repository, code = service.repository, service.scheduler.code
    client = request.state.client
    model = repository.get_version(name, version)
    service.check_loaded()
    service.admission.check_room(client)
    with Body(request, service.settings, service.budget) as body:
        told = request.headers.get(HEADER_LENGTH)
        data = await body.read_aligned(int(told[:9]) if told and told.isdecimal() else 0)
        length = json_length(told, len(data))
        async with repository.lease(model) as leased:
            most = service.settings.max_images
            # Whether to leave the event loop: for the JSON's size, not the tensors'.
            if length < SMALL_JSON:
                wanted, binary = read_request(data, length, leased.card, most)
            else:
                wanted, binary = await code(lambda: read_request(data, length, leased.card, most))
            count = len(wanted.images)
            with service.admission.admit(client, count):
                deadline = service.deadline(wanted.timeout_ms)
                work = infer(service, leased, wanted, deadline)
                outputs, stages = await while_connected(request, work)

                def write() -> tuple[list[Any], int | None]:
                    return write_answer(leased.name, leased.card.version, wanted, outputs, binary)

                textual = any(not binary.get(k, binary[""]) for k in outputs)
                parts, head = await code(write) if textual else write()
    answered(request, leased.name, count, stages)
    if head is None:
        return Parts(parts, "application/json", {})
    return Parts(parts, "application/octet-stream", {HEADER_LENGTH: str(head)})


@router.post("/repository/index", summary="List models and states", responses=problem_docs(401))
async def repository_index(request: Request) -> list[ModelIndexEntry]:
    """As Triton's clients ask for it."""
    found = index_of(service_of(request).repository, ready=False)
    return [ModelIndexEntry.model_validate(entry) for entry in found]


_CONTROL = problem_docs(400, 401, 403, 404)


@router.post("/repository/models/{name}/load", summary="Load a model anew", responses=_CONTROL)
async def load(request: Request, name: str) -> dict[str, Any]:
    """Where the operator allows it; the version there is serves until the new one can."""
    service = service_of(request)
    require_control(service)
    try:
        await service.repository.load(service.repository.get(name))
    except FDConvError as error:
        raise RefusedError(
            400, f"The model {name!r} does not load; the server's log says why."
        ) from error
    return {}


@router.post("/repository/models/{name}/unload", summary="Let a model go", responses=_CONTROL)
async def unload(request: Request, name: str) -> dict[str, Any]:
    """Where the operator allows it; until it is loaded again, its requests get a 503."""
    service = service_of(request)
    require_control(service)
    await service.repository.unload(service.repository.get(name))
    return {}
