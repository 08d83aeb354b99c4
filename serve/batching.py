"""Which image runs when, with which others, on which worker.

Every model has a lane, served in the order of arrival. A batch holds items of one lane only, as
many as the cheapest plan over the bundle's batch sizes starts with. Between lanes, inference time
is shared out by weight (start-time fair queueing): each lane carries the time it has used divided
by its weight, the lane with the least goes next, and a lane that was idle starts from where the
others are, so that it neither pays nor saves for its absence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from fdconv_deploy.runtime import Tensors
from fdconv_deploy.runtime.batching import linear_cost, plan_batches

T = TypeVar("T")
# A network's inputs by name to its outputs by name, each with the images along its first axis.
Run = Callable[[Tensors], Tensors]
log = logging.getLogger("fdconv.serve")
# Of a new measurement of a lane's seconds per image, against those before.
_SMOOTHING = 0.2
# Seconds per image charged in advance, before any was measured: enough that workers take turns.
_UNKNOWN = 0.001


class WorkerDiedError(Exception):
    """The worker that had this request ended before it had answered; asking again may help."""


class DeadlineError(Exception):
    """The request's deadline passed before it was answered."""


class After:
    """A ``with`` block within which ``call`` is made once it has lasted so many seconds.

    Its value, if it was, is in ``late``. No generator: an error would know its frame, and so what
    ``call`` is given.
    """

    def __init__(self, seconds: float, call: Callable[..., Any], *given: Any) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self.late: Any = None
        if seconds < math.inf:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(seconds, self._call, call, *given)

    def __enter__(self) -> After:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _call(self, call: Callable[..., Any], *given: Any) -> None:
        self.late = call(*given)


def fail(answer: asyncio.Future[Any] | None, error: Exception) -> None:
    """Answer by an error, if nothing has been answered yet."""
    if answer is not None and not answer.done():
        answer.set_exception(error)


@dataclass(eq=False)
class Item:
    """One image, waiting, or a ``call`` that runs by itself; times are seconds of one clock."""

    enqueued: float
    deadline: float = math.inf
    outcome: Any = None  # of its request
    index: int = 0  # of the image among those of ``inputs``
    inputs: Tensors = field(default_factory=dict)
    call: Callable[[], Any] | None = None


@dataclass(eq=False)
class Lane:
    """A model's runs at one input size, which alone may share a batch."""

    model: str
    run: Run
    sizes: tuple[int, ...]  # of batches
    cost: Callable[[int], float] = linear_cost
    weight: float = 1.0
    waiting: deque[Item] = field(default_factory=deque)
    used: float = 0.0  # seconds of inference over weight
    running: int = 0
    seconds_per_item: float | None = None


@dataclass(eq=False)
class Batch:
    """Items of one lane that run together."""

    lane: Lane
    items: list[Item]
    charged: float


class BatchQueue:
    """The policy alone, in seconds of the caller's clock; nothing here blocks."""

    def __init__(self, *, max_batch: int | None = None, delay: float = 0.0) -> None:
        self._max_batch, self._delay = max_batch, delay
        self._lanes: list[Lane] = []
        self._clock = 0.0  # where a lane that was idle starts
        self.waiting = 0

    def add_lane(self, lane: Lane) -> None:
        """Open a lane, for those of its batch sizes that are allowed."""
        most = self._max_batch or max(lane.sizes)
        lane.sizes = tuple(n for n in lane.sizes if n <= most) or (min(lane.sizes),)
        self._lanes.append(lane)

    def remove_lane(self, lane: Lane) -> None:
        """Close a lane; whatever waits in it is forgotten."""
        self._lanes.remove(lane)
        self.waiting -= len(lane.waiting)
        lane.waiting.clear()

    def push(self, lane: Lane, item: Item) -> None:
        """Queue an item in its lane."""
        if not lane.waiting and not lane.running:
            lane.used = max(lane.used, self._clock)
        lane.waiting.append(item)
        self.waiting += 1

    def cancel(self, lane: Lane, item: Item) -> None:
        """Forget an item, if it still waits."""
        if item in lane.waiting:
            lane.waiting.remove(item)
            self.waiting -= 1

    def pop(self, now: float) -> Batch | float | None:
        """The batch to run now, else when to ask again, else None: nothing waits.

        Items past their deadline are dropped; whoever waits for them knows the deadline too.
        """
        ready: list[Lane] = []
        later: list[float] = []
        for lane in self._lanes:
            if any(item.deadline <= now for item in lane.waiting):
                kept = deque(item for item in lane.waiting if item.deadline > now)
                self.waiting -= len(lane.waiting) - len(kept)
                lane.waiting = kept
            if not lane.waiting:
                continue
            first = lane.waiting[0]
            full = len(lane.waiting) >= max(lane.sizes) or first.call is not None
            ready_at = first.enqueued + (0.0 if full else self._delay)
            if ready_at > now:
                later.append(ready_at)
            else:
                ready.append(lane)
        if not ready:
            return min(later, default=None)
        chosen = min(ready, key=lambda lane: lane.used)
        self._clock = max(self._clock, chosen.used)
        items = self._take(chosen)
        # Charged in advance by what it cost before, so that several workers do not all
        # choose the lane whose bill has not come yet; `done` settles the difference.
        charged = (chosen.seconds_per_item or _UNKNOWN) * len(items)
        chosen.used += charged / chosen.weight
        chosen.running += 1
        return Batch(chosen, items, charged)

    def done(self, batch: Batch, seconds: float) -> None:
        """Say what a batch took; its lane is charged for it."""
        lane = batch.lane
        lane.running -= 1
        lane.used += (seconds - batch.charged) / lane.weight
        each, before = seconds / len(batch.items), lane.seconds_per_item
        lane.seconds_per_item = each if before is None else before + _SMOOTHING * (each - before)

    def _take(self, lane: Lane) -> list[Item]:
        most, together, count = min(len(lane.waiting), max(lane.sizes)), 0, 1
        while together < most and lane.waiting[together].call is None:
            together += 1
        if together > 1:
            count = min(plan_batches(together, lane.sizes, lane.cost)[0], together)
        self.waiting -= count
        return [lane.waiting.popleft() for _ in range(count)]


@dataclass(eq=False)
class Outcome:
    """The answer to a request."""

    rows: list[Any]  # each image's outputs by name, without their batch axis
    queue_seconds: float = 0.0  # of the image that waited longest
    run_seconds: float = 0.0  # of the one that ran longest
    missing: int = 0  # images that have not run yet
    awaited: asyncio.Future[Outcome] | None = None  # while it is, until all have run


class Scheduler:
    """The queue, its workers, and the codec threads; used from one event loop.

    A worker that ends, whatever ended it, is replaced, and ``on_death`` called. ``on_batch`` is
    called with (model, images, seconds) after each run.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        codec_threads: int = 2,
        max_batch: int | None = None,
        delay: float = 0.0,
        on_batch: Callable[[str, int, float], None] = lambda *_: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._queue = BatchQueue(max_batch=max_batch, delay=delay)
        self._lock = threading.Lock()
        # A token for every item: what idle workers wait for. A worker looks at the queue before
        # it waits for a token, so a token too many is harmless and none can be missed. Not a
        # Condition, whose lock the woken thread would first have to wait for.
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._clock = time.perf_counter  # of which deadlines are a time
        self._on_batch, self._on_death = on_batch, on_death
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

    def add_lane(self, lane: Lane) -> None:
        """Open a lane."""
        with self._lock:
            self._queue.add_lane(lane)

    def remove_lane(self, lane: Lane) -> None:
        """Close a lane in which nothing waits any more."""
        with self._lock:
            self._queue.remove_lane(lane)

    @property
    def waiting(self) -> int:
        """Images queued and not yet running."""
        return self._queue.waiting

    def count_running(self, images: int) -> None:
        """Count images in, or out, that are run elsewhere."""
        with self._lock:
            self.running += images

    async def run(self, lane: Lane, inputs: Tensors, deadline: float = math.inf) -> Outcome:
        """Run each image of ``inputs``, batched with whatever else waits in the lane."""
        count, now = len(next(iter(inputs.values()))), self._clock()
        outcome = Outcome([None] * count, missing=count)
        items = [Item(now, deadline, outcome, index, inputs) for index in range(count)]
        return await self._answer(lane, outcome, items)

    async def call(
        self, lane: Lane, call: Callable[[], Any], deadline: float = math.inf
    ) -> Outcome:
        """Run ``call`` by itself on an inference thread, in turn; ``rows[0]`` is its result."""
        outcome = Outcome([None], missing=1)
        item = Item(self._clock(), deadline, outcome, call=call)
        return await self._answer(lane, outcome, [item])

    async def code(
        self,
        call: Callable[[], T],
        deadline: float = math.inf,
        on_leave: Callable[[Future[T]], None] = lambda _: None,
    ) -> T:
        """Run ``call`` on a codec thread, to a deadline in seconds of the scheduler's clock.

        ``on_leave`` is called with one that is not waited for any more, after the deadline or a
        cancellation: if it has begun it goes on, and what it uses is in use until it ends.
        """
        running = self._codecs.submit(call)
        answer = asyncio.wrap_future(running, loop=self._loop)
        with After(deadline - self._clock(), answer.cancel) as limit:
            try:
                return await answer
            except asyncio.CancelledError:
                on_leave(running)
                if limit.late:
                    raise DeadlineError from None
                raise

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

    async def _answer(self, lane: Lane, outcome: Outcome, items: list[Item]) -> Outcome:
        outcome.awaited = answer = self._loop.create_future()
        try:
            with After(items[0].deadline - items[0].enqueued, fail, answer, DeadlineError()):
                with self._lock:
                    for item in items:
                        self._queue.push(lane, item)
                # The last step: a woken worker can go on only when this thread lets it.
                for _ in items:
                    self._tokens.put(None)
                return await answer
        except BaseException:
            # What still waits of it is not run.
            with self._lock:
                for item in items:
                    self._queue.cancel(lane, item)
            raise
        finally:
            # An error knows this frame, and a batch its outcomes: as circles, all their tensors
            # would wait for the garbage collector.
            outcome.awaited = None
            del outcome, items, answer

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
                self._finish(batch, start, _results(batch))
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
                fail(item.outcome.awaited, found)
            return
        for item, row in zip(batch.items, found, strict=True):
            outcome = item.outcome
            outcome.rows[item.index] = row
            outcome.queue_seconds = max(outcome.queue_seconds, start - item.enqueued)
            outcome.run_seconds = max(outcome.run_seconds, seconds)
            outcome.missing -= 1
            if not outcome.missing and (answer := outcome.awaited) and not answer.done():
                answer.set_result(outcome)
        self._on_batch(batch.lane.model, len(batch.items), seconds)


def _results(batch: Batch) -> list[Any]:
    """What each of a batch's items is answered with."""
    items = batch.items
    if (call := items[0].call) is not None:
        return [call()]
    inputs, start, count = items[0].inputs, items[0].index, len(items)
    if all(item.inputs is inputs and item.index == start + n for n, item in enumerate(items)):
        # One after another in one request's: views.
        stacked = {name: value[start : start + count] for name, value in inputs.items()}
    else:
        stacked = {n: np.stack([one.inputs[n][one.index] for one in items]) for n in inputs}
    outputs = batch.lane.run(stacked)
    return [{name: value[n] for name, value in outputs.items()} for n in range(count)]
