"""The addresses of the service."""

from fdconv_deploy.serve.routes import health, kserve, models, pages, segment

# In the order in which they are tried: what is asked most comes first.
ROUTERS = (
    segment.router,
    health.router,
    models.router,
    kserve.router,
    pages.router,
)

__all__ = ["ROUTERS"]
