"""Reading a request's body within its limits: size, decompressed size, time, and memory."""

from __future__ import annotations

import asyncio
import sys
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import numpy as np
import python_multipart  # noqa: F401 - Starlette finds it missing at the first upload only
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from fdconv_deploy.serve.batching import After, DeadlineError
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.service import Service

FIELD = "image"
NPY = "application/x-npy"
_HOW = (
    "Send an image as the body with its content type (for instance image/jpeg), or as the field "
    f"'{FIELD}' of a multipart/form-data request."
)
_ALIGNMENT = 16  # bytes, as any allocation is
# Bytes that are decompressed in one step on the event loop, and on another thread.
_SMALL_PIECE, _LARGE_PIECE = 32 << 10, 1 << 20
# A body of more bytes is put together on another thread.
_LARGE_BODY = 8 << 20
# zlib's notation for "gzip only" and "zlib format", what HTTP calls deflate.
_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


@dataclass(frozen=True)
class Upload:
    """One image as it was sent; ``name`` is the form's file name, without folders."""

    data: bytes
    name: str | None = None


class _Parser(MultiPartParser):
    # Bodies are limited before they get here, so files stay in memory, never on disk.
    spool_max_size = 1 << 62


class Body:
    """A request's body; a context manager that holds its bytes' share of what may be in hand.

    Refused are, on entering, what is announced too large (413) or of an unknown encoding (415); on
    reading, what is too slow (408), too large (413), damaged (422), or too much for now (503).
    ``most`` are the bytes that a request of this kind may need.
    """

    def __init__(
        self, request: Request, service: Service, most: int = sys.maxsize, deadline: float = inf
    ) -> None:
        self._request, self._settings = request, service.settings
        self._admission = service.admission
        self._most = min(service.settings.max_body_bytes, most)
        self._taken, self._deadline = 0, deadline
        length = request.headers.get("content-length", "")
        known = length.isascii() and length.isdigit()
        self._length = int(length[:20]) if known else None

    def __enter__(self) -> Body:
        if (self._length or 0) > self._most:
            raise self._too_large()
        encoding = self._request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", *_WINDOWS):
            raise RefusedError(
                415,
                f"The content encoding {encoding[:40]!r} is not understood. Send the body as it "
                "is, or with gzip or deflate.",
                {"Accept-Encoding": "gzip, deflate"},
            )
        self._window = _WINDOWS.get(encoding)
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.give_body(self._taken)

    async def read(self) -> bytes:
        """The whole body, decompressed."""
        with self._in_time():
            chunks = [chunk async for chunk in self._chunks()]
        if self._taken > _LARGE_BODY:
            return await asyncio.to_thread(b"".join, chunks)
        return b"".join(chunks)

    async def read_aligned(self, start: int) -> memoryview:
        """As :meth:`read`, laid out so that tensors from byte ``start`` can be used in place."""
        if self._window is not None or self._length is None:
            with self._in_time():
                chunks = [chunk async for chunk in self._chunks()]
            room, at = _aligned_room(sum(map(len, chunks)), start), 0
            for chunk in chunks:
                room[at : at + len(chunk)] = chunk
                at += len(chunk)
                await asyncio.sleep(0)  # of tens of megabytes, others would wait
            return room
        room, at = _aligned_room(self._length, start), 0
        with self._in_time():
            async for chunk in self._request.stream():  # HTTP sees to it that they are no more
                self._take(len(chunk))
                room[at : at + len(chunk)] = chunk
                at += len(chunk)
        return room[:at]

    async def images(self) -> list[Upload]:
        """The images in it, one or more; refused with 415 or 422 where there is none."""
        kind = self._request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            with self._in_time():
                return await self._form()
        if kind.startswith("image/") or kind in ("application/octet-stream", NPY):
            return [Upload(await self.read())]
        found = f"the content type {kind[:80]!r}" if kind else "no content type"
        raise RefusedError(415, f"The request has {found}. {_HOW}")

    async def _form(self) -> list[Upload]:
        most = self._settings.max_images
        limits = {"max_files": most, "max_fields": 8, "max_part_size": 1 << 16}
        try:
            form = await _Parser(self._request.headers, self._chunks(), **limits).parse()
        except MultiPartException as error:
            raise RefusedError(
                422,
                f"The form cannot be read ({str(error.message).rstrip('.')}). {_HOW} At most "
                f"{most} images per request.",
            ) from error
        try:
            fields = form.getlist(FIELD)
            files = [field for field in fields if isinstance(field, UploadFile)]
            if files and len(files) == len(fields):
                return [Upload(await file.read(), _base_name(file.filename)) for file in files]
        finally:
            await form.close()
        found = "that field holds text, not a file" if fields else "no such field was found"
        raise RefusedError(
            422, f"The form must hold one file or more in the field '{FIELD}'; {found}."
        )

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        task, seconds = asyncio.current_task(), self._settings.body_seconds
        assert task is not None
        left = max(self._deadline - time.perf_counter(), 0.0)
        limit = After(min(seconds, left), task.cancel)
        try:
            with limit:
                yield
        except asyncio.CancelledError:
            if not limit.late:
                raise
            if left < seconds:
                raise DeadlineError from None
            raise RefusedError(
                408,
                f"The request's body did not arrive within {seconds:g} s. Send it faster, or less "
                "of it.",
                {"Connection": "close"},
            ) from None

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        stream = self._request.stream()
        received = 0
        async for chunk in stream if self._window is None else _unpacked(stream, self._window):
            received += len(chunk)
            if received > self._most:
                raise self._too_large()
            self._take(len(chunk))
            if chunk:
                yield chunk

    def _take(self, size: int) -> None:
        self._admission.take_body(size)
        self._taken += size

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413,
            f"The body is larger than the {self._most:,} bytes that are accepted here, "
            "decompressed. Send a smaller or more strongly compressed image, or fewer at a time.",
        )


async def _unpacked(stream: AsyncIterator[bytes], window: int) -> AsyncGenerator[bytes, None]:
    """Decompress a body piece by piece: small ones at once, others on another thread.

    A thousandth of its size may be all that is sent, so no more is unpacked than is asked for.
    """
    unpack = zlib.decompressobj(window)
    try:
        async for chunk in stream:
            piece = unpack.decompress(chunk, _SMALL_PIECE)
            yield piece
            full = len(piece) == _SMALL_PIECE
            while full and not unpack.eof:
                piece = await asyncio.to_thread(
                    unpack.decompress, unpack.unconsumed_tail, _LARGE_PIECE
                )
                yield piece
                full = len(piece) == _LARGE_PIECE
    except zlib.error as error:
        raise RefusedError(
            422,
            "The body is not compressed as its Content-Encoding says. Leave that header out for a "
            "body that is sent as it is.",
        ) from error
    if not unpack.eof:
        raise RefusedError(422, "The compressed body is cut off or damaged. Send it whole.")


def _aligned_room(size: int, start: int) -> memoryview:
    """Memory for a body of ``size`` bytes, in which what follows byte ``start`` is aligned."""
    return np.empty(size + -start % _ALIGNMENT, np.uint8)[-start % _ALIGNMENT :].data


def _base_name(name: str | None) -> str | None:
    """A client's file name for answers: no folders, no control characters, not long."""
    if not name:
        return None
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(c for c in last if c.isprintable())[:200] or None
