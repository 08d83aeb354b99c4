"""The KServe protocol over REST: ``/v2``, with Triton's extensions."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

from fdconv_deploy.serve.admission import Memory
from fdconv_deploy.serve.errors import RefusedError, problem_docs, where_invalid
from fdconv_deploy.serve.kserve import metadata as documents
from fdconv_deploy.serve.kserve.inference import infer
from fdconv_deploy.serve.kserve.tensors import (
    HEADER_LENGTH,
    InferAnswer,
    json_length,
    json_memory,
    most_bytes,
    read_request,
    write_answer,
)
from fdconv_deploy.serve.model_repository import Model
from fdconv_deploy.serve.routes import Parts, answered, service_of, while_connected
from fdconv_deploy.serve.service import timeout_of
from fdconv_deploy.serve.uploads import Body

# JSON larger than this, in bytes, is read and written on another thread than the event loop's.
_SMALL_JSON = 64 << 10
router = APIRouter(prefix="/v2", tags=["KServe v2"])
_NOT_FOUND = problem_docs(401, 404)
_READY = problem_docs(401, 404, 503)
_CONTROL = problem_docs(400, 401, 403, 404, 413)
Asked = TypeVar("Asked", bound=BaseModel)
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


class _PlainRoute(APIRoute):
    """A route that FastAPI documents, and whose endpoint is called with the request alone.

    What FastAPI does before a call and after it would cost as much as reading the request.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive))
            await response(scope, receive, send)

        self.app = app


def _of_model(
    method: str, address: str, summary: str, **options: Any
) -> Callable[[Endpoint], Endpoint]:
    """Route an address of a model, and the same of one of its versions.

    Endpoints take both from ``request.path_params``: FastAPI's checks of them would cost as much
    as reading an inference request, and would take a version from the query as well.
    """

    def register(endpoint: Endpoint) -> Endpoint:
        for model, which in (
            ("/models/{name}", ""),
            ("/models/{name}/versions/{version}", ", in one version"),
        ):
            router.add_api_route(
                model + address, endpoint, methods=[method], summary=summary + which, **options
            )
        return endpoint

    return register


def _model(request: Request) -> Model:
    """The model, of the version, that the address names."""
    return service_of(request).repository.get(**request.path_params)


async def _read_json(request: Request, kind: type[Asked]) -> Asked:
    """A small JSON body, which may be left out."""
    with Body(request, service_of(request), _SMALL_JSON) as body:
        data = await body.read()
    try:
        return kind.model_validate_json(data or b"{}")
    except ValidationError as error:
        raise RefusedError(
            400,
            f"The body is not what this address takes{where_invalid(error)}. Leave it out, or "
            "send JSON.",
        ) from error


# First, since routes are tried in order and this one is asked most.
_INFER: dict[str, Any] = {
    "route_class_override": _PlainRoute,
    "response_class": Response,
    "openapi_extra": {
        "parameters": [
            {
                "name": HEADER_LENGTH,
                "in": "header",
                "required": False,
                "schema": {"type": "integer", "minimum": 0},
                "description": "Length of the JSON in bytes, where binary tensors follow it.",
            }
        ],
        "requestBody": {
            "required": True,
            "description": "One input 'images': FP32 [N, 3, H, W] normalised, or UINT8 "
            "[N, H, W, 3] RGB. A detector also takes 'sizes': FP32 [N, 2], height and width of "
            "each image within its input, the whole input when not given. Tensors are in the "
            "JSON's 'data' or, in binary, behind the JSON.",
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/InferCall"}},
                **_BINARY,
            },
        },
    },
    "responses": {
        200: {
            "model": InferAnswer,
            "description": "The outputs asked for, all when none is named. In binary where the "
            f"request asks for it; {HEADER_LENGTH} is then the JSON's length.",
            "content": _BINARY,
        },
        **problem_docs(400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    },
}


@_of_model("POST", "/infer", "Run a model on a tensor", **_INFER)
async def run(request: Request) -> Response:
    """A segmentor's logits at the network's own resolution, and labels at its input's size.

    Of a detector, its graph's boxes (in pixels of the input), scores, labels, count and masks.
    The parameter `timeout` is a time limit in microseconds.
    """
    service, arrived = service_of(request), time.perf_counter()
    client, code = request.state.client, service.scheduler.code
    model = service.repository.get(**request.path_params)
    timeout_ms = timeout_of(request.headers.get("x-timeout-ms"))
    service.check_loaded()
    deadline = service.deadline(timeout_ms, arrived=arrived)
    service.admission.check_room(client, deadline=deadline)
    card, most_images = model.current_card, service.settings.max_images
    with Body(request, service, most_bytes(card, most_images), deadline) as body:
        header = request.headers.get(HEADER_LENGTH)
        data = await body.read_aligned(int(header[:9]) if header and header.isdecimal() else 0)
        length = json_length(header, len(data))
        if length < _SMALL_JSON:
            wanted = read_request(data, length, card, most_images)
        else:
            counted = partial(json_memory, data[:length], card, most_images)
            with Memory(service.admission) as memory:
                await memory.take(await code(counted, deadline, memory.hold), deadline)
                reading = partial(read_request, data, length, card, most_images)
                wanted = await code(reading, deadline, memory.hold)
        deadline = service.deadline(timeout_ms, wanted.timeout_ms, arrived=arrived)
        images, work = len(wanted.images), partial(infer, request=wanted, write=write_answer)
        asked = service.answer(model, client, images, deadline, work)
        (parts, head), stages = await while_connected(request, asked)
    answered(request, model.name, images, stages)
    if head is None:
        return Parts(parts, b"application/json")
    return Parts(parts, b"application/octet-stream", (HEADER_LENGTH.lower().encode(), b"%d" % head))


@router.get("", summary="What this server is", responses=problem_docs(401))
async def server_metadata() -> documents.ServerMetadata:
    """Name, version and extensions."""
    return documents.ServerMetadata()


@router.get("/health/live", summary="Is the process alive?")
async def live() -> documents.ServerLive:
    """As `/healthz`."""
    return documents.ServerLive()


@router.get("/health/ready", summary="Is it ready for requests?", responses=problem_docs(503))
async def ready(request: Request) -> documents.ServerReady:
    """As `/readyz`."""
    service_of(request).check_ready()
    return documents.ServerReady(ready=True)


@router.get(
    "/models/stats",
    summary="Statistics of every model",
    response_model=documents.ModelStatisticsList,
    responses=problem_docs(401),
)
async def all_statistics(request: Request) -> JSONResponse:
    """Counts and times of each loaded model since it was loaded.

    A model called `stats` has its metadata at this address as well: the answer holds both.
    """
    service = service_of(request)
    found = service.model_statistics().model_dump()
    for model in service.repository:
        if model.name == "stats":
            found |= documents.model_metadata(model.current_card).model_dump()
    return JSONResponse(found)


@_of_model("GET", "/stats", "Statistics of a model", responses=_NOT_FOUND)
async def statistics(request: Request) -> documents.ModelStatisticsList:
    """Counts and times since the model was loaded; an empty list while it is not."""
    return service_of(request).model_statistics(**request.path_params)


@_of_model(
    "GET",
    "/config",
    "A model's configuration",
    response_model_exclude_none=True,
    responses=_NOT_FOUND,
)
async def config(request: Request) -> documents.ModelConfig:
    """Inputs, outputs and batching, as Triton's ModelConfig has them."""
    return documents.model_config(_model(request).current_card, service_of(request).settings)


@_of_model("GET", "", "A model's inputs and outputs", responses=_NOT_FOUND)
async def metadata(request: Request) -> documents.ModelMetadata:
    """Names, datatypes and shapes; -1 stands for the batch."""
    return documents.model_metadata(_model(request).current_card)


@_of_model("GET", "/ready", "Is a model loaded?", responses=_READY)
async def model_ready(request: Request) -> documents.ServerReady:
    """200 if it is, 503 if not."""
    if (model := _model(request)).version is None:
        later = service_of(request).admission.retry_after()
        raise RefusedError(503, f"The model {model.name!r} is not loaded.", later)
    return documents.ServerReady(ready=True)


@router.post(
    "/repository/index",
    summary="List models and states",
    response_model_exclude_none=True,
    responses=problem_docs(400, 401, 413),
)
async def index(request: Request) -> list[documents.ModelIndexEntry]:
    """As Triton's clients ask for it; with `{"ready": true}` of the models that are ready."""
    asked = await _read_json(request, documents.IndexCall)
    cards = [model.current_card for model in service_of(request).repository]
    return documents.repository_index(cards, ready=asked.ready)


@router.post("/repository/models/{name}/load", summary="Load a model again", responses=_CONTROL)
async def load(request: Request, name: str) -> dict[str, Any]:
    """Where the operator allows it; the version there is serves until the new one can.

    A bundle that is loaded and has not changed stays as it is.
    """
    asked = await _read_json(request, documents.ControlCall)
    await service_of(request).load_model(name, asked.parameters)
    return {}


@router.post("/repository/models/{name}/unload", summary="Unload a model", responses=_CONTROL)
async def unload(request: Request, name: str) -> dict[str, Any]:
    """Where the operator allows it; until it is loaded again, its requests get a 503."""
    await _read_json(request, documents.ControlCall)
    await service_of(request).unload_model(name)
    return {}
