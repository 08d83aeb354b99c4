"""The addresses of the service."""

from . import health, kserve, models, pages, segment

# In the order in which they are tried: what is asked most comes first.
ROUTERS = (
    kserve.infer_router,
    segment.router,
    health.router,
    models.router,
    kserve.router,
    pages.router,
)

__all__ = ["ROUTERS"]
