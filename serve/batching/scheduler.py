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
import numpy.typing as npt
from fdconv_deploy.serve.batching.queue import Batch, BatchQueue, Item

from fdconv_deploy.runtime.batching import linear_cost

T = TypeVar("T")
Array = npt.NDArray[np.float32]
# (inputs (n, 3, H, W)) -> logits (n, classes, h, w), on an inference thread.
Run = Callable[[Array], Array]
# Takes a request back.
Withdraw = Callable[[], None]
log = logging.getLogger("fdconv.serve")


class WorkerDiedError(Exception):
    """The worker that had this request ended before it had answered; asking again may help."""


class DeadlineError(Exception):
    """The request's deadline passed before it was answered."""


@dataclass(frozen=True)
class Outcome:
    """What became of a request: ``rows`` are (classes, h, w) logits, one per image.

    Seconds are those of the image that waited and ran longest; ``batch_sizes`` say how many
    images ran with each of these.
    """

    rows: list[Any]
    queue_seconds: float
    run_seconds: float
    batch_sizes: tuple[int, ...]


# Told, once and on the event loop, what became of a request.
Done = Callable[[Outcome | Exception], None]


@dataclass(eq=False)
class _Request:
    lane: Hashable
    done: Done
    rows: list[Any]
    missing: int
    items: list[Item] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    over: bool = False
    queue_seconds: float = 0.0
    run_seconds: float = 0.0
    batch_sizes: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Row:
    """An item's payload: row ``index`` of ``source``, for place ``index`` of the request."""

    request: _Request
    source: Array
    index: int


@dataclass(eq=False)
class _Call:
    request: _Request
    call: Callable[[], Any]


# Batch, start and seconds of its run, results or an error.
_Delivery = tuple[Batch, float, float, list[Any] | None, Exception | None]
# How long, in seconds, what may wait does.
_UNHURRIED = 0.001


class Scheduler:
    """The queue, its workers, and the codec threads; used from one event loop.

    :param workers: inference threads. One that ends, whatever ended it, is replaced.
    :param on_batch: told (lane, images, seconds) after each run's answers are delivered.
    :param on_death: told when a worker ended.
    :param on_failure: told (lane, seconds since it was queued) of a request without answer.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        codec_threads: int = 2,
        max_batch: int | None = None,
        delay: float = 0.0,
        on_batch: Callable[[Hashable, int, float], None] | None = None,
        on_death: Callable[[], None] | None = None,
        on_failure: Callable[[Hashable, float], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._queue = BatchQueue(max_batch=max_batch, delay=delay)
        self._runs: dict[Hashable, Run] = {}
        self._lock = threading.Lock()
        # A token for every item: what idle workers wait for. A worker looks at the queue before
        # it waits for a token, so a token too many is harmless and none can be missed. Not a
        # Condition, whose lock the woken thread would first have to wait for.
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._clock, self._delay = clock, delay
        self._on_batch, self._on_death, self._on_failure = on_batch, on_death, on_failure
        self._workers = workers
        self._threads: dict[int, threading.Thread] = {}
        self._closing = False
        self._codecs = ThreadPoolExecutor(codec_threads, "codec")
        self._loop: asyncio.AbstractEventLoop | None = None
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
        """Open a lane whose batches ``run`` answers."""
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

    @property
    def alive(self) -> int:
        """Inference threads that live."""
        return sum(thread.is_alive() for thread in self._threads.values())

    def backlog_seconds(self) -> float:
        """How long what waits will take, as far as is known."""
        with self._lock:
            return self._queue.backlog_seconds() / self._workers

    @property
    def idle(self) -> bool:
        """Whether a worker is free and nothing waits, not even to be run with what comes."""
        return not self._queue.waiting and self.running < self._workers and not self._delay

    def submit(self, key: Hashable, inputs: Array, deadline: float, done: Done) -> Withdraw:
        """As :meth:`run`, for a caller that is no coroutine.

        :param done: told the outcome, or the exception that :meth:`run` would raise.
        :returns: a function that takes the request back; ``done`` is then not told any more.
        """
        request = _Request(key, done, [None] * len(inputs), len(inputs))
        now = self._clock()
        request.items = [
            Item(_Row(request, inputs, index), now, deadline) for index in range(len(inputs))
        ]
        return self._enter(request, deadline)

    async def run(self, key: Hashable, inputs: Array, deadline: float = float("inf")) -> Outcome:
        """Run each row of ``inputs`` (n, 3, H, W), batched with whatever else waits.

        :param deadline: in seconds of the scheduler's clock.
        :raises DeadlineError: it passed first.
        :raises WorkerDiedError: the worker ended; the request may be sent again.
        """
        return await _awaited(lambda done: self.submit(key, inputs, deadline, done))

    def submit_call(
        self, key: Hashable, call: Callable[[], Any], deadline: float, done: Done
    ) -> Withdraw:
        """As :meth:`call`, for a caller that is no coroutine; see :meth:`submit`.

        A result whose attribute ``unhurried`` is true may come a little later, and is not counted
        as a batch: its caller has no need of it, and may withdraw the request instead.
        """
        request = _Request(key, done, [None], 1)
        request.items = [Item(_Call(request, call), self._clock(), deadline, alone=True)]
        return self._enter(request, deadline)

    async def call(
        self, key: Hashable, call: Callable[[], Any], deadline: float = float("inf")
    ) -> Outcome:
        """Run ``call`` by itself on an inference thread, in turn; ``rows[0]`` is its result."""
        return await _awaited(lambda done: self.submit_call(key, call, deadline, done))

    async def code(self, call: Callable[[], T]) -> T:
        """Run ``call`` on a codec thread."""
        return await asyncio.get_running_loop().run_in_executor(self._codecs, call)

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

    def _enter(self, request: _Request, deadline: float) -> Withdraw:
        if deadline != float("inf"):
            assert self._loop is not None
            left = max(deadline - self._clock(), 0.0)
            request.timer = self._loop.call_later(left, self._settle, request, DeadlineError())
        with self._lock:
            for item in request.items:
                self._queue.push(request.lane, item)
        # The last step: a woken worker can go on only when this thread lets it.
        for _ in request.items:
            self._tokens.put(None)
        return lambda: self._withdraw(request)

    def _withdraw(self, request: _Request) -> None:
        """Forget a request; what still waits of it is not run."""
        request.over = True
        if request.timer is not None:
            request.timer.cancel()
        with self._lock:
            for item in request.items:
                self._queue.cancel(request.lane, item)
        request.items = []

    def _settle(self, request: _Request, found: Outcome | Exception) -> None:
        if request.over:
            return
        if isinstance(found, Exception):
            if self._on_failure:
                self._on_failure(request.lane, self._clock() - request.items[0].enqueued)
            self._withdraw(request)
        else:
            request.over = True
            if request.timer is not None:
                request.timer.cancel()
        # Items know their request, and an error's frames its items: as circles, all its tensors
        # would wait for the garbage collector.
        request.items = []
        done, request.done = request.done, _nobody
        done(found)

    def _start_thread(self, number: int) -> None:
        thread = threading.Thread(
            target=self._work, args=(number,), name=f"inference-{number}", daemon=True
        )
        self._threads[number] = thread
        thread.start()

    def _work(self, number: int) -> None:
        owed: list[_Delivery] = []
        while (batch := self._take(owed)) is not None:
            start = self._clock()
            try:
                results = self._answers(batch)
            except Exception as error:
                self._finish(batch, start, error=error)
            except BaseException as error:
                # Something ended this thread: another takes its place.
                log.exception("the inference thread %d ended", number)
                lost = WorkerDiedError(f"the inference thread ended ({type(error).__name__})")
                self._finish(batch, start, error=lost)
                if not self._closing:
                    self._start_thread(number)
                return
            else:
                self._finish(batch, start, results=results, owed=owed)

    def _take(self, owed: list[_Delivery]) -> Batch | None:
        while True:
            with self._lock:
                found = self._queue.pop(self._clock())
                if isinstance(found, Batch):
                    self.running += len(found.items)
            if isinstance(found, Batch) or (found is None and self._closing):
                self._pay(owed)
                return found if isinstance(found, Batch) else None
            left = None if found is None else max(found - self._clock(), 0.0)
            if owed:
                left = _UNHURRIED if left is None else min(left, _UNHURRIED)
            try:
                self._tokens.get(timeout=left)
            except queue.Empty:
                self._pay(owed)

    def _pay(self, owed: list[_Delivery]) -> None:
        """Deliver what could wait."""
        for delivery in owed:
            if not delivery[0].items[0].payload.request.over:
                self._post(delivery)
        owed.clear()

    def _post(self, delivery: _Delivery) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended; nobody waits any more
            self._loop.call_soon_threadsafe(self._deliver, *delivery)

    def _answers(self, batch: Batch) -> list[Any]:
        first = batch.items[0].payload
        if isinstance(first, _Call):
            return [first.call()]
        logits = self._runs[batch.lane](_stack([item.payload for item in batch.items]))
        return list(logits)

    def _finish(
        self,
        batch: Batch,
        start: float,
        *,
        results: list[Any] | None = None,
        error: Exception | None = None,
        owed: list[_Delivery] | None = None,
    ) -> None:
        seconds = self._clock() - start
        delivery = (batch, start, seconds, results, error)
        if owed is not None and results and _unhurried(results[0]):
            owed.append(delivery)
        else:
            # First of all: the event loop takes its time to wake up, in which the rest is done.
            self._post(delivery)
        with self._lock:
            self.running -= len(batch.items)
            self._queue.done(batch, seconds)

    def _deliver(
        self,
        batch: Batch,
        start: float,
        seconds: float,
        results: list[Any] | None,
        error: Exception | None,
    ) -> None:
        for place, item in enumerate(batch.items):
            request = item.payload.request
            if error is not None:
                self._settle(request, error)
                continue
            assert results is not None
            request.rows[getattr(item.payload, "index", 0)] = results[place]
            request.queue_seconds = max(request.queue_seconds, start - item.enqueued)
            request.run_seconds = max(request.run_seconds, seconds)
            request.batch_sizes.append(len(batch.items))
            request.missing -= 1
            if not request.missing:
                sizes = tuple(request.batch_sizes)
                outcome = Outcome(request.rows, request.queue_seconds, request.run_seconds, sizes)
                self._settle(request, outcome)
        # Counted while the answers are on their way.
        if not results or not _unhurried(results[0]):
            assert self._loop is not None
            self._loop.call_soon(self._count, batch, seconds, error)

    def _count(self, batch: Batch, seconds: float, error: Exception | None) -> None:
        if isinstance(error, WorkerDiedError) and self._on_death:
            self._on_death()
        if error is None and self._on_batch:
            self._on_batch(batch.lane, len(batch.items), seconds)


def _unhurried(result: Any) -> bool:
    return getattr(result, "unhurried", False) is True


def _stack(rows: list[_Row]) -> Array:
    """The rows as one array; a view where they lie one after another in one already."""
    first = rows[0]
    if all(
        row.source is first.source and row.index == first.index + place
        for place, row in enumerate(rows)
    ):
        return first.source[first.index : first.index + len(rows)]
    return np.stack([row.source[row.index] for row in rows])


def _nobody(found: Outcome | Exception) -> None:
    """Whom a request tells when it is over."""


async def _awaited(enter: Callable[[Done], Withdraw]) -> Outcome:
    """Enter a request, and wait for what becomes of it; taken back when cancelled."""
    future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    withdraw = enter(partial(_tell, future))
    try:
        return await future
    except asyncio.CancelledError:
        withdraw()
        raise
    finally:
        # An exception knows this frame: with them it would make a circle, as above.
        del future, withdraw


def _tell(future: asyncio.Future[Outcome], found: Outcome | Exception) -> None:
    if future.done():
        return
    if isinstance(found, Exception):
        future.set_exception(found)
    else:
        future.set_result(found)
