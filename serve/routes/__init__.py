"""The service's routes, one file per group of addresses."""

from fdconv_deploy.serve.routes import health, kserve, models, pages, segment

# In the order in which they are tried: the most frequent first.
ROUTERS = [module.router for module in (segment, kserve, health, models, pages)]
