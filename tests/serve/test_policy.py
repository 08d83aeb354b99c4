"""Each setting of the scheduling, by what it changes for requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from fdconv_deploy.runtime import Session
from fdconv_deploy.serve.service import Service
from tests.serve.test_refusals import refused
from tests.serve.test_repository import serving

PNG = {"Content-Type": "image/png"}


class Runs:
    """What the models ran: (name, images), in order; ``hold`` keeps them from ending."""

    def __init__(self, service: Service) -> None:
        self.seen: list[tuple[str, int]] = []
        self.at_once = self.most = 0
        self.clock = 0.0  # on which a run takes a second
        self._go_on, self._lock = threading.Event(), threading.Lock()
        self._go_on.set()
        for model in service.repository:
            assert model.version is not None
            session = model.version.session
            watched = self._watched(model.name, session.run_batches)
            session.run_batches = watched  # type: ignore[method-assign]

    def hold(self) -> None:
        self._go_on.clear()

    def let_go(self) -> None:
        self._go_on.set()

    def _watched(self, name: str, run: Callable) -> Callable:
        def watched(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            with self._lock:
                self.seen.append((name, len(inputs["images"])))
                self.at_once += 1
                self.most = max(self.most, self.at_once)
            assert self._go_on.wait(60)
            with self._lock:
                self.at_once -= 1
                self.clock += 1
            return run(inputs)

        return watched


def ask(client: httpx.AsyncClient, png: bytes, model: str = "street") -> asyncio.Task:
    url = f"/v1/models/{model}/segment?output=mask"
    return asyncio.create_task(client.post(url, content=png, headers=PNG))


async def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


async def all_answered(asked: list[asyncio.Task]) -> None:
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}


@pytest.mark.parametrize(("delay", "sizes"), [(0, [1, 1, 1, 1]), (600_000, [4])])
def test_batch_delay_ms(bundles: list[Path], png: bytes, delay: int, sizes: list[int]) -> None:
    """An idle worker takes the first at once, or waits for company; a full batch goes."""

    async def test() -> None:
        async with serving(bundles[:1], batch_delay_ms=delay) as (client, service):
            runs, asked = Runs(service), []
            for _ in range(4):
                asked.append(ask(client, png))
                if not delay:
                    await asked[-1]
            await all_answered(asked)
            assert [images for _, images in runs.seen] == sizes

    asyncio.run(test())


@pytest.mark.parametrize(("most", "sizes"), [(None, [1, 4]), (1, [1, 1, 1, 1, 1])])
def test_max_batch(bundles: list[Path], png: bytes, most: int | None, sizes: list[int]) -> None:
    async def test() -> None:
        async with serving(bundles[:1], max_batch=most) as (client, service):
            runs = Runs(service)
            runs.hold()
            asked = [ask(client, png)]
            await until(lambda: service.scheduler.running == 1)
            asked += [ask(client, png) for _ in range(4)]
            await until(lambda: service.scheduler.waiting == 4)
            runs.let_go()
            await all_answered(asked)
            assert [images for _, images in runs.seen] == sizes

    asyncio.run(test())


@pytest.mark.parametrize("workers", [1, 3])
def test_workers(bundles: list[Path], png: bytes, workers: int) -> None:
    async def test() -> None:
        async with serving(bundles[:1], workers=workers, max_batch=1) as (client, service):
            runs = Runs(service)
            runs.hold()
            asked = [ask(client, png) for _ in range(6)]
            await until(lambda: runs.at_once == workers and service.admission.in_hand == 6)
            runs.let_go()
            await all_answered(asked)
            assert runs.most == workers

    asyncio.run(test())


@pytest.mark.parametrize("threads", [1, 3])
def test_codec_threads(bundles: list[Path], png: bytes, monkeypatch, threads: int) -> None:
    lock, go_on, decode = threading.Lock(), threading.Event(), Session.read_image
    now = most = 0

    def held(*arguments, **options):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        assert go_on.wait(60)
        with lock:
            now -= 1
        return decode(*arguments, **options)

    monkeypatch.setattr(Session, "read_image", held)

    async def test() -> None:
        async with serving(bundles[:1], codec_threads=threads) as (client, service):
            asked = [ask(client, png) for _ in range(6)]
            await until(lambda: now == threads and service.admission.in_hand == 6)
            go_on.set()
            await all_answered(asked)
            assert most == threads

    asyncio.run(test())


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_weights(bundles: list[Path], png: bytes, weight: float) -> None:
    """While both models have requests waiting, time goes to them by weight."""

    async def test() -> None:
        settings = {"weights": {"street": weight}, "max_batch": 1, "queue_limit": 40}
        async with serving(bundles, **settings) as (client, service):
            runs = Runs(service)
            service.scheduler._clock = lambda: runs.clock
            runs.hold()
            first = ask(client, png)
            await until(lambda: service.scheduler.running == 1)
            whole = "sliding/segment?mode=whole"
            url = f"/v1/models/{whole}&output=mask"
            asked = [ask(client, png) for _ in range(15)]
            asked += [
                asyncio.create_task(client.post(url, content=png, headers=PNG)) for _ in range(15)
            ]
            await until(lambda: service.scheduler.waiting == 30)
            runs.let_go()
            await all_answered([first, *asked])
            # Of the first ten turns, before either lane is empty.
            turns = [name for name, _ in runs.seen[3:13]]
            assert turns.count("street") in ([4, 5, 6] if weight == 1 else [7, 8, 9])

    asyncio.run(test())


@pytest.mark.parametrize("limit", [0, 3])
def test_queue_limit(bundles: list[Path], png: bytes, limit: int) -> None:
    """Those running and ``queue_limit`` more are taken; the next is not."""

    async def test() -> None:
        async with serving(bundles[:1], queue_limit=limit) as (client, service):
            runs = Runs(service)
            runs.hold()
            asked = [ask(client, png) for _ in range(1 + limit)]
            await until(lambda: service.admission.in_hand == 1 + limit)
            assert "waiting" in refused(await ask(client, png), 503)
            runs.let_go()
            await all_answered(asked)

    asyncio.run(test())


@pytest.mark.parametrize(("clients", "images"), [(64, 1), (4, 16)])
def test_moderate_load_is_served(
    bundles: list[Path], png: bytes, clients: int, images: int
) -> None:
    """All at once, by the defaults: nobody is turned away."""

    async def test() -> None:
        async with serving(bundles[:1]) as (client, service):
            runs = Runs(service)
            runs.hold()
            files = [("image", (f"{n}.png", png)) for n in range(images)]
            url = "/v1/segment?output=json"
            asked = [asyncio.create_task(client.post(url, files=files)) for _ in range(clients)]
            await until(lambda: service.admission.in_hand == 64)
            runs.let_go()
            await all_answered(asked)

    asyncio.run(test())


def test_what_would_wait_past_its_deadline_is_refused(bundles: list[Path], png: bytes) -> None:
    """By the pace at which others were answered; with more time, the same request is taken."""

    async def test() -> None:
        async with serving(bundles[:1]) as (client, service):
            now = 0.0
            service.admission._clock = lambda: now
            service.deadline = lambda wanted: now + (wanted or 30_000) / 1e3  # type: ignore[method-assign]
            service.scheduler._clock = lambda: now
            runs = Runs(service)
            with service.admission.admit("a"):
                with service.admission.admit("b"):
                    now = 50.0  # which is its latency, and nobody's pace
                now = 56.0
            runs.hold()
            waiting = [ask(client, png) for _ in range(3)]
            await until(lambda: service.admission.in_hand == 3)
            timeout = {"X-Timeout-Ms": "20000"}
            late = await client.post("/v1/segment", content=png, headers={**PNG, **timeout})
            assert "24.0 s are expected" in refused(late, 503)
            assert late.headers["retry-after"] == "18"
            waiting.append(ask(client, png))
            await until(lambda: service.admission.in_hand == 4)
            runs.let_go()
            await all_answered(waiting)

    asyncio.run(test())


def test_what_would_wait_for_memory_past_its_deadline_is_refused(
    bundles: list[Path], png: bytes
) -> None:
    """As soon as the pace is known, not when the deadline has passed."""

    async def test() -> None:
        async with serving(bundles[:1]) as (client, service):
            runs = Runs(service)
            runs.hold()
            first = ask(client, png)
            await until(lambda: service.scheduler.running == 1)
            each = service.admission.memory_used
            runs.let_go()
            await all_answered([first])
        async with serving(bundles[:1], max_memory_in_hand=each) as (client, service):
            runs, now = Runs(service), time.perf_counter()
            service.admission._clock = lambda: now + 1000 * runs.clock
            service.scheduler._clock = lambda: now
            service.deadline = lambda wanted: now + 3600  # type: ignore[method-assign]
            runs.hold()
            asked = [ask(client, png) for _ in range(5)]
            await until(lambda: len(service.admission._turns) == 4)
            runs.let_go()
            answers = await asyncio.gather(*asked)
            assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 503]
            assert "2000.0 s are expected" in refused(answers[4], 503)

    asyncio.run(test())


def test_max_memory_in_hand(bundles: list[Path], png: bytes) -> None:
    """Requests wait for memory in turn, and are all answered; what never fits is refused."""

    async def test() -> None:
        async with serving(bundles[:1]) as (client, service):
            runs = Runs(service)
            runs.hold()
            asked = [ask(client, png)]
            await until(lambda: service.scheduler.running == 1)
            each = service.admission.memory_used
            assert each > service.repository.default.version.tensor_bytes
            runs.let_go()
            await all_answered(asked)
        async with serving(bundles[:1], max_memory_in_hand=3 * each) as (client, service):
            runs = Runs(service)
            runs.hold()
            asked = [ask(client, png) for _ in range(7)]
            await until(lambda: service.admission.in_hand == 7)
            await until(lambda: service.scheduler.waiting + service.scheduler.running == 3)
            assert service.admission.memory_used == 3 * each
            short = {**PNG, "X-Timeout-Ms": "50"}
            late = await client.post("/v1/segment?output=mask", content=png, headers=short)
            assert "deadline" in refused(late, 504)
            asked[0].cancel()  # one that has memory, and one that waits for it
            asked[5].cancel()
            await until(lambda: service.admission.in_hand == 5)
            files = [("image", (f"{n}.png", png)) for n in range(12)]
            assert "bytes of memory" in refused(
                await client.post("/v1/segment?output=mask", files=files), 413
            )
            runs.let_go()
            await all_answered([*asked[1:5], asked[6]])
            assert service.admission.memory_used == 0

    asyncio.run(test())


@pytest.mark.parametrize("allowed", [50, 600_000])
def test_deadline_ms(bundles: list[Path], png: bytes, allowed: int) -> None:
    """What waits longer than that is answered with 504, and never run."""

    async def test() -> None:
        async with serving(bundles[:1], deadline_ms=allowed, max_batch=1) as (client, service):
            runs = Runs(service)
            runs.hold()
            asked = [ask(client, png), ask(client, png)]
            if allowed == 50:
                assert [answer.status_code for answer in await asyncio.gather(*asked)] == [504] * 2
                runs.let_go()
                await until(lambda: not service.scheduler.running)
                assert len(runs.seen) <= 1
            else:
                await until(lambda: service.scheduler.waiting == 1)
                runs.let_go()
                await all_answered(asked)

    asyncio.run(test())
