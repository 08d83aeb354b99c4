"""The addresses of the service."""

from . import health, kserve, models, pages, segment

ROUTERS = (segment.router, models.router, kserve.router, health.router, pages.router)

__all__ = ["ROUTERS"]
