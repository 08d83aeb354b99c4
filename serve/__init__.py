"""Bundles behind HTTP: ``create_app`` makes the application, ``run`` starts a server."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdconv_deploy.serve.app import ServerError, create_app, run, running
    from fdconv_deploy.serve.settings import Settings

__all__ = ["ServerError", "Settings", "create_app", "run", "running"]


def __getattr__(name: str) -> Any:
    # When it is asked for: a worker process has a part of this package and needs no FastAPI.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "settings" if name == "Settings" else "app"
    return getattr(import_module(f"{__name__}.{home}"), name)
