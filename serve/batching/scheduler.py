"""Inference threads fed from a :class:`BatchQueue`, awaited from one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fdconv_deploy.serve.batching.queue import Batch, BatchQueue, Item

from fdconv_deploy.runtime import Tensors
from fdconv_deploy.runtime.batching import linear_cost

T = TypeVar("T")
# A network's inputs by name to its outputs by name, each with the images along its first axis.
Run = Callable[[Tensors], Tensors]
log = logging.getLogger("fdconv.serve")


class WorkerDiedError(Exception):
    """The worker that had this request ended before it had answered; asking again may help."""


class DeadlineError(Exception):
    """The request's deadline passed before it was answered."""


@dataclass(eq=False)
class Outcome:
    """The answer to a request.

    ``rows`` are each image's outputs by name, without their batch axis; seconds are those of the
    image that waited and ran longest; ``batch_sizes`` say how many images ran with each of these.
    """

    rows: list[Any]
    queue_seconds: float = 0.0
    run_seconds: float = 0.0
    batch_sizes: tuple[int, ...] = ()


@dataclass(eq=False)
class _Request:
    answer: asyncio.Future[Outcome] | None  # None once it is over
    missing: int

    def __post_init__(self) -> None:
        self.outcome = Outcome([None] * self.missing)


@dataclass(eq=False)
class _Job:
    """An item's payload: image ``index`` of ``inputs``, or a call that is run by itself."""

    request: _Request
    index: int = 0
    inputs: Tensors = field(default_factory=dict)
    call: Callable[[], Any] | None = None


class Scheduler:
    """The queue, its workers, and the codec threads; used from one event loop.

    Args:
        workers: Inference threads. One that ends, whatever ended it, is replaced.
        codec_threads: Threads that decode and encode images.
        max_batch: The largest batch; a lane's own largest size when None.
        delay: Seconds that the first of a batch that is not full waits for others.
        on_batch: Called with (lane, images, seconds) after each run.
        on_death: Called when a worker ended.
        on_failure: Called with (lane, seconds since it was queued) for a request without answer.
        clock: Seconds, of which deadlines are a time.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        codec_threads: int = 2,
        max_batch: int | None = None,
        delay: float = 0.0,
        on_batch: Callable[[Hashable, int, float], None] = lambda *_: None,
        on_death: Callable[[], None] = lambda: None,
        on_failure: Callable[[Hashable, float], None] = lambda *_: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._queue = BatchQueue(max_batch=max_batch, delay=delay)
        self._runs: dict[Hashable, Run] = {}
        self._lock = threading.Lock()
        # A token for every item: what idle workers wait for. A worker looks at the queue before
        # it waits for a token, so a token too many is harmless and none can be missed. Not a
        # Condition, whose lock the woken thread would first have to wait for.
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._clock = clock
        self._on_batch, self._on_death, self._on_failure = on_batch, on_death, on_failure
        self._workers = workers
        self._threads: dict[int, threading.Thread] = {}
        self._closing = False
        self._codecs = ThreadPoolExecutor(codec_threads, "codec")
        self._loop: asyncio.AbstractEventLoop
        self.running = 0

    def start(self) -> None:
        """Start the threads; called on the event loop that will await the answers."""
        self._loop = asyncio.get_running_loop()
        for number in range(self._workers):
            self._start_thread(number)

    def add_lane(
        self,
        key: Hashable,
        run: Run,
        sizes: Sequence[int],
        *,
        cost: Callable[[int], float] = linear_cost,
        weight: float = 1.0,
    ) -> None:
        """Open a lane, whose batches ``run`` answers."""
        with self._lock:
            self._runs[key] = run
            self._queue.add_lane(key, sizes, cost=cost, weight=weight)

    def remove_lane(self, key: Hashable) -> None:
        """Close a lane in which nothing waits any more."""
        with self._lock:
            self._queue.remove_lane(key)
            del self._runs[key]

    @property
    def waiting(self) -> int:
        """Images queued and not yet running."""
        return self._queue.waiting

    def backlog_seconds(self) -> float:
        """How long what waits will take, as far as is known."""
        with self._lock:
            return self._queue.backlog_seconds() / self._workers

    async def run(self, key: Hashable, inputs: Tensors, deadline: float = float("inf")) -> Outcome:
        """Run each image of ``inputs``, batched with whatever else waits.

        Args:
            key: The lane.
            inputs: What its ``run`` takes.
            deadline: In seconds of the scheduler's clock.

        Raises:
            DeadlineError: It passed first.
            WorkerDiedError: The worker ended; the request may be sent again.
        """
        count = len(next(iter(inputs.values())))
        request = _Request(self._loop.create_future(), count)
        jobs = [_Job(request, index, inputs) for index in range(count)]
        return await self._answer(key, request, jobs, deadline)

    async def call(
        self, key: Hashable, call: Callable[[], Any], deadline: float = float("inf")
    ) -> Outcome:
        """Run ``call`` by itself on an inference thread, in turn; ``rows[0]`` is its result."""
        request = _Request(self._loop.create_future(), 1)
        return await self._answer(key, request, [_Job(request, call=call)], deadline)

    async def code(self, call: Callable[[], T]) -> T:
        """Run ``call`` on a codec thread."""
        return await self._loop.run_in_executor(self._codecs, call)

    def close(self) -> None:
        """Run what waits, then end the threads."""
        with self._lock:
            self._closing = True
        for _ in self._threads:
            self._tokens.put(None)
        while self._threads:
            _, thread = self._threads.popitem()
            thread.join()
        self._codecs.shutdown(wait=True)

    async def _answer(
        self, lane: Hashable, request: _Request, jobs: list[_Job], deadline: float
    ) -> Outcome:
        now, timer = self._clock(), None
        items = [Item(job, now, deadline, alone=job.call is not None) for job in jobs]
        if deadline != float("inf"):
            timer = self._loop.call_later(max(deadline - now, 0.0), _fail, request, DeadlineError())
        with self._lock:
            for item in items:
                self._queue.push(lane, item)
        # The last step: a woken worker can go on only when this thread lets it.
        for _ in items:
            self._tokens.put(None)
        assert request.answer is not None
        try:
            return await request.answer
        except BaseException as error:
            # What still waits of it is not run.
            with self._lock:
                for item in items:
                    self._queue.cancel(lane, item)
            if not isinstance(error, asyncio.CancelledError):
                self._on_failure(lane, self._clock() - now)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            # An error knows this frame, and a batch its requests: as circles, all their tensors
            # would wait for the garbage collector.
            request.answer = None
            del request, jobs, items

    def _start_thread(self, number: int) -> None:
        thread = threading.Thread(
            target=self._work, args=(number,), name=f"inference-{number}", daemon=True
        )
        self._threads[number] = thread
        thread.start()

    def _work(self, number: int) -> None:
        while (batch := self._take()) is not None:
            start = self._clock()
            try:
                self._finish(batch, start, self._results(batch))
            except Exception as error:
                self._finish(batch, start, error)
            except BaseException as error:
                # Something ended this thread: another takes its place.
                log.exception("the inference thread %d ended", number)
                lost = WorkerDiedError(f"the inference thread ended ({type(error).__name__})")
                self._finish(batch, start, lost)
                if not self._closing:
                    self._start_thread(number)
                return

    def _take(self) -> Batch | None:
        while True:
            with self._lock:
                found = self._queue.pop(self._clock())
                if isinstance(found, Batch):
                    self.running += len(found.items)
                    return found
            if found is None and self._closing:
                return None
            with contextlib.suppress(queue.Empty):
                left = None if found is None else max(found - self._clock(), 0.0)
                self._tokens.get(timeout=left)

    def _results(self, batch: Batch) -> list[Any]:
        jobs: list[_Job] = [item.payload for item in batch.items]
        if jobs[0].call is not None:
            return [jobs[0].call()]
        outputs = self._runs[batch.lane](_stack(jobs))
        return [{name: value[n] for name, value in outputs.items()} for n in range(len(jobs))]

    def _finish(self, batch: Batch, start: float, found: list[Any] | Exception) -> None:
        seconds = self._clock() - start
        # First of all: the event loop takes its time to wake up, in which the rest is done.
        with contextlib.suppress(RuntimeError):  # the loop has ended; nobody waits any more
            self._loop.call_soon_threadsafe(self._deliver, batch, start, seconds, found)
        with self._lock:
            self.running -= len(batch.items)
            self._queue.done(batch, seconds)

    def _deliver(
        self, batch: Batch, start: float, seconds: float, found: list[Any] | Exception
    ) -> None:
        if isinstance(found, WorkerDiedError):
            self._on_death()
        if isinstance(found, Exception):
            for item in batch.items:
                _fail(item.payload.request, found)
            return
        for item, row in zip(batch.items, found, strict=True):
            request: _Request = item.payload.request
            outcome = request.outcome
            outcome.rows[item.payload.index] = row
            outcome.queue_seconds = max(outcome.queue_seconds, start - item.enqueued)
            outcome.run_seconds = max(outcome.run_seconds, seconds)
            outcome.batch_sizes += (len(batch.items),)
            request.missing -= 1
            if not request.missing and request.answer is not None and not request.answer.done():
                request.answer.set_result(outcome)
        # Counted when the answers are on their way: uvloop writes after a round of callbacks.
        count = partial(self._on_batch, batch.lane, len(batch.items), seconds)
        self._loop.call_soon(self._loop.call_soon, count)


def _fail(request: _Request, error: Exception) -> None:
    if request.answer is not None and not request.answer.done():
        request.answer.set_exception(error)


def _stack(jobs: list[_Job]) -> Tensors:
    """The images' inputs together; views where they lie one after another in one request's."""
    inputs, start = jobs[0].inputs, jobs[0].index
    if all(job.inputs is inputs and job.index == start + n for n, job in enumerate(jobs)):
        return {name: value[start : start + len(jobs)] for name, value in inputs.items()}
    return {name: np.stack([job.inputs[name][job.index] for job in jobs]) for name in inputs}
