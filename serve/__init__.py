"""Bundles behind HTTP: ``create_app`` makes the application, ``run`` starts a server."""

from fdconv_deploy.serve.app import ServerError, create_app, run, running
from fdconv_deploy.serve.settings import Settings

__all__ = ["ServerError", "Settings", "create_app", "run", "running"]
