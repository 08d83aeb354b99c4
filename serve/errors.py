"""Errors as RFC 9457 problem documents: one sentence, and never a path of this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fdconv_deploy.serve.batching import DeadlineError, WorkerDiedError
from fdconv_deploy.serve.schemas import Problem
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.preprocessing import ImageTooLargeError, UnsupportedImageError

log = logging.getLogger("fdconv.serve")
REQUEST_ID = "X-Request-ID"
MEDIA_TYPE = "application/problem+json"
LATE = "The request was not answered by its deadline. Try again later, or allow more time."
DIED = "The worker that had this request ended before answering. Send the request again."


class ClientGoneError(Exception):
    """The client closed its connection before it had its answer."""


class RefusedError(Exception):
    """A request that will not be answered, and why."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def problem_response(
    request: Request, status: int, detail: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """A problem document as a response."""
    problem = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        request_id=request_id_of(request),
        error=detail if request.url.path.startswith("/v2") else None,
    )
    # The header is set here as well, because answers to unforeseen errors are made outside
    # of the middleware that sets it.
    named = {**(headers or {}), REQUEST_ID: problem.request_id}
    body = problem.model_dump(exclude_none=True)
    return JSONResponse(body, status, named, media_type=MEDIA_TYPE)


def bare_problem(request_id: str, status: int, detail: str, *, kserve: bool) -> bytes:
    """A problem document for what is refused before, or instead of, the application."""
    problem = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        request_id=request_id,
        error=detail if kserve else None,
    )
    return problem.model_dump_json(exclude_none=True).encode()


def problem_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of these statuses' problem documents."""
    schema = Problem.model_json_schema()
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
        for status in statuses
    }


def request_id_of(request: Request) -> str:
    """The request's id, as the RequestId middleware set it."""
    return str(getattr(request.state, "request_id", "unknown"))


def install(app: FastAPI) -> None:
    """Make every error of the application a problem document."""
    for kind, answer in _FORESEEN.items():
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, _unexpected)


def _request_problem(request: Request, error: Exception) -> Response:
    found = cast(RefusedError, error)
    return problem_response(request, found.status, found.detail, found.headers)


def image_problem(error: ImageError) -> tuple[int, str]:
    """The status and sentence for an image that is not accepted."""
    # Images come as bytes here, so no message of read_image can name a path.
    if isinstance(error, ImageTooLargeError):
        return 413, str(error)
    return 415 if isinstance(error, UnsupportedImageError) else 422, str(error)


def _image_error(request: Request, error: Exception) -> Response:
    return problem_response(request, *image_problem(cast(ImageError, error)))


def _invalid(request: Request, error: Exception) -> Response:
    first = cast(RequestValidationError, error).errors()[0]
    where = str(first["loc"][-1]) if first["loc"] else "the request"
    if first["type"] == "extra_forbidden":
        return problem_response(
            request, 422, f"There is no parameter {where[:60]!r}; /docs lists which there are."
        )
    return problem_response(request, 422, f"{where!r} is not valid: {first['msg']}.")


def _http(request: Request, error: Exception) -> Response:
    found = cast(HTTPException, error)
    details = {
        404: "There is nothing at this address; /docs lists what there is.",
        405: "This address does not take that method; /docs lists which it takes.",
    }
    detail = details.get(found.status_code, f"{found.detail}".rstrip(".") + ".")
    headers = dict(found.headers) if found.headers else None
    return problem_response(request, found.status_code, detail, headers)


def _late(request: Request, error: Exception) -> Response:
    return problem_response(request, 504, LATE)


def _died(request: Request, error: Exception) -> Response:
    return problem_response(request, 503, DIED, {"Retry-After": "1"})


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody is there to read it; the log shows it


def _unexpected(request: Request, error: Exception) -> Response:
    request_id = request_id_of(request)
    log.error("request %s failed", request_id, exc_info=error)
    return problem_response(
        request,
        500,
        "The service failed to answer this request; that is its fault, not the image's. Its log "
        f"says why, under the request id {request_id}.",
    )


_FORESEEN: dict[type[Exception], Callable[[Request, Exception], Response]] = {
    RefusedError: _request_problem,
    ImageError: _image_error,
    RequestValidationError: _invalid,
    HTTPException: _http,
    ClientDisconnect: _gone,
    ClientGoneError: _gone,
    DeadlineError: _late,
    WorkerDiedError: _died,
}
