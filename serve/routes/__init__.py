"""The addresses of the service."""

from . import health, kserve, models, pages, segment

# In the order in which they are tried: what is asked most comes first.
ROUTERS = (
    segment.router,
    health.router,
    models.router,
    kserve.router,
    pages.router,
)

FAST_ROUTES = kserve.FAST_ROUTES

__all__ = ["FAST_ROUTES", "ROUTERS"]
