"""The service's routes, one file per group of addresses."""

from fdconv_deploy.serve.routes import kserve, pages, segment, status

# In the order in which they are tried: the most frequent first.
ROUTERS = [module.router for module in (segment, kserve, status, pages)]
