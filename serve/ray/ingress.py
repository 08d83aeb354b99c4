"""The service of the ingress: what ``fdconv serve`` runs on threads, replicas of the model run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fdconv_deploy.errors import BackendError, BundleError, FDConvError
from fdconv_deploy.runtime import Bundle, Session, Tensors
from fdconv_deploy.serve.batching import DeadlineError, Outcome, WorkerDiedError
from fdconv_deploy.serve.errors import REQUEST_ID, RefusedError, problem_response
from fdconv_deploy.serve.middleware import accepted_id
from fdconv_deploy.serve.model_repository import Version
from fdconv_deploy.serve.ray.model import Ran, model_id
from fdconv_deploy.serve.service import Service
from fdconv_deploy.serve.settings import Settings
from fdconv_deploy.serve.workers import RemoteRunner

log = logging.getLogger("fdconv.serve")
_START_SECONDS = 120.0


class ForProxy:
    """The outermost layer: answers as Ray's proxy is to get them.

    They are pickled on their way to it, and it adds the request's id by itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI event."""
        name = REQUEST_ID.lower().encode()
        given = [pair for pair in scope.get("headers", ()) if pair[0] == name]

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair not in given]
            elif isinstance(message.get("body"), memoryview):
                message["body"] = bytes(message["body"])
            await send(message)

        await self.app(scope, receive, send_on)


class InProxy:
    """A layer of Ray's proxy, where it is let in: what a lost ingress had is answered with a 503.

    Ray leaves it without an answer, of which its web server makes a 500, as it does of headers
    that Ray cannot read.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI event."""
        begun = scope["type"] != "http"

        async def send_on(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        detail = "The process that had this request ended before answering. Send it again."
        refused = RefusedError(503, detail, {"Retry-After": "1"})
        try:
            await self.app(scope, receive, send_on)
        except UnicodeDecodeError:
            if begun:
                raise
            refused = RefusedError(400, "A header that is read here is not in UTF-8.")
        if not begun:
            given = Headers(scope=scope).get(REQUEST_ID, "")
            scope.setdefault("state", {})["request_id"] = accepted_id(given)
            await problem_response(Request(scope), refused)(scope, receive, send)


def in_proxy() -> list[Middleware]:
    """What Ray's proxy asks for, see ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``."""
    return [Middleware(InProxy)]


class RayService(Service):
    """A service whose models run in the replicas behind a deployment's handle."""

    def __init__(
        self, handle: DeploymentHandle, sources: Sequence[Path | str | Session], settings: Settings
    ) -> None:
        self._handle = handle
        self.loop: asyncio.AbstractEventLoop
        super().__init__(sources, settings)

    async def start(self) -> None:
        """As a service does, but to the end of loading its models: then Ray sends requests."""
        self.loop = asyncio.get_running_loop()
        await super().start()
        problem = await self.loaded
        if problem is not None:
            raise problem

    def _open(self, bundle: Bundle) -> Session:
        bundle.release()  # replicas read it
        return Session(bundle, ReplicaRunner(bundle, self._handle, self))

    async def run(self, version: Version, inputs: Tensors, deadline: float) -> Outcome:
        """Send images to replicas, which batch them; threads here cross images (mode 'slide')."""
        runner = version.session.runner
        assert isinstance(runner, ReplicaRunner)
        images, start = _each(inputs), time.perf_counter()
        self.scheduler.count_running(len(images))
        try:
            found = await asyncio.gather(*(runner.run(image, deadline) for image in images))
        except (BundleError, BackendError) as error:
            log.error("%s: %s", version.name, error)
            raise RefusedError(
                503,
                f"The model {version.name!r} cannot be run; the server's log says why.",
                {"Retry-After": "1"},
            ) from error
        finally:
            self.scheduler.count_running(-len(images))
        seconds, run_seconds = time.perf_counter() - start, max(ran.run_seconds for ran in found)
        for ran in found:
            if ran.first:
                self.metrics.later(self._count_batch, version.name, ran.batch, ran.run_seconds)
        # All that is not the run's is waiting: for a replica, in it, and on the way.
        return Outcome([ran.outputs for ran in found], seconds - run_seconds, run_seconds)


class ReplicaRunner(RemoteRunner):
    """Runs a bundle in replicas, which let go of it when they need the room."""

    def __init__(self, bundle: Bundle, handle: DeploymentHandle, service: RayService) -> None:
        super().__init__(f"{service.settings.backend} (Ray)", "It runs in replicas on Ray.")
        self._service = service
        self._handle = handle.options(multiplexed_model_id=model_id(bundle))

    async def run(self, image: Tensors, deadline: float) -> Ran:
        """Run one image, whose inputs have no batch axis, in a replica; if it dies, in another."""
        found: Ran = await self._ask(self._handle.run.remote, image, deadline=deadline)
        return found

    async def _ask(self, call: Callable[..., Any], *given: Any, deadline: float) -> Any:
        for again in (True, False):
            # Not more often: what ends two replicas may be the request.
            response = call(*given)
            try:
                left = deadline - time.perf_counter()
                return await asyncio.wait_for(response, None if left == float("inf") else left)
            except (RayError, RayServeException) as error:
                if isinstance(error, RayTaskError):
                    if isinstance(error.cause, FDConvError):
                        raise error.cause from None
                    if not isinstance(error.cause, RayError):
                        raise  # a fault of the replica's code
                self._service.metrics.deaths.inc()
                log.warning("a replica was lost (%s)", type(error).__name__)
                if not again:
                    lost = f"the replica ended ({type(error).__name__})"
                    raise WorkerDiedError(lost) from error
            except asyncio.TimeoutError:
                response.cancel()
                raise DeadlineError from None
            except asyncio.CancelledError:
                response.cancel()
                raise
        raise AssertionError

    def run_batches(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """See :meth:`Runner.run_batches`; not from the event loop's thread."""

        async def run() -> list[Ran]:
            limit = time.perf_counter() + self._service.settings.deadline_ms / 1e3
            return await asyncio.gather(*(self.run(image, limit) for image in _each(feeds)))

        found = self._wait(run())
        return {name: np.stack([ran.outputs[name] for ran in found]) for name in found[0].outputs}

    def warm_up(self, batch_sizes: Sequence[int] | None = None) -> None:
        """Have a replica load the bundle, if none has; not from the event loop's thread."""
        end = time.perf_counter() + _START_SECONDS
        try:
            self.operators = self._wait(self._ask(self._handle.load.remote, deadline=end))
        except (DeadlineError, WorkerDiedError) as error:
            raise BackendError(
                f"No replica had loaded the model within {_START_SECONDS:g} s.",
                "`serve status` and Ray's logs say what they wait for.",
            ) from error

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._service.loop).result()


def _each(inputs: Tensors) -> list[dict[str, npt.NDArray[Any]]]:
    """Each image's inputs, without the batch axis."""
    count = len(next(iter(inputs.values())))
    return [{name: value[n] for name, value in inputs.items()} for n in range(count)]
