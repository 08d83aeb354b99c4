"""The model's deployment: bundles opened and run, in batches of one input size."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
from ray import serve

from fdconv_deploy.errors import BackendError, BundleError
from fdconv_deploy.runtime import Bundle, Session, Tensors, open_session
from fdconv_deploy.serve.model_repository import bundles_of
from fdconv_deploy.serve.settings import RaySettings

log = logging.getLogger("fdconv.serve")


class Ran(NamedTuple):
    """A replica's answer for one image."""

    outputs: dict[str, npt.NDArray[Any]]  # the network's, by name, without their batch axis
    run_seconds: float  # of its batch
    batch: int  # images in that
    first: bool  # of them; by its answer the batch is counted


class _Loaded(NamedTuple):
    """An opened bundle, and what batches its images, by input size (height, width)."""

    session: Session
    lanes: dict[tuple[int, int], Callable[[Session, Tensors], Awaitable[Ran]]]


def model_id(bundle: Bundle) -> str:
    """What a bundle is called among replicas: what it holds, and where it is.

    A replica that finds something else there does not answer for it.
    """
    manifest = bundle.manifest.model_dump_json().encode()
    # Quoted: Ray tells its controller of names in ASCII only.
    return f"{hashlib.sha256(manifest).hexdigest()}:{quote(str(bundle.path))}"


class Model:
    """A replica, which runs one batch at a time and may hold several models."""

    async def __init__(self, settings: RaySettings) -> None:  # type: ignore[misc]  # Ray awaits it
        self._settings = settings
        self._inference = ThreadPoolExecutor(1, "inference")
        self._since: float | None = None  # the run under way began

        async def load(model: str) -> _Loaded:
            return await self._load(model)

        most = settings.models_per_replica
        self._model = serve.multiplexed(max_num_models_per_replica=most)(load)
        if settings.load == "start":  # before it is sent anything
            for path in [path for source in settings.bundles for path in bundles_of(source)][:most]:
                await self._preload(path)

    async def _preload(self, path: Path) -> None:
        """Load a bundle, if it can be: one that is gone keeps no replica from the others.

        Nor from saying so. Where it keeps the service from starting, the ingress says it.
        """
        try:
            await self._model(model_id(Bundle.open(path, verify=False)))
        except (BundleError, BackendError) as error:
            log.error("%s", error)

    async def load(self) -> str:
        """Load the model that the call is for; its ``operators``."""
        found = await self._model(serve.get_multiplexed_model_id())
        return str(found.session.operators)

    async def run(self, inputs: Tensors) -> Ran:
        """Run one image, whose inputs have no batch axis, through the model the call is for."""
        model = await self._model(serve.get_multiplexed_model_id())
        size = inputs["images"].shape[1:]
        return await model.lanes[size](model.session, inputs)

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica whose run does not end."""
        since, limit = self._since, self._settings.run_timeout_seconds
        if since is not None and time.perf_counter() - since > limit:
            raise BackendError(f"A run has not ended within {limit:g} s.")

    async def _load(self, model: str) -> _Loaded:
        settings = self._settings

        def opened() -> Session:
            path = unquote(model.partition(":")[2])
            bundle = Bundle.open(path, verify=settings.verify, hold=True)
            if model_id(bundle) != model:
                raise BundleError(
                    f"The bundle {path} is another one than the ingress has opened. Deploy again, "
                    "or let it look for changes (reload_seconds)."
                )
            session = open_session(bundle, settings.backend, threads=settings.threads, verify=False)
            session.warm_up()
            return session

        session = await asyncio.get_running_loop().run_in_executor(None, opened)
        largest = min(settings.max_batch or session.batch_sizes[-1], session.batch_sizes[-1])
        batched = serve.batch(
            max_batch_size=largest, batch_wait_timeout_s=settings.batch_delay_ms / 1e3
        )
        return _Loaded(session, {size: batched(self._together()) for size in session.sizes})

    def _together(self) -> Callable[[list[Session], list[Tensors]], Awaitable[list[Ran]]]:
        """A new function for ``serve.batch``, which keeps a queue for each.

        It is told the session, which is the same for all: Ray never lets go of the function.
        """

        async def run_together(sessions: list[Session], inputs: list[Tensors]) -> list[Ran]:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._inference, self._run, sessions[0], inputs)

        return run_together

    def _run(self, session: Session, inputs: list[Tensors]) -> list[Ran]:
        began = self._since = time.perf_counter()
        try:
            feeds = {name: np.stack([one[name] for one in inputs]) for name in inputs[0]}
            outputs = session.run_batches(feeds)
        finally:
            self._since = None
        seconds, count = time.perf_counter() - began, len(inputs)
        return [
            Ran({k: v[n] for k, v in outputs.items()}, seconds, count, first=not n)
            for n in range(count)
        ]
