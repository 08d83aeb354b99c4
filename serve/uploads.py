"""The image in a request, within the body limit, as one field of a form or as the body."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from .problems import RefusedError

FIELD = "image"
_HOW = (
    "Send an image as the body with its content type (for instance image/jpeg), or as the field "
    f"'{FIELD}' of a multipart/form-data request."
)


class _Parser(MultiPartParser):
    # Bodies are limited before they get here, so files stay in memory, never on disk.
    spool_max_size = 1 << 62


async def read_upload(request: Request, limit: int) -> bytes:
    """The bytes of the request's image.

    :param limit: the largest body accepted, in bytes; more is not read.
    :raises RefusedError: 413 over the limit, 415 another content type, 422 no image.
    """
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > limit:
        raise _too_large(limit)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _from_form(request, limit)
    if kind.startswith("image/") or kind == "application/octet-stream":
        return b"".join([chunk async for chunk in _limited(request, limit)])
    found = f"the content type {kind!r}" if kind else "no content type"
    raise RefusedError(415, f"The request has {found}. {_HOW}")


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise _too_large(limit)
        yield chunk


async def _from_form(request: Request, limit: int) -> bytes:
    parser = _Parser(
        request.headers, _limited(request, limit), max_files=1, max_fields=8, max_part_size=1 << 16
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RefusedError(
            422,
            f"The form cannot be read ({str(error.message).rstrip('.')}). {_HOW} One image per "
            "request.",
        ) from error
    try:
        fields = form.getlist(FIELD)
        if len(fields) == 1 and isinstance(fields[0], UploadFile):
            return await fields[0].read()
    finally:
        await form.close()
    found = "that field holds text, not a file" if fields else "no such field was found"
    raise RefusedError(422, f"The form must hold one file in the field '{FIELD}'; {found}.")


def _too_large(limit: int) -> RefusedError:
    return RefusedError(
        413,
        f"The request's body is larger than the {limit:,} bytes accepted. Send a smaller or more "
        "strongly compressed image.",
        # The rest of the body is not read, so the connection cannot be used again.
        {"Connection": "close"},
    )
