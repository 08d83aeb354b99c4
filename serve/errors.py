"""Errors and their body: RFC 9457 problem documents, one sentence, never a path of this machine."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fdconv_deploy.serve.batching import DeadlineError, WorkerDiedError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.images import ImageTooLargeError, UnsupportedImageError

log = logging.getLogger("fdconv.serve")
REQUEST_ID = "X-Request-ID"
MEDIA_TYPE = "application/problem+json"
LATE = "The request was not answered by its deadline. Try again later, or allow more time."
DIED = "The worker that had this request ended before answering. Send the request again."


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


class ClientGoneError(Exception):
    """The client closed its connection before it had its answer."""


class RefusedError(Exception):
    """A request that is refused, and why.

    Args:
        status: of HTTP.
        detail: a sentence for the client: what was found, what was expected, what to do.
        headers: further headers of the answer.
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


def problem_response(
    request: Request, status: int, detail: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """A problem document as a response."""
    request_id = str(getattr(request.state, "request_id", "unknown"))
    body = problem(request_id, status, detail, kserve=request.url.path.startswith("/v2"))
    # The middleware sets the id's header as well, but not on answers to unforeseen errors, which
    # are made outside of it.
    named = {**(headers or {}), REQUEST_ID: request_id}
    return JSONResponse(body, status, named, media_type=MEDIA_TYPE)


def problem_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of these statuses' problem documents."""
    content = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in statuses
    }


def image_problem(error: ImageError) -> tuple[int, str]:
    """The status and sentence for an image that is not accepted."""
    # Images come as bytes here, so no message of read_image can name a path.
    if isinstance(error, ImageTooLargeError):
        return 413, str(error)
    return 415 if isinstance(error, UnsupportedImageError) else 422, str(error)


def install(app: FastAPI) -> None:
    """Make every error of the application a problem document."""
    for kind in (
        RefusedError,
        ImageError,
        RequestValidationError,
        HTTPException,
        ClientDisconnect,
        ClientGoneError,
        DeadlineError,
        WorkerDiedError,
    ):
        app.add_exception_handler(kind, _foreseen)
    app.add_exception_handler(Exception, _unforeseen)


def _foreseen(request: Request, error: Exception) -> Response:
    if isinstance(error, (ClientDisconnect, ClientGoneError)):
        return Response(status_code=499)  # nobody is there to read it; the log shows it
    headers: Any = None
    if isinstance(error, RefusedError):
        status, detail, headers = error.status, error.detail, error.headers
    elif isinstance(error, ImageError):
        status, detail = image_problem(error)
    elif isinstance(error, RequestValidationError):
        status, detail = 422, _invalid(error)
    elif isinstance(error, HTTPException):
        status, headers = error.status_code, error.headers
        detail = {
            404: "There is nothing at this address; /docs lists what there is.",
            405: "This address does not take that method; /docs lists which it takes.",
        }.get(status, f"{error.detail}".rstrip(".") + ".")
    elif isinstance(error, DeadlineError):
        status, detail = 504, LATE
    else:
        status, detail, headers = 503, DIED, {"Retry-After": "1"}
    return problem_response(request, status, detail, headers)


def _invalid(error: RequestValidationError) -> str:
    first = error.errors()[0]
    where = str(first["loc"][-1]) if first["loc"] else "the request"
    if first["type"] == "extra_forbidden":
        return f"There is no parameter {where[:60]!r}; /docs lists which there are."
    return f"{where!r} is not valid: {first['msg']}."


def _unforeseen(request: Request, error: Exception) -> Response:
    request_id = getattr(request.state, "request_id", "unknown")
    log.error("request %s failed", request_id, exc_info=error)
    return problem_response(
        request,
        500,
        "The service failed to answer this request; that is its fault, not the image's. Its log "
        f"says why, under the request id {request_id}.",
    )
