"""What one application holds while it runs, and the one way of a model's requests through it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fdconv_deploy.errors import FDConvError, ImageError
from fdconv_deploy.runtime import Bundle, Session, Tensors, open_session
from fdconv_deploy.serve.admission import Admission, Memory
from fdconv_deploy.serve.batching import Lane, Outcome, Scheduler
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.kserve.metadata import ModelStatistics, ModelStatisticsList
from fdconv_deploy.serve.model_repository import Model, Repository, Version
from fdconv_deploy.serve.settings import Settings
from fdconv_deploy.serve.telemetry import Metrics, Stages, Tracing
from fdconv_deploy.serve.workers import Children, WorkerRunner

T = TypeVar("T")
log = logging.getLogger("fdconv.serve")
NO_LIMIT = 1e9  # milliseconds, the most that X-Timeout-Ms takes


@dataclass(eq=False)
class Work:
    """What an admitted request may use: its model's version, memory, and threads, by a deadline."""

    service: Service
    version: Version
    memory: Memory
    deadline: float

    def code(self, call: Callable[[], T]) -> Awaitable[T]:
        """Run ``call`` on a codec thread; the memory is held until it has ended."""
        scheduler = self.service.scheduler
        return scheduler.code(call, deadline=self.deadline, on_leave=self.memory.hold)

    def run(self, inputs: Tensors) -> Awaitable[Outcome]:
        """Run the network on images, (N, C, H, W) of one of its sizes, and what else it takes."""
        return self.service.run(self.version, inputs, self.deadline)

    def call(self, call: Callable[[], Any]) -> Awaitable[Outcome]:
        """Run ``call`` by itself, in turn with runs of the network's first size."""
        lane = self.version.lanes[self.version.session.input_size]
        return self.service.scheduler.call(lane, call, self.deadline)


class Service:
    """The models, the threads, the counters, and whether they are ready; see ``create_app``.

    Attributes:
        ready: Every model that is to be is loaded, and the service is not stopping.
        draining: It is about to stop: it still answers, and closes connections after answers.
        loaded: What kept a model from being loaded at the start, or None.
    """

    def __init__(self, sources: Sequence[Path | str | Session], settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.statistics: dict[str, ModelStatistics] = {}
        self.tracing = Tracing(settings.tracing)
        self.children = Children(settings) if settings.isolation == "process" else None
        self.scheduler = Scheduler(
            workers=settings.workers,
            codec_threads=settings.codec_threads,
            max_batch=settings.max_batch,
            delay=settings.batch_delay_ms / 1e3,
            on_batch=partial(self.metrics.later, self._count_batch),
            on_death=self.metrics.deaths.inc,
        )
        self.repository = Repository(
            sources,
            settings,
            open_version=self._open,
            on_load=self._loaded,
            on_close=self._closing,
        )
        self.admission = Admission(
            settings, lambda reason: self.metrics.rejected.labels(reason).inc()
        )
        self._unready = "The models are still being loaded. Try again in a moment."
        self.ready = self.draining = False
        self._tasks: list[asyncio.Task[Any]] = []
        watch = self.metrics.watch
        watch("fdconv_queue_images", "Images waiting to run.", lambda: self.scheduler.waiting)
        watch("fdconv_running_images", "Images being run.", lambda: self.scheduler.running)
        watch("fdconv_in_hand_images", "Images admitted.", lambda: self.admission.in_hand)
        used = "Bytes of memory that admitted requests may need."
        watch("fdconv_memory_bytes", used, lambda: self.admission.memory_used)
        watch("fdconv_body_bytes", "Bytes of requests in hand.", lambda: self.admission.body_bytes)
        watch("fdconv_ready", "1 when ready for requests.", lambda: self.ready)

    async def start(self) -> None:
        """Start the threads, and load models beside the event loop."""
        if self.children is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.children.start)
        self.scheduler.start()
        self.loaded = asyncio.create_task(self._warm_up())
        self._tasks.append(self.loaded)
        if self.settings.reload_seconds:
            self._tasks.append(asyncio.create_task(self._watch_bundles()))

    async def answer(
        self,
        model: Model,
        client: str,
        images: int,
        deadline: float,
        work: Callable[[Work], Awaitable[T]],
    ) -> T:
        """Admit a client's request, and do its ``work``, or refuse it.

        Its model is loaded first where it is not; the deadline is on the scheduler's clock.
        """
        with (
            self.admission.admit(client, images, deadline),
            await self.repository.lease(model, deadline) as version,
            Memory(self.admission) as memory,
        ):
            start = time.perf_counter()
            try:
                return await work(Work(self, version, memory, deadline))
            except (RefusedError, ImageError):  # by its client's fault
                raise
            except Exception:
                self.statistics[version.name].failed(time.perf_counter() - start)
                raise

    def run(self, version: Version, inputs: Tensors, deadline: float) -> Awaitable[Outcome]:
        """See :meth:`Work.run`."""
        return self.scheduler.run(version.lanes[inputs["images"].shape[2:]], inputs, deadline)

    def check_ready(self) -> None:
        """Refuse with a 503 while models are loading, or when one did not load."""
        if not self.ready:
            raise RefusedError(503, self._unready, self.admission.retry_after())

    def check_loaded(self) -> None:
        """As :meth:`check_ready`, but a service about to stop still answers."""
        if not self.draining:
            self.check_ready()

    def deadline(self, *wanted_ms: float | None, arrived: float | None = None) -> float:
        """When a request that ``arrived`` then, or now, must be answered: by the scheduler's clock.

        The client's limits are in milliseconds; None and 0 are none.
        """
        start = time.perf_counter() if arrived is None else arrived
        return start + min(self.settings.deadline_ms, *filter(None, wanted_ms), NO_LIMIT) / 1e3

    def count(self, model: str, stages: Stages, images: int = 1) -> None:
        """Count an answered request and its seconds by stage."""
        self.statistics[model].succeeded(stages, images)
        self.metrics.images.labels(model).inc(images)
        for stage, seconds in stages:
            self.metrics.stage_seconds.labels(model, stage).observe(seconds)

    def model_statistics(self, name: str = "", version: str = "") -> ModelStatisticsList:
        """What a model, or each of them, has done since it was loaded; of those that are."""
        models = [self.repository.get(name, version)] if name else list(self.repository)
        loaded = [model.name for model in models if model.version is not None]
        self.metrics.settle()
        return ModelStatisticsList(model_stats=[self.statistics[name] for name in loaded])

    async def load_model(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load a model, or again where its bundle has changed, if the operator lets clients do so.

        Triton's parameters "config" and "file:..." ask for another model than the bundle holds.
        """
        self._check_control()
        for key in parameters:
            if key == "config" or key.startswith("file:"):
                raise RefusedError(
                    400,
                    f"A model is loaded as its bundle says, without the parameter {key[:60]!r}. "
                    "Put another bundle in its place.",
                )
        try:
            await self.repository.load(self.repository.get(name))
        except FDConvError as error:
            raise RefusedError(
                400, f"The model {name!r} does not load; the server's log says why."
            ) from error

    async def unload_model(self, name: str) -> None:
        """Unload a model, as :meth:`load_model`."""
        self._check_control()
        await self.repository.unload(self.repository.get(name))

    def _check_control(self) -> None:
        if not self.settings.model_control:
            raise RefusedError(
                403,
                "Clients may not load or unload models here. Start the service with "
                "--model-control to allow it.",
            )

    def drain(self) -> None:
        """Become unready, so that nobody sends more; what comes all the same is answered."""
        self.ready, self._unready = False, "The service is stopping."
        self.draining = True

    async def close(self) -> None:
        """Finish what was begun; let go of models and threads."""
        self.drain()
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.scheduler.close()
        await self.repository.close()
        if self.children is not None:
            self.children.close()
        await asyncio.get_running_loop().run_in_executor(None, self.tracing.close)

    async def _warm_up(self) -> Exception | None:
        try:
            await self.repository.start()
        except Exception as error:
            # The process stays up and unready: whoever runs it sees why, in its log.
            log.error("a model failed to start: %s", error, exc_info=error)
            self._unready = "A model failed to start; the server's log says why."
            return error
        self.ready = not self.draining
        return None

    async def _watch_bundles(self) -> None:
        while True:
            await asyncio.sleep(self.settings.reload_seconds)
            try:
                await self.repository.poll()
            except Exception:
                log.exception("looking for changed bundles failed")

    def _open(self, bundle: Bundle) -> Session:
        if self.children is not None:
            return Session(bundle, WorkerRunner(bundle, self.settings, self.children))
        return open_session(
            bundle, self.settings.backend, threads=self.settings.threads, verify=False
        )

    def _loaded(self, version: Version) -> None:
        session, name = version.session, version.name
        self.admission.forget_pace()
        self.metrics.settle()  # of the version before
        for size in session.sizes:
            lane = version.lanes[size] = Lane(
                name,
                lambda inputs: session.run_batches(inputs),
                session.batch_sizes,
                session.runner.batch_cost,
                self.settings.weights.get(name, 1.0),
            )
            self.scheduler.add_lane(lane)
        self.statistics[name] = ModelStatistics(name=name, version=version.card.version)
        self.metrics.loads.labels(name).inc()
        self.metrics.model_bytes.labels(name).set(version.card.bytes)

    def _closing(self, version: Version) -> None:
        for lane in version.lanes.values():
            self.scheduler.remove_lane(lane)
        if not self.repository.is_ready(version.name):
            self.metrics.model_bytes.remove(version.name)

    def _count_batch(self, model: str, images: int, seconds: float) -> None:
        self.metrics.batch_size.labels(model).observe(images)
        self.statistics[model].ran(images, seconds)


def timeout_of(header: str | None) -> float | None:
    """The milliseconds of an ``X-Timeout-Ms`` header, from 1 to ``NO_LIMIT``; None without one."""
    try:
        found = None if header is None else float(header)
    except ValueError:
        found = 0.0
    if found is None or 1 <= found <= NO_LIMIT:
        return found
    raise RefusedError(
        422,
        f"X-Timeout-Ms is a time limit in milliseconds, from 1 to {NO_LIMIT:.0f}; found "
        f"{str(header)[:40]!r}.",
    )
