"""The browser pages and what they are made of. All of it is served from here, nothing elsewhere."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from fdconv_deploy.serve.errors import RefusedError

router = APIRouter(include_in_schema=False)
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "jpg": "image/jpeg",
}
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
    return _file(_static(), "index.html")


@router.get("/docs")
async def documentation() -> Response:
    """The API's documentation, drawn from /openapi.json."""
    return _file(_static(), "docs.html")


@router.get("/favicon.ico")
async def icon() -> Response:
    """The page's icon."""
    return _file(_static(), "icon.svg")


@router.get("/static/{name}")
async def static(name: str) -> Response:
    """A script, a style sheet, a picture."""
    return _file(_static(), name)


@router.get("/samples")
async def samples() -> JSONResponse:
    """The names of the sample scenes."""
    return JSONResponse({"samples": sorted(_samples())})


@router.get("/samples/{name}")
async def sample(name: str) -> Response:
    """A sample scene."""
    return _file(_samples(), name)


# Read once, by name from a list: no path is ever made from what a client sends.
@lru_cache(maxsize=1)
def _static() -> dict[str, bytes]:
    folder = files("fdconv_deploy.serve") / "static"
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@lru_cache(maxsize=1)
def _samples() -> dict[str, bytes]:
    pictures = files("fdconv_deploy.sample_images").iterdir()
    return {entry.name: entry.read_bytes() for entry in pictures if entry.name.endswith(".jpg")}


def _file(found: dict[str, bytes], name: str) -> Response:
    if name not in found:
        raise RefusedError(404, "There is nothing at this address; /docs lists what there is.")
    kind = _TYPES[name.rpartition(".")[2]]
    return Response(found[name], headers={**_HEADERS, "Content-Type": kind})
