"""The OpenAPI document: its description, its security, and examples of the models served."""

from __future__ import annotations

import json
import re
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.encoders import jsonable_encoder

from fdconv_deploy.serve.errors import Problem, problem_docs
from fdconv_deploy.serve.kserve import metadata as documents
from fdconv_deploy.serve.kserve.tensors import HEADER_LENGTH, InferCall
from fdconv_deploy.serve.middleware import HEALTH
from fdconv_deploy.serve.service import Service

DESCRIPTION = """\
Semantic segmentation, and object detection with masks, with FDConv networks.

```
curl -F image=@street.jpg -H 'Accept: image/png' http://localhost:8000/v1/segment -o mask.png
curl --data-binary @street.jpg -H 'Content-Type: image/jpeg' http://localhost:8000/v1/segment
curl -F image=@street.jpg 'http://localhost:8000/v1/segment?output=overlay' -o overlay.png
```

Errors are problem documents (RFC 9457) with a sentence in `detail`. Every answer carries an
`X-Request-ID`, the client's own if it sent one. 429 and 503 say in `Retry-After` when to come
back; nothing was done, so the same request may be sent again.
"""
_TEXT = {"type": "string"}


def install(app: FastAPI, service: Service) -> None:
    """Give the application its OpenAPI document, and the address where it is kept."""
    kept: dict[str, bytes] = {}  # by path prefix

    # Not async: making it takes long enough to keep the event loop from others.
    @app.get("/openapi.json", include_in_schema=False)
    def address(request: Request) -> Response:
        prefix = request.scope["root_path"]
        if prefix not in kept:
            servers = {"servers": [{"url": prefix}]} if prefix else {}
            kept[prefix] = json.dumps({**document(), **servers}, separators=(",", ":")).encode()
        return Response(kept[prefix], media_type="application/json")

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            _describe(FastAPI.openapi(app), service)
        return app.openapi_schema or {}

    app.openapi = document  # type: ignore[method-assign]


def _describe(document: dict[str, Any], service: Service) -> None:
    """Put in what FastAPI does not know: problems, keys, parameters read by hand, examples."""
    schemas, keys_needed = document["components"]["schemas"], bool(service.settings.api_keys)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    # The body of an inference request is read by hand.
    call = InferCall.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(call.pop("$defs", {}), InferCall=call, Problem=Problem.model_json_schema())
    if keys_needed:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
    parameters = {
        "name": next(iter(service.repository)).name,
        "version": "1",
        "min_score": 0.3,
        HEADER_LENGTH: 138,
    }
    answers = _answers(service)
    for path, operations in document["paths"].items():
        answer = answers.get(path.replace("/versions/{version}", ""))
        for operation in operations.values():
            if keys_needed and path not in HEALTH:
                operation["security"] = [{"bearer": []}, {"key": []}]
            described = operation.setdefault("parameters", [])
            # Routes of models read their addresses by hand.
            known = {p["name"] for p in described}
            for name in re.findall(r"{(\w+)}", path):
                if name not in known:
                    described.append(
                        {"name": name, "in": "path", "required": True, "schema": _TEXT}
                    )
            for parameter in described:
                if parameter["name"] in parameters:
                    parameter.setdefault("example", parameters[parameter["name"]])
            for status, response in operation["responses"].items():
                content = response.get("content", {})
                if "application/json" not in content:
                    continue
                if status == "422":  # FastAPI's own of parameters that are not valid
                    response |= problem_docs(422)[422]
                    continue
                # First: generators take the first they know.
                kept = {"application/json": content.pop("application/json"), **content}
                response["content"] = kept
                if answer is not None:
                    kept["application/json"].setdefault("example", answer)


def _answers(service: Service) -> dict[str, Any]:
    """Example answers by path, of the default model as it is served."""
    card = next(iter(service.repository)).current_card
    statistics = documents.ModelStatistics(name=card.name, version="1")
    statistics.ran(1, 0.0123)
    statistics.succeeded([("queue", 0.0004), ("inference", 0.0123)], 1)
    listed = documents.ModelStatisticsList(model_stats=[statistics])
    labels = {"name": "labels", "shape": [1, 2, 2], "datatype": "UINT8", "data": [0, 0, 1, 1]}
    answers = {
        "/v1/models": {"models": [card]},
        "/v1/models/{name}": card,
        "/v2": documents.ServerMetadata(),
        "/v2/health/live": documents.ServerLive(),
        "/v2/health/ready": documents.ServerReady(ready=True),
        "/v2/models/{name}": documents.model_metadata(card),
        "/v2/models/stats": listed,
        "/v2/models/{name}/stats": listed,
        "/v2/models/{name}/config": documents.model_config(card, service.settings).model_dump(
            exclude_none=True
        ),
        "/v2/models/{name}/ready": documents.ServerReady(ready=True),
        "/v2/models/{name}/infer": {
            "model_name": card.name,
            "model_version": "1",
            "id": "42",
            "outputs": [labels],
        },
        "/v2/repository/index": documents.repository_index([card]),
        "/v2/repository/models/{name}/load": {},
        "/v2/repository/models/{name}/unload": {},
    }
    found: dict[str, Any] = jsonable_encoder(answers)
    return found
