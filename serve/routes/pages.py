"""The page, the documentation, and what they are made of. All of it is served from here."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from fdconv_deploy.serve.errors import RefusedError

router = APIRouter(include_in_schema=False)
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
}
_SAMPLES = 6
_HEADERS = {
    # Nothing from elsewhere, nothing inline, in no frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    """Try a model on an image."""
    return _asset("index.html")


@router.get("/docs")
async def documentation() -> Response:
    """The API's documentation, drawn from /openapi.json."""
    return _asset("docs.html")


@router.get("/favicon.ico")
async def icon() -> Response:
    """The page's icon."""
    return _asset("icon.svg")


@router.get("/static/{name}")
async def asset(name: str) -> Response:
    """A script, a style sheet, a picture."""
    return _asset(name)


@router.get("/samples")
async def samples() -> JSONResponse:
    """The names of the sample scenes."""
    return JSONResponse({"samples": sorted(_samples())})


@router.get("/samples/{name}")
async def sample(name: str) -> Response:
    """A sample scene."""
    found = _samples().get(name)
    if found is None:
        raise _nothing()
    return Response(found.read_bytes(), media_type="image/png", headers=_HEADERS)


def _asset(name: str) -> Response:
    found = _assets().get(name)
    if found is None:
        raise _nothing()
    return Response(found[0], headers={**_HEADERS, "Content-Type": found[1]})


@lru_cache(maxsize=1)
def _assets() -> dict[str, tuple[bytes, str]]:
    # Read once, by name from a list: no path is ever made from what a client sends.
    return {
        entry.name: (entry.read_bytes(), _TYPES[entry.name.rpartition(".")[2]])
        for entry in (files("fdconv_deploy.serve") / "static").iterdir()
        if entry.name.rpartition(".")[2] in _TYPES
    }


@lru_cache(maxsize=1)
def _samples() -> dict[str, Traversable]:
    folder = files("fdconv_deploy.demo") / "assets" / "heldout"
    if not folder.is_dir():
        return {}
    found = sorted(
        (entry for entry in folder.iterdir() if re.fullmatch(r"\d{3}\.png", entry.name)),
        key=lambda entry: entry.name,
    )
    return {entry.name: entry for entry in found[:_SAMPLES]}


def _nothing() -> RefusedError:
    return RefusedError(404, "There is nothing at this address; /docs lists what there is.")
