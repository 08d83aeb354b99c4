"""The OpenAPI document's words, and what FastAPI does not find out by itself."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fdconv_deploy.serve.openapi_examples import add_examples
from fdconv_deploy.serve.schemas import InferCall
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
_OPEN = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")


def install(app: FastAPI, service: Service, *, keys_needed: bool) -> None:
    """Give the application its OpenAPI document, with examples of the models served."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                separate_input_output_schemas=False,
            )
            _complete(found, keys_needed)
            add_examples(found, service)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _complete(document: dict[str, Any], keys_needed: bool) -> None:
    schemas = document["components"]["schemas"]
    # The body of an inference is read by hand, so nothing else brings its schema in.
    call = InferCall.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(call.pop("$defs", {}))
    schemas["InferCall"] = call
    if not keys_needed:
        return
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    for path, operations in document["paths"].items():
        if path not in _OPEN:
            for operation in operations.values():
                operation["security"] = [{"bearer": []}, {"key": []}]
