"""The service on a Ray cluster: ``serve run fdconv_deploy.serve.ray:app bundles=BUNDLE``.

Two deployments: an ingress, which is the application that ``fdconv serve`` runs, and the model,
whose replicas run what the ingress has prepared. Batches, scaling and placing are Ray's.
"""

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import FastAPI
from pydantic import SecretStr

from fdconv_deploy.environment import needed_by
from fdconv_deploy.runtime import Bundle
from fdconv_deploy.runtime.ray_data import join_ray
from fdconv_deploy.serve.app import ServerError, create_app, return_large_blocks
from fdconv_deploy.serve.model_repository import bundles_of
from fdconv_deploy.serve.settings import RaySettings, read_keys

# Before Ray is imported, and for a cluster that starts from here; others have theirs (docs/ray.md).
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "fdconv_deploy.serve.ray.ingress:in_proxy"
)
with needed_by("Serving on Ray", "ray"):
    import ray
    from ray import serve

    from fdconv_deploy.serve.ray.ingress import ForProxy, RayService
    from fdconv_deploy.serve.ray.model import Model

__all__ = ["app", "run"]
_NAME, _MODEL = "fdconv", "Model"
log = logging.getLogger("fdconv.serve")


# Ray reads the annotation as it is: it would not find the class by a string.
def app(settings: RaySettings) -> serve.Application:
    """Build the application, as ``serve run`` and ``serve deploy`` ask for it."""
    most = settings.max_replicas or settings.replicas
    settings = settings.model_copy(
        update={
            "bundles": tuple(path.absolute() for path in settings.bundles),
            "api_keys_file": settings.api_keys_file and settings.api_keys_file.absolute(),
            "workers": most,  # in the ingress, images of mode 'slide' that are crossed at a time
            "threads": settings.threads or max(int(settings.cpus), 1),
        }
    )
    replicas: dict[str, Any] = {"num_replicas": most}
    if most > settings.replicas:
        scaling = settings.model_dump(include={"target_ongoing_requests", "max_replicas"})
        replicas = {"autoscaling_config": {"min_replicas": settings.replicas, **scaling}}
    # A dead replica is found, and replaced, at the next check of its health.
    common = {"health_check_period_s": 2, "graceful_shutdown_timeout_s": settings.drain_seconds}
    model = serve.deployment(
        name=_MODEL,
        max_ongoing_requests=settings.max_ongoing_requests,
        logging_config={"enable_access_log": False},  # the ingress has one: a line a request
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        **replicas,
        **common,
    )(Model)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=settings.max_connections,
        ray_actor_options={"num_cpus": settings.ingress_cpus},
        **common,
    )(serve.ingress(_ingress(settings))())
    return ingress.bind(model.bind(settings))


def run(settings: RaySettings, address: str, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Deploy the application.

    Args:
        settings: As for :func:`app`.
        address: Of the cluster's head, ``HOST:PORT``; "auto" for the one of this machine; "local"
            for one that is started here, and ended by SIGINT or SIGTERM.
        host: Where Ray's proxies are to listen, if none do yet.
        port: Theirs.

    Raises:
        FDConvError: There is no cluster at that address.
        ServerError: The application does not start there.
        BundleError: A bundle is damaged or missing, found before a cluster is started here.
    """
    most = settings.max_replicas or settings.replicas
    cpus = most * settings.cpus + settings.ingress_replicas * settings.ingress_cpus
    local = address == "local"
    if local:
        for path in (path for source in settings.bundles for path in bundles_of(source)):
            Bundle.open(path, verify=False)
    # Here, as many CPUs as are asked for: whether there are so many was its user's to decide.
    join_ray(address, num_cpus=math.ceil(cpus), include_dashboard=False)
    for name, wanted in (("CPUs", cpus), ("GPUs", most * settings.gpus)):
        if (found := ray.cluster_resources().get(name[:3], 0)) < wanted:
            log.warning(
                "%g %s are asked for, and the cluster has %g: Ray waits for more.",
                wanted,
                name,
                found,
            )
    try:
        serve.start(http_options={"host": host, "port": port}, proxy_location="EveryNode")
        serve.run(app(settings), name=_NAME)
        with contextlib.suppress(KeyboardInterrupt):
            if local:
                threading.Event().wait()
    except RuntimeError as error:
        raise ServerError(f"The service does not start on Ray: {_reason(error)}") from error
    finally:
        if local:
            serve.shutdown()
        ray.shutdown()


def _reason(error: Exception) -> str:
    """The last words of a deployment that failed, without its traceback."""
    said = str(error)
    if _NAME in (applications := serve.status().applications):
        messages = [found.message for found in applications[_NAME].deployments.values()]
        said = next((message for message in messages if "Error: " in message), said)
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].rpartition("Error: ")[2] if lines else repr(error)


def _ingress(settings: RaySettings) -> Callable[[], FastAPI]:
    def build() -> FastAPI:
        # On a replica of the ingress, as it starts.
        return_large_blocks()
        service, keys = partial(RayService, serve.get_deployment_handle(_MODEL)), settings.api_keys
        if settings.api_keys_file:
            keys += tuple(map(SecretStr, read_keys(settings.api_keys_file)))
        own = settings.model_copy(update={"api_keys": keys})
        built = create_app(own.bundles, own, make_service=service)
        built.add_middleware(ForProxy)
        return built

    return build
