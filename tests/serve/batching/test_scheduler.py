"""The threads: what is awaited gets its answer, whatever happens to a worker."""

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
from fdconv_deploy.serve.batching import DeadlineError, Scheduler, WorkerDiedError


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
            assert self.go_on.acquire(timeout=20)
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
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not come about")


def test_each_gets_its_own_answer() -> None:
    async def test(scheduler: Scheduler) -> None:
        model = Model()
        scheduler.add_lane("m", model, (1, 4))
        found = await asyncio.gather(*(scheduler.run("m", images(n)) for n in range(50)))
        assert [outcome.rows[0]["logits"][0, 0, 0] for outcome in found] == [
            2 * n for n in range(50)
        ]
        assert sorted(value for batch in model.batches for value in batch) == list(range(50))

    on_loop(test, workers=2)


def test_what_waits_while_a_worker_is_busy_runs_together() -> None:
    async def test(scheduler: Scheduler) -> None:
        model = Model(held=True)
        scheduler.add_lane("m", model, (1, 4))
        first = asyncio.ensure_future(scheduler.run("m", images(0)))
        await until(lambda: scheduler.running == 1)
        rest = [asyncio.ensure_future(scheduler.run("m", images(n))) for n in range(1, 5)]
        await until(lambda: scheduler.waiting == 4)
        model.held = False
        model.go_on.release()
        found = await asyncio.gather(first, *rest)
        assert model.batches == [[0], [1, 2, 3, 4]]
        assert [outcome.batch_sizes for outcome in found] == [(1,)] + [(4,)] * 4

    on_loop(test)


def test_several_images_of_one_request() -> None:
    async def test(scheduler: Scheduler) -> None:
        model = Model()
        scheduler.add_lane("m", model, (1, 4))
        batch = images(*range(6))
        found = await scheduler.run("m", batch)
        assert [row["logits"][0, 0, 0] for row in found.rows] == [0, 2, 4, 6, 8, 10]
        assert sorted(found.batch_sizes) == [1, 1, 4, 4, 4, 4]

    on_loop(test)


def test_a_whole_batch_is_not_copied() -> None:
    seen = []

    async def test(scheduler: Scheduler) -> None:
        batch = images(1, 1, 1, 1)
        scheduler.add_lane("m", lambda x: seen.append(x) or x, (4,))
        await scheduler.run("m", batch)
        assert np.shares_memory(seen[0]["images"], batch["images"])

    on_loop(test)


def test_workers_run_at_the_same_time() -> None:
    async def test(scheduler: Scheduler) -> None:
        together = threading.Barrier(2, timeout=20)
        scheduler.add_lane("m", lambda x: (together.wait(), x)[1], (1,))
        await asyncio.gather(scheduler.run("m", images(0)), scheduler.run("m", images(1)))

    on_loop(test, workers=2)


def test_a_deadline_that_passes_while_waiting() -> None:
    async def test(scheduler: Scheduler) -> None:
        model = Model(held=True)
        scheduler.add_lane("m", model, (1,))
        first = asyncio.ensure_future(scheduler.run("m", images(0)))
        await until(lambda: scheduler.running == 1)
        with pytest.raises(DeadlineError):
            await scheduler.run("m", images(1), scheduler._clock() + 0.02)
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
        scheduler.add_lane("m", model, (1,))
        asked = asyncio.ensure_future(scheduler.run("m", images(0), scheduler._clock() + 3600))
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
        scheduler.add_lane("m", model, (1,))
        first = asyncio.ensure_future(scheduler.run("m", images(0)))
        await until(lambda: scheduler.running == 1)
        left = asyncio.ensure_future(scheduler.run("m", images(1)))
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

        scheduler.add_lane("m", run, (1,))
        found = await asyncio.gather(
            *(scheduler.run("m", images(n)) for n in range(3)), return_exceptions=True
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

        scheduler.add_lane("m", run, (1,))
        found = await asyncio.gather(
            *(scheduler.run("m", images(n)) for n in range(4)), return_exceptions=True
        )
        assert [isinstance(o, WorkerDiedError) for o in found] == [False, True, False, False]

    on_loop(test, on_death=lambda: deaths.append(1))
    assert deaths == [1]


def test_calls_run_in_turn() -> None:
    async def test(scheduler: Scheduler) -> None:
        scheduler.add_lane("m", Model(), (1, 4))
        outcome = await scheduler.call("m", lambda: threading.current_thread().name)
        assert outcome.rows == ["inference-0"]

    on_loop(test)


def test_codecs_run_beside_inference() -> None:
    async def test(scheduler: Scheduler) -> None:
        model = Model(held=True)
        scheduler.add_lane("m", model, (1,))
        first = asyncio.ensure_future(scheduler.run("m", images(0)))
        await until(lambda: scheduler.running == 1)
        name = await scheduler.code(lambda: threading.current_thread().name)
        assert name.startswith("codec")
        model.go_on.release()
        await first

    on_loop(test)


def test_closing_runs_what_waits() -> None:
    async def main() -> None:
        scheduler = Scheduler()
        scheduler.start()
        model = Model(held=True)
        scheduler.add_lane("m", model, (1,))
        asked = [asyncio.ensure_future(scheduler.run("m", images(n))) for n in range(3)]
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

        scheduler.add_lane("m", run, (1, 4))
        left = []
        for number in range(4):
            inputs = images(number, number, number)
            left.append(weakref.ref(inputs["images"]))
            deadline = scheduler._clock() + 0.01 if end == "late" else float("inf")
            with contextlib.suppress(DeadlineError, RuntimeError):
                await scheduler.run("m", inputs, deadline)
            del inputs
        # A worker holds its last batch until it has another.
        await until(lambda: sum(ref() is not None for ref in left) <= 1)

    on_loop(test)
