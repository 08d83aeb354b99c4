"""The OpenAPI document's examples: of the models that are served, as far as one is to be seen."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fdconv_deploy.serve.errors import DIED, LATE, MEDIA_TYPE
from fdconv_deploy.serve.kserve.inference import EXTENSIONS, model_metadata
from fdconv_deploy.serve.kserve.model_config import model_config
from fdconv_deploy.serve.kserve.repository_index import index_of
from fdconv_deploy.serve.service import Service
from fdconv_deploy.serve.statistics import ModelStatistics

from fdconv_deploy.version import __version__

_ID = "3f1c9a52f8d04b5e9c0e6a7d2b814c11"
# What each status may say; the sentences of real answers name what was found.
_DETAILS = {
    400: "The request must be a JSON object.",
    401: "This service asks for an API key. Send it as 'Authorization: Bearer KEY' or "
    "'X-API-Key: KEY'.",
    403: "Clients may not load or unload models here. Start the service with --model-control to "
    "allow it.",
    404: "There is no model of that name; there are street.",
    406: "Answers come as application/json or image/png or application/x-npz or application/zip, "
    "which the Accept header rules out.",
    408: "The request's body did not arrive within 60 s. Send it faster, or less of it.",
    413: "The request's body is larger than the 67,108,864 bytes accepted. Send a smaller or more "
    "strongly compressed image.",
    414: "The address is longer than 8,192 bytes. Send a shorter one.",
    415: "The request has no content type. Send an image as the body with its content type.",
    422: "The image cannot be decoded: the file is cut off or damaged. Send the whole file, or "
    "save it again.",
    429: "You have as many images in hand here as one client may (4). Wait for answers before "
    "sending more.",
    431: "The request has more than 100 headers, or more than 32,768 bytes of them. Send fewer.",
    500: "The service failed to answer this request; that is its fault, not the image's. Its log "
    f"says why, under the request id {_ID}.",
    503: DIED,
    504: LATE,
}
_PARAMETERS = {"version": "1", "Inference-Header-Content-Length": 138, "min_score": 0.3}
_INFER = {
    "model_version": "1",
    "id": "42",
    "outputs": [{"name": "labels", "shape": [1, 2, 2], "datatype": "UINT8", "data": [0, 0, 1, 1]}],
}


def add_examples(document: dict[str, Any], service: Service) -> None:
    """Give every JSON answer and every parameter that has none an example."""
    name = service.repository.default.name
    parameters = {**_PARAMETERS, "name": name}
    for path, operations in document["paths"].items():
        answer = _answer(path, service)
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in parameters:
                    parameter.setdefault("example", parameters[parameter["name"]])
            for status, response in operation["responses"].items():
                content = response.get("content", {})
                if MEDIA_TYPE in content:
                    content[MEDIA_TYPE]["example"] = _problem(int(status))
                elif answer is not None and "application/json" in content:
                    content["application/json"].setdefault("example", answer)


def _answer(path: str, service: Service) -> Any:
    repository = service.repository
    model = repository.default
    card = repository.card(model)
    shown = card.model_dump(mode="json")
    config = model_config(card, service.settings)
    done = ModelStatistics()
    done.ran(1, 0.0123)
    done.succeeded([("queue", 0.0004), ("inference", 0.0123)], 1)
    statistics = {"model_stats": [done.as_dict(card.name, "1")]}
    return {
        "/v1/models": {"models": [shown]},
        "/v1/models/{name}": shown,
        "/v2": {"name": "fdconv-deploy", "version": __version__, "extensions": list(EXTENSIONS)},
        "/v2/health/live": {"live": True},
        "/v2/health/ready": {"ready": True},
        "/v2/models/{name}": model_metadata(model.version, card),
        "/v2/models/{name}/versions/{version}": model_metadata(model.version, card),
        "/v2/models/stats": statistics,
        "/v2/models/{name}/stats": statistics,
        "/v2/models/{name}/versions/{version}/stats": statistics,
        "/v2/models/{name}/config": config,
        "/v2/models/{name}/versions/{version}/config": config,
        "/v2/models/{name}/ready": {"ready": True},
        "/v2/models/{name}/versions/{version}/ready": {"ready": True},
        "/v2/models/{name}/infer": {"model_name": card.name, **_INFER},
        "/v2/models/{name}/versions/{version}/infer": {"model_name": card.name, **_INFER},
        "/v2/repository/index": index_of(repository, ready=False),
        "/v2/repository/models/{name}/load": {},
        "/v2/repository/models/{name}/unload": {},
    }.get(path)


def _problem(status: int) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": _DETAILS[status],
        "request_id": _ID,
    }
