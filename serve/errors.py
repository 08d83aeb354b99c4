"""Errors and their body: RFC 9457 problem documents, one sentence, never a path of this machine."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.images import ImageTooLargeError, UnsupportedImageError
from fdconv_deploy.serve.batching import DeadlineError, WorkerDiedError

log = logging.getLogger("fdconv.serve")
REQUEST_ID = "X-Request-ID"
MEDIA_TYPE = "application/problem+json"
# Where openapi.py puts the schema: generators name a model after each schema that is not one.
PROBLEM_SCHEMA = "#/components/schemas/Problem"
_EXAMPLE_ID = "3f1c9a52f8d04b5e9c0e6a7d2b814c11"


class Problem(BaseModel):
    """Why a request was not answered (RFC 9457)."""

    type: str = "about:blank"
    title: str = Field(description="The HTTP status in words.", examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(
        description="A sentence for a person: what was expected, what was found, what to do.",
        examples=[
            "The image cannot be decoded: the file is cut off or damaged. Send the whole "
            "file, or save it again."
        ],
    )
    request_id: str = Field(description="As in the X-Request-ID header and the server's log.")
    error: str | None = Field(
        default=None, description="As `detail`; KServe's clients (/v2) read it here."
    )


class RefusedError(Exception):
    """A request that is refused: HTTP status, a sentence for the client, headers to add.

    The sentence says what was found, what was expected, and what to do.
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def problem(request_id: str, status: int, detail: str, *, kserve: bool = False) -> dict[str, Any]:
    """A problem document; ``kserve`` adds the field that KServe's clients read."""
    return Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        request_id=request_id,
        error=detail if kserve else None,
    ).model_dump(exclude_none=True)


def problem_response(request: Request, refused: RefusedError) -> JSONResponse:
    """A refusal as a response."""
    request_id = str(getattr(request.state, "request_id", "unknown"))
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    body = problem(request_id, refused.status, refused.detail, kserve=path.startswith("/v2"))
    # The middleware sets the id's header as well, but not on answers to unforeseen errors, which
    # are made outside of it.
    headers = {**(refused.headers or {}), REQUEST_ID: request_id}
    return JSONResponse(body, refused.status, headers, media_type=MEDIA_TYPE)


def problem_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of these statuses' problem documents."""
    docs: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        known = HTTPStatus(status)
        example = problem(_EXAMPLE_ID, status, f"{known.description or known.phrase}.")
        content = {"schema": {"$ref": PROBLEM_SCHEMA}, "example": example}
        docs[status] = {"description": known.phrase, "content": {MEDIA_TYPE: content}}
    return docs


def answer_to(error: Exception) -> RefusedError | None:
    """How an error is answered over HTTP and gRPC; None for one that was not foreseen."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, ImageError):
        # Images come as bytes here, so no message of read_image can name a path.
        large = isinstance(error, ImageTooLargeError)
        unsupported = isinstance(error, UnsupportedImageError)
        return RefusedError(413 if large else 415 if unsupported else 422, str(error))
    if isinstance(error, DeadlineError):
        detail = (
            "The request was not answered by its deadline. Try again later, or allow more time."
        )
        return RefusedError(504, detail)
    if isinstance(error, WorkerDiedError):
        detail = "The worker that had this request ended before answering. Send the request again."
        return RefusedError(503, detail, {"Retry-After": "1"})
    if isinstance(error, HTTPException):
        details = {
            404: "There is nothing at this address; /docs lists what there is.",
            405: "This address does not take that method; /docs lists which it takes.",
        }
        detail = details.get(error.status_code, f"{error.detail}".rstrip(".") + ".")
        return RefusedError(error.status_code, detail, dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = str(first["loc"][-1]) if first["loc"] else "the request"
        if first["type"] == "extra_forbidden":
            detail = f"There is no parameter {where[:60]!r}; /docs lists which there are."
            return RefusedError(422, detail)
        return RefusedError(422, f"{where!r} is not valid: {first['msg']}.")
    return None


def where_invalid(error: ValidationError) -> str:
    """Where something is not as a model describes it, and why, to end a sentence."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f" at {where}: {first['msg']}" if where else f": {first['msg']}"


def install(app: FastAPI) -> None:
    """Make every error of the application a problem document."""
    foreseen = RefusedError, ImageError, DeadlineError, WorkerDiedError, HTTPException
    for kind in (*foreseen, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientDisconnect, _left)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


# Not a plain function, which Starlette would run on another thread: under load that takes longer
# than all the rest of a refusal.
async def _answer(request: Request, error: Exception) -> Response:
    found = answer_to(error)
    if found is None:
        request_id = getattr(request.state, "request_id", "unknown")
        log.error("request %s failed", request_id, exc_info=error)
        found = RefusedError(
            500,
            "The service failed to answer this request; that is its fault, not the image's. Its "
            f"log says why, under the request id {request_id}.",
        )
    return problem_response(request, found)
