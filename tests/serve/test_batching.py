"""The policy, parameter by parameter, on a clock of the test's own; and the threads: what is
awaited gets its answer, whatever happens to a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest

from fdconv_deploy.runtime.batching import measured_cost
from fdconv_deploy.serve.batching import (
    Batch,
    BatchQueue,
    DeadlineError,
    Item,
    Lane,
    Scheduler,
    WorkerDiedError,
)


def opened(
    queue: BatchQueue | Scheduler, name: str, sizes: tuple[int, ...], run=print, **share
) -> Lane:
    lane = Lane(name, run, sizes, **share)
    queue.add_lane(lane)
    return lane


def filled(queue: BatchQueue, lane: Lane, *names: str, at: float = 0.0, **options) -> list[Item]:
    items = [Item(at, outcome=name, **options) for name in names]
    for item in items:
        queue.push(lane, item)
    return items


def names(found: Batch | float | None) -> list[str]:
    assert isinstance(found, Batch), found
    return [item.outcome for item in found.items]


def drained(queue: BatchQueue, *, seconds_per_item: float = 1.0, now: float = 0.0) -> list[str]:
    """Lanes in the order in which they are served, by one worker."""
    order = []
    while isinstance(batch := queue.pop(now), Batch):
        order.append(batch.lane.model)
        queue.done(batch, seconds_per_item * len(batch.items))
    return order


class TestBatches:
    def test_nothing_waits(self) -> None:
        queue = BatchQueue()
        assert queue.pop(0.0) is None
        opened(queue, "a", (1, 4))
        assert queue.pop(0.0) is None

    @pytest.mark.parametrize(
        ("waiting", "sizes", "batches"),
        [
            (1, (1, 4), [1]),
            (3, (1, 4), [1, 1, 1]),
            (4, (1, 4), [4]),
            (6, (1, 4), [4, 1, 1]),
            (9, (1, 2, 4), [4, 4, 1]),
            (3, (2,), [2, 1]),
        ],
    )
    def test_sizes_of_the_bundle(self, waiting: int, sizes, batches: list[int]) -> None:
        queue = BatchQueue()
        a = opened(queue, "a", sizes)
        filled(queue, a, *map(str, range(waiting)))
        found = []
        while isinstance(batch := queue.pop(0.0), Batch):
            found.append(batch)
        assert [len(batch.items) for batch in found] == batches
        assert [name for batch in found for name in names(batch)] == list(map(str, range(waiting)))
        assert queue.waiting == 0

    def test_cost_decides_whether_a_batch_is_padded(self) -> None:
        """Where a call is dear and images are cheap, three run in one batch of four."""
        queue = BatchQueue()
        gpu = opened(queue, "gpu", (1, 4), cost=lambda batch: 5 + 0.1 * batch)
        filled(queue, gpu, "x", "y", "z")
        assert names(queue.pop(0.0)) == ["x", "y", "z"]

    @pytest.mark.parametrize(("four", "batches"), [(4.4, [1, 1, 1, 1]), (3.7, [4])])
    def test_a_batch_measured_to_be_dear_is_not_made(self, four, batches: list[int]) -> None:
        queue = BatchQueue()
        a = opened(queue, "a", (1, 4), cost=measured_cost({1: 0.2, 4: 0.2 * four}))
        filled(queue, a, *"wxyz")
        assert [len(names(queue.pop(0.0))) for _ in batches] == batches
        assert queue.waiting == 0

    def test_max_batch(self) -> None:
        queue = BatchQueue(max_batch=2)
        a = opened(queue, "a", (1, 2, 4))
        filled(queue, a, *"wxyz")
        assert [len(names(queue.pop(0.0))) for _ in range(2)] == [2, 2]

    def test_max_batch_below_the_smallest_graph(self) -> None:
        queue = BatchQueue(max_batch=1)
        a = opened(queue, "a", (4,))
        filled(queue, a, *"wxyz")
        assert len(names(queue.pop(0.0))) == 4

    def test_never_of_two_models(self) -> None:
        queue = BatchQueue()
        for name in "ab":
            filled(queue, opened(queue, name, (4,)), f"{name}1", f"{name}2")
        assert sorted([names(queue.pop(0.0)), names(queue.pop(0.0))]) == [
            ["a1", "a2"],
            ["b1", "b2"],
        ]

    def test_alone(self) -> None:
        queue = BatchQueue()
        a = opened(queue, "a", (4,))
        filled(queue, a, "1", "2")
        filled(queue, a, "slide", call=print)
        filled(queue, a, "3")
        assert [names(queue.pop(0.0)) for _ in range(3)] == [["1", "2"], ["slide"], ["3"]]


class TestDelay:
    def test_without_a_delay_nobody_waits(self) -> None:
        queue = BatchQueue(delay=0.0)
        a = opened(queue, "a", (1, 4))
        filled(queue, a, "x", at=10.0)
        assert names(queue.pop(10.0)) == ["x"]

    def test_the_oldest_waits_so_long_and_no_longer(self) -> None:
        queue = BatchQueue(delay=0.5)
        a = opened(queue, "a", (4,))
        filled(queue, a, "x", at=10.0)
        assert queue.pop(10.0) == 10.5
        filled(queue, a, "y", at=10.4)
        assert queue.pop(10.4) == 10.5
        assert names(queue.pop(10.5)) == ["x", "y"]

    def test_a_full_batch_does_not_wait(self) -> None:
        queue = BatchQueue(delay=0.5)
        a = opened(queue, "a", (2,))
        filled(queue, a, "x", "y", at=10.0)
        assert names(queue.pop(10.0)) == ["x", "y"]

    def test_a_model_that_waits_does_not_hold_up_another(self) -> None:
        queue = BatchQueue(delay=0.5)
        a = opened(queue, "a", (4,))
        b = opened(queue, "b", (1,))
        filled(queue, a, "x", at=10.0)
        filled(queue, b, "y", at=10.0)
        assert names(queue.pop(10.0)) == ["y"]
        assert queue.pop(10.0) == 10.5


class TestFairness:
    def test_time_is_shared_not_requests(self) -> None:
        """A model three times as slow gets a third of the turns."""
        queue = BatchQueue()
        for name in ("slow", "fast"):
            filled(queue, opened(queue, name, (1,)), *map(str, range(40)))
        used = {"slow": 0.0, "fast": 0.0}
        for _ in range(40):
            batch = queue.pop(0.0)
            assert isinstance(batch, Batch)
            seconds = 3.0 if batch.lane.model == "slow" else 1.0
            used[batch.lane.model] += seconds
            queue.done(batch, seconds)
        assert abs(used["slow"] - used["fast"]) <= 3.0

    def test_a_flood_does_not_starve_the_other(self) -> None:
        queue = BatchQueue()
        flood = opened(queue, "flood", (1,))
        rare = opened(queue, "rare", (1,))
        filled(queue, flood, *map(str, range(100)))
        for _ in range(50):
            batch = queue.pop(0.0)
            assert isinstance(batch, Batch)
            queue.done(batch, 1.0)
        filled(queue, rare, "x")
        assert names(queue.pop(0.0)) == ["x"]

    def test_idle_time_is_not_saved_up(self) -> None:
        """A model idle for long does not then lock the others out."""
        queue = BatchQueue()
        a, b = opened(queue, "a", (1,)), opened(queue, "b", (1,))
        filled(queue, a, *map(str, range(60)))
        for _ in range(40):
            batch = queue.pop(0.0)
            assert isinstance(batch, Batch)
            queue.done(batch, 1.0)
        filled(queue, b, *map(str, range(20)))
        assert abs(drained(queue)[:20].count("a") - 10) <= 1

    def test_weights(self) -> None:
        queue = BatchQueue()
        heavy = opened(queue, "heavy", (1,), weight=3.0)
        light = opened(queue, "light", (1,))
        for lane in (heavy, light):
            filled(queue, lane, *map(str, range(60)))
        assert abs(drained(queue)[:40].count("heavy") - 30) <= 1

    def test_several_workers_do_not_pile_on_one_lane(self) -> None:
        """What runs is charged before it is done, by what it took before."""
        queue = BatchQueue()
        for name in "ab":
            filled(queue, opened(queue, name, (1,)), *map(str, range(10)))
        drained_once = [queue.pop(0.0), queue.pop(0.0)]
        for batch in drained_once:
            assert isinstance(batch, Batch)
            queue.done(batch, 1.0)
        running = [queue.pop(0.0) for _ in range(4)]
        assert sorted(batch.lane.model for batch in running if isinstance(batch, Batch)) == [
            *"aabb"
        ]


class TestWhatDoesNotRun:
    def test_past_its_deadline(self) -> None:
        queue = BatchQueue()
        a = opened(queue, "a", (1,))
        filled(queue, a, "late", deadline=5.0)
        filled(queue, a, "x", deadline=9.0)
        assert names(queue.pop(5.0)) == ["x"]
        assert queue.waiting == 0

    def test_cancelled(self) -> None:
        queue = BatchQueue()
        a = opened(queue, "a", (4,))
        first, second = filled(queue, a, "x", "y")
        queue.cancel(a, first)
        assert queue.waiting == 1
        assert names(queue.pop(0.0)) == ["y"]
        queue.cancel(a, second)  # runs already; nothing to forget
        assert queue.waiting == 0

    def test_a_lane_that_was_closed(self) -> None:
        queue = BatchQueue()
        a = opened(queue, "a", (1,))
        filled(queue, a, "x")
        queue.remove_lane(a)
        assert queue.waiting == 0
        assert queue.pop(0.0) is None


def images(*values: float) -> dict[str, np.ndarray]:
    """Inputs of an image for each value, full of it."""
    return {"images": np.stack([np.full((3, 2, 2), value, np.float32) for value in values])}


class Model:
    """Answers each image with its first value doubled; runs when told to."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[float]] = []
        self.started, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.held = held

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.batches.append(inputs["images"][:, 0, 0, 0].tolist())
        self.started.release()
        if self.held:
            assert self.go_on.acquire(timeout=60)
        return {"logits": inputs["images"][:, :1] * 2}


def on_loop(test: Callable[[Scheduler], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        scheduler = Scheduler(**options)
        scheduler.start()
        try:
            await test(scheduler)
        finally:
            await asyncio.get_running_loop().run_in_executor(None, scheduler.close)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not come about")


def test_each_gets_its_own_answer() -> None:
    async def test(scheduler: Scheduler) -> None:
        model = Model()
        lane = opened(scheduler, "m", (1, 4), model)
        found = await asyncio.gather(*(scheduler.run(lane, images(n)) for n in range(50)))
        assert [outcome.rows[0]["logits"][0, 0, 0] for outcome in found] == [
            2 * n for n in range(50)
        ]
        assert sorted(value for batch in model.batches for value in batch) == list(range(50))

    on_loop(test, workers=2)


def test_what_waits_while_a_worker_is_busy_runs_together() -> None:
    async def test(scheduler: Scheduler) -> None:
        model = Model(held=True)
        lane = opened(scheduler, "m", (1, 4), model)
        first = asyncio.ensure_future(scheduler.run(lane, images(0)))
        await until(lambda: scheduler.running == 1)
        rest = [asyncio.ensure_future(scheduler.run(lane, images(n))) for n in range(1, 5)]
        await until(lambda: scheduler.waiting == 4)
        model.held = False
        model.go_on.release()
        found = await asyncio.gather(first, *rest)
        assert model.batches == [[0], [1, 2, 3, 4]]
        assert [outcome.rows[0]["logits"][0, 0, 0] for outcome in found] == [0, 2, 4, 6, 8]

    on_loop(test)


def test_several_images_of_one_request() -> None:
    async def test(scheduler: Scheduler) -> None:
        model = Model()
        lane = opened(scheduler, "m", (1, 4), model)
        found = await scheduler.run(lane, images(*range(6)))
        assert [row["logits"][0, 0, 0] for row in found.rows] == [0, 2, 4, 6, 8, 10]
        assert [len(batch) for batch in model.batches] == [4, 1, 1]

    on_loop(test)


def test_a_whole_batch_is_not_copied() -> None:
    seen = []

    async def test(scheduler: Scheduler) -> None:
        batch = images(1, 1, 1, 1)
        lane = opened(scheduler, "m", (4,), lambda x: seen.append(x) or x)
        await scheduler.run(lane, batch)
        assert np.shares_memory(seen[0]["images"], batch["images"])

    on_loop(test)


def test_workers_run_at_the_same_time() -> None:
    async def test(scheduler: Scheduler) -> None:
        together = threading.Barrier(2, timeout=60)
        lane = opened(scheduler, "m", (1,), lambda x: (together.wait(), x)[1])
        await asyncio.gather(scheduler.run(lane, images(0)), scheduler.run(lane, images(1)))

    on_loop(test, workers=2)


def test_a_deadline_that_passes_while_waiting() -> None:
    async def test(scheduler: Scheduler) -> None:
        model = Model(held=True)
        lane = opened(scheduler, "m", (1,), model)
        first = asyncio.ensure_future(scheduler.run(lane, images(0)))
        await until(lambda: scheduler.running == 1)
        with pytest.raises(DeadlineError):
            await scheduler.run(lane, images(1), scheduler._clock() + 0.02)
        assert scheduler.waiting == 0
        model.go_on.release()
        await first
        assert model.batches == [[0]]  # the late one was never run

    on_loop(test)


def test_a_deadline_that_passes_while_running() -> None:
    async def test(scheduler: Scheduler) -> None:
        model, loop, late = Model(held=True), asyncio.get_running_loop(), []
        call_later = loop.call_later

        def caught(delay: float, call: Callable[..., None], *arguments: Any) -> asyncio.TimerHandle:
            if delay > 1000:
                late.append(lambda: call(*arguments))
            return call_later(delay, call, *arguments)

        loop.call_later = caught  # type: ignore[method-assign, assignment]
        lane = opened(scheduler, "m", (1,), model)
        asked = asyncio.ensure_future(scheduler.run(lane, images(0), scheduler._clock() + 3600))
        await until(lambda: scheduler.running == 1)
        late[0]()
        with pytest.raises(DeadlineError):
            await asked
        model.go_on.release()  # its answer comes, and nobody waits for it
        await until(lambda: scheduler.running == 0)

    on_loop(test)


def test_one_whose_client_left_is_not_run() -> None:
    async def test(scheduler: Scheduler) -> None:
        model = Model(held=True)
        lane = opened(scheduler, "m", (1,), model)
        first = asyncio.ensure_future(scheduler.run(lane, images(0)))
        await until(lambda: scheduler.running == 1)
        left = asyncio.ensure_future(scheduler.run(lane, images(1)))
        await until(lambda: scheduler.waiting == 1)
        left.cancel()
        await until(lambda: scheduler.waiting == 0)
        model.go_on.release()
        await first
        assert model.batches == [[0]]

    on_loop(test)


def test_an_error_reaches_those_of_its_batch_only() -> None:
    async def test(scheduler: Scheduler) -> None:
        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if inputs["images"][0, 0, 0, 0] == 1:
                raise ValueError("no")
            return inputs

        lane = opened(scheduler, "m", (1,), run)
        found = await asyncio.gather(
            *(scheduler.run(lane, images(n)) for n in range(3)), return_exceptions=True
        )
        assert [isinstance(outcome, ValueError) for outcome in found] == [False, True, False]

    on_loop(test)


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_thread_that_ends_is_replaced(end: type[BaseException]) -> None:
    deaths = []

    async def test(scheduler: Scheduler) -> None:
        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if inputs["images"][0, 0, 0, 0] == 1:
                raise end
            return inputs

        lane = opened(scheduler, "m", (1,), run)
        found = await asyncio.gather(
            *(scheduler.run(lane, images(n)) for n in range(4)), return_exceptions=True
        )
        assert [isinstance(o, WorkerDiedError) for o in found] == [False, True, False, False]

    on_loop(test, on_death=lambda: deaths.append(1))
    assert deaths == [1]


def test_calls_run_in_turn() -> None:
    async def test(scheduler: Scheduler) -> None:
        lane = opened(scheduler, "m", (1, 4), Model())
        outcome = await scheduler.call(lane, lambda: threading.current_thread().name)
        assert outcome.rows == ["inference-0"]

    on_loop(test)


def test_codecs_run_beside_inference() -> None:
    async def test(scheduler: Scheduler) -> None:
        model = Model(held=True)
        lane = opened(scheduler, "m", (1,), model)
        first = asyncio.ensure_future(scheduler.run(lane, images(0)))
        await until(lambda: scheduler.running == 1)
        name = await scheduler.code(lambda: threading.current_thread().name)
        assert name.startswith("codec")
        model.go_on.release()
        await first

    on_loop(test)


def test_what_a_call_says_that_nobody_waits_for_is_not_logged(caplog) -> None:
    async def test(scheduler: Scheduler) -> None:
        begun, end = threading.Event(), threading.Event()

        def damaged() -> None:
            begun.set()
            end.wait()
            raise ValueError

        asked = asyncio.ensure_future(scheduler.code(damaged))
        while not begun.is_set():
            await asyncio.sleep(0.005)
        asked.cancel()
        await asyncio.sleep(0.005)
        end.set()
        await asyncio.wait([asked])
        gc.collect()
        await asyncio.sleep(0.005)

    on_loop(test)
    assert not caplog.records


def test_closing_runs_what_waits() -> None:
    async def main() -> None:
        scheduler = Scheduler()
        scheduler.start()
        model = Model(held=True)
        lane = opened(scheduler, "m", (1,), model)
        asked = [asyncio.ensure_future(scheduler.run(lane, images(n))) for n in range(3)]
        await until(lambda: scheduler.waiting == 2)
        closing = asyncio.get_running_loop().run_in_executor(None, scheduler.close)
        model.held = False
        model.go_on.release()
        await closing
        assert len(await asyncio.gather(*asked)) == 3

    asyncio.run(main())


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without the garbage collector, which comes when it likes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("end", ["answered", "late", "failed"])
def test_a_request_leaves_nothing_to_be_collected(uncollected: None, end: str) -> None:
    """Else tensors wait for the garbage collector, and a busy service's memory grows."""

    async def test(scheduler: Scheduler) -> None:
        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if end == "failed":
                raise RuntimeError
            time.sleep(0.05 if end == "late" else 0)
            return {"logits": inputs["images"][:, :1] * 2}

        lane = opened(scheduler, "m", (1, 4), run)
        left = []
        for number in range(4):
            inputs = images(number, number, number)
            left.append(weakref.ref(inputs["images"]))
            deadline = scheduler._clock() + 0.01 if end == "late" else float("inf")
            with contextlib.suppress(DeadlineError, RuntimeError):
                await scheduler.run(lane, inputs, deadline)
            del inputs
        # A worker holds its last batch until it has another.
        await until(lambda: sum(ref() is not None for ref in left) <= 1)

    on_loop(test)
