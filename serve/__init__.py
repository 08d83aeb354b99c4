"""Bundles behind HTTP: ``create_app`` makes the application, ``run`` starts a server."""

from .app import create_app
from .main import ServerError, run, running
from .settings import Settings

__all__ = ["ServerError", "Settings", "create_app", "run", "running"]
