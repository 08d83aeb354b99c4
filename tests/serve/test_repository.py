"""Models loaded on demand, changed under way and evicted, without losing a request."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest

from fdconv_deploy.runtime import open_session
from fdconv_deploy.serve import Settings, create_app
from fdconv_deploy.serve.model_repository import timed_runs
from fdconv_deploy.serve.service import Service
from tests.runtime import toy

PNG = {"Content-Type": "image/png"}


@asynccontextmanager
async def serving(
    sources: list[Path], **settings
) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    app = create_app(sources, Settings(threads=1, **settings))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.005)
        yield client, app.state.service


def three(folder: Path) -> list[Path]:
    return [toy.make_bundle(folder / name, seed=n).path for n, name in enumerate("abc")]


async def states(client: httpx.AsyncClient) -> dict[str, str]:
    found = (await client.get("/v1/models")).json()["models"]
    return {card["name"]: card["state"] for card in found}


def areas(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return [entry["area"] for entry in answer.json()["classes"]]


def expected(path: Path, picture: np.ndarray) -> list[int]:
    with open_session(path, threads=1) as session:
        return session.segment(picture).areas().tolist()


def touch(path: Path) -> None:
    """Make sure that a rewritten manifest is seen as changed on any clock."""
    file = path / "manifest.json"
    os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns + 10**9))


class TestOnDemand:
    def test_loaded_at_the_first_request(self, tmp_path: Path, png: bytes, picture) -> None:
        paths = three(tmp_path)

        async def test() -> None:
            async with serving(paths, load="demand") as (client, _):
                assert await states(client) == dict.fromkeys("abc", "unloaded")
                answer = await client.post("/v1/models/b/segment", content=png, headers=PNG)
                assert areas(answer) == expected(paths[1], picture)
                assert await states(client) == {"a": "unloaded", "b": "ready", "c": "unloaded"}

        asyncio.run(test())

    def test_many_first_requests_load_once(self, tmp_path: Path, png: bytes) -> None:
        async def test() -> None:
            async with serving(three(tmp_path), load="demand") as (client, service):
                found = await asyncio.gather(
                    *(client.post("/v1/segment", content=png, headers=PNG) for _ in range(8))
                )
                assert {answer.status_code for answer in found} == {200}
                assert service.repository.get("a").generation == 1

        asyncio.run(test())

    def test_a_bundle_damaged_since(self, tmp_path: Path, png: bytes) -> None:
        paths = three(tmp_path)

        async def test() -> None:
            async with serving(paths, load="demand") as (client, _):
                weights = paths[0] / "weights.bin"
                weights.write_bytes(bytes(weights.stat().st_size))
                answer = await client.post("/v1/segment", content=png, headers=PNG)
                assert answer.status_code == 503
                assert "cannot be loaded" in answer.json()["detail"]
                assert str(tmp_path) not in answer.text
                assert (await states(client))["a"] == "failed"
                other = await client.post("/v1/models/b/segment", content=png, headers=PNG)
                assert other.status_code == 200

        asyncio.run(test())


class TestBudget:
    def test_the_least_recently_used_goes(self, tmp_path: Path, png: bytes) -> None:
        paths = three(tmp_path)

        async def test() -> None:
            async with serving(paths[:1], load="demand") as (client, service):
                one = service.repository.get("a").card.bytes
            async with serving(paths, load="demand", memory_budget_bytes=2 * one) as (
                client,
                service,
            ):
                for name in "abac":
                    url = f"/v1/models/{name}/segment"
                    answer = await client.post(url, content=png, headers=PNG)
                    assert answer.status_code == 200
                assert await states(client) == {"a": "ready", "b": "unloaded", "c": "ready"}
                assert service.repository.loaded_bytes() == 2 * one
                again = await client.post("/v1/models/b/segment", content=png, headers=PNG)
                assert again.status_code == 200

        asyncio.run(test())

    def test_it_goes_before_the_new_one_comes(
        self, tmp_path: Path, png: bytes, monkeypatch
    ) -> None:
        """The budget holds while a model loads, too."""
        paths = three(tmp_path)

        async def test() -> None:
            async with serving(paths, load="demand", memory_budget_bytes=1) as (client, service):
                repository, loaded = service.repository, []
                open_bundle = repository._open

                def watched(model):
                    loaded.append(repository.loaded_bytes())
                    return open_bundle(model)

                monkeypatch.setattr(repository, "_open", watched)
                for name in "abc":
                    url = f"/v1/models/{name}/segment"
                    answer = await client.post(url, content=png, headers=PNG)
                    assert answer.status_code == 200
                assert loaded == [0, 0, 0]

        asyncio.run(test())

    def test_one_in_use_ends_its_request_first(self, tmp_path: Path, png: bytes) -> None:
        paths = three(tmp_path)

        async def test() -> None:
            async with serving(paths, load="demand", memory_budget_bytes=1, workers=2) as (
                client,
                service,
            ):
                await client.post("/v1/segment", content=png, headers=PNG)
                version = service.repository.get("a").version
                assert version is not None
                started, go_on = threading.Event(), threading.Event()
                run = version.session.run_batches

                def held(inputs):
                    started.set()
                    assert go_on.wait(60)
                    return run(inputs)

                version.session.run_batches = held  # type: ignore[method-assign]
                asked = asyncio.ensure_future(client.post("/v1/segment", content=png, headers=PNG))
                while not started.is_set():
                    await asyncio.sleep(0.002)
                await client.post("/v1/models/b/segment", content=png, headers=PNG)
                assert (await states(client))["a"] == "unloaded"
                assert version.leases == 1
                go_on.set()
                assert (await asked).status_code == 200
                assert version.session.closed

        asyncio.run(test())


class TestReload:
    def test_no_request_is_dropped(self, tmp_path: Path, png: bytes, picture) -> None:
        """Requests without pause while a bundle is replaced: each is from one or the other."""
        path = toy.make_bundle(tmp_path / "m", seed=0).path
        other = toy.make_bundle(tmp_path / "other", seed=9).path
        old, new = expected(path, picture), expected(other, picture)
        assert old != new

        async def test() -> None:
            async with serving([path]) as (client, service):
                found: list[list[int]] = []
                stop = asyncio.Event()

                async def ask() -> None:
                    while not stop.is_set():
                        answer = await client.post("/v1/segment", content=png, headers=PNG)
                        found.append(areas(answer))

                asking = [asyncio.ensure_future(ask()) for _ in range(4)]
                while len(found) < 5:
                    await asyncio.sleep(0.002)
                toy.make_bundle(path, seed=9, overwrite=True)
                touch(path)
                before = service.repository.get("m").version
                await service.repository.poll()
                seen = len(found)
                while len(found) < seen + 10:
                    await asyncio.sleep(0.002)
                stop.set()
                await asyncio.gather(*asking)
                assert before is not None
                assert before.session.closed
                assert found[0] == old
                assert found[-1] == new
                assert all(answer in (old, new) for answer in found)
                card = (await client.get("/v1/models/m")).json()
                assert card["version"] == "2"

        asyncio.run(test())

    def test_of_itself(self, tmp_path: Path, png: bytes) -> None:
        path = toy.make_bundle(tmp_path / "m").path

        async def test() -> None:
            async with serving([path], reload_seconds=0.01) as (client, _):
                toy.make_bundle(path, arch=toy.architecture(7), overwrite=True)
                touch(path)
                for _ in range(12_000):
                    if len((await client.get("/v1/models/m")).json()["classes"]) == 7:
                        break
                    await asyncio.sleep(0.01)
                answer = await client.post("/v1/segment", content=png, headers=PNG)
                assert len(areas(answer)) == 7

        asyncio.run(test())

    def test_a_damaged_one_is_not_taken(self, tmp_path: Path, png: bytes, caplog) -> None:
        path = toy.make_bundle(tmp_path / "m").path

        async def test() -> None:
            async with serving([path]) as (client, service):
                (path / "manifest.json").write_text("{")
                await service.repository.poll()
                answer = await client.post("/v1/segment", content=png, headers=PNG)
                assert answer.status_code == 200
                assert (await client.get("/v1/models/m")).json()["version"] == "1"
                assert "does not load" in caplog.text

        asyncio.run(test())

    def test_one_that_is_being_copied_is_not_taken(
        self, tmp_path: Path, png: bytes, picture, caplog
    ) -> None:
        """In place, the manifest first: each look but the last finds half a copy."""
        path = toy.make_bundle(tmp_path / "m", seed=0).path
        other = toy.make_bundle(tmp_path / "other", seed=9).path
        old, new = expected(path, picture), expected(other, picture)
        names = ["manifest.json", "model.b1.onnx", "model.b4.onnx", "weights.bin"]

        async def test() -> None:
            async with serving([path]) as (client, service):
                for name in names:
                    data = (other / name).read_bytes()
                    for length in (0, len(data) // 2, len(data)):
                        (path / name).write_bytes(data[:length])
                        touch(path)
                        for _ in range(2):
                            await service.repository.poll()
                        whole = name == names[-1] and length == len(data)
                        answer = await client.post("/v1/segment", content=png, headers=PNG)
                        assert areas(answer) == (new if whole else old)

        asyncio.run(test())
        said = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
        assert any("being copied over" in one and "goes on serving" in one for one in said)
        assert all(one != after for one, after in pairwise(said))  # once for several looks

    def test_one_that_is_deleted_goes_on_serving(self, tmp_path: Path, png: bytes, picture) -> None:
        path = toy.make_bundle(tmp_path / "m").path
        old = expected(path, picture)

        async def test() -> None:
            async with serving([path]) as (client, service):
                shutil.rmtree(path)
                await service.repository.poll()
                answer = await client.post("/v1/segment", content=png, headers=PNG)
                assert areas(answer) == old

        asyncio.run(test())


class TestFolders:
    def test_a_folder_of_bundles(self, tmp_path: Path) -> None:
        three(tmp_path / "models")

        async def test() -> None:
            async with serving([tmp_path / "models"]) as (client, service):
                assert list(await states(client)) == ["a", "b", "c"]
                toy.make_bundle(tmp_path / "models" / "d")
                await service.repository.poll()
                assert (await states(client))["d"] == "ready"  # as load: start says
                (tmp_path / "models" / "b").rename(tmp_path / "gone")
                await service.repository.poll()
                assert list(await states(client)) == ["a", "c", "d"]
                assert (await client.get("/v1/models/b")).status_code == 404

        asyncio.run(test())

    def test_one_that_comes_waits_where_models_load_on_demand(self, tmp_path: Path) -> None:
        toy.make_bundle(tmp_path / "models" / "a")

        async def test() -> None:
            async with serving([tmp_path / "models"], load="demand") as (client, service):
                toy.make_bundle(tmp_path / "models" / "d")
                await service.repository.poll()
                assert (await states(client))["d"] == "unloaded"

        asyncio.run(test())

    def test_one_that_comes_in_pieces_is_found_when_it_is_whole(self, tmp_path: Path) -> None:
        toy.make_bundle(tmp_path / "models" / "a")
        whole = toy.make_bundle(tmp_path / "d", seed=4).path
        part = tmp_path / "models" / "d"

        async def test() -> None:
            async with serving([tmp_path / "models"]) as (client, service):
                part.mkdir()
                for name in ("manifest.json", "model.b1.onnx", "model.b4.onnx", "weights.bin"):
                    await service.repository.poll()
                    assert await states(client) == {"a": "ready"}
                    shutil.copy(whole / name, part / name)
                await service.repository.poll()
                assert await states(client) == {"a": "ready", "d": "ready"}

        asyncio.run(test())

    def test_no_other_model_answers_for_the_default(self, tmp_path: Path, png: bytes) -> None:
        three(tmp_path / "models")
        default = tmp_path / "models" / "a"

        async def test() -> None:
            async with serving([tmp_path / "models"]) as (client, service):
                default.rename(tmp_path / "away")
                await service.repository.poll()
                answer = await client.post("/v1/segment", content=png, headers=PNG)
                assert answer.status_code == 503
                assert "'a' is gone; there are b, c" in answer.json()["detail"]
                (tmp_path / "away").rename(default)
                await service.repository.poll()
                answer = await client.post("/v1/segment", content=png, headers=PNG)
                assert answer.headers["x-model"] == "a"
                assert (await client.get("/v1/models/a")).json()["default"]

        asyncio.run(test())

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        from fdconv_deploy.errors import BundleError

        with pytest.raises(BundleError, match=r"manifest\.json"):
            create_app([tmp_path])


def test_memory_is_counted(tmp_path: Path, png: bytes) -> None:
    async def test() -> None:
        async with serving(three(tmp_path), load="demand") as (client, _):
            await client.post("/v1/segment", content=png, headers=PNG)
            text = (await client.get("/metrics")).text
            card = (await client.get("/v1/models/a")).json()
            assert f'fdconv_model_bytes{{model="a"}} {float(card["bytes"])}' in text
            assert 'fdconv_model_bytes{model="b"}' not in text

    asyncio.run(test())


def test_loading_an_unchanged_bundle_keeps_its_version(tmp_path: Path, png: bytes) -> None:
    """Loaded by hand, unloaded, or copied over by itself: clients may have pinned it."""
    path = toy.make_bundle(tmp_path / "m").path
    pinned = "/v2/models/m/versions/1/ready"

    async def test() -> None:
        async with serving([path], model_control=True) as (client, service):

            async def control(what: str) -> None:
                answer = await client.post(f"/v2/repository/models/m/{what}")
                assert answer.status_code == 200, answer.text

            session = service.repository.get("m").version.session
            await control("load")
            assert service.repository.get("m").version.session is session
            await control("unload")
            await control("load")
            assert (await client.get(pinned)).status_code == 200
            touch(path)
            await service.repository.poll()
            assert (await client.get(pinned)).status_code == 200
            toy.make_bundle(path, seed=3, overwrite=True)
            touch(path)
            await control("load")
            assert (await client.get(pinned)).status_code == 404
            assert (await client.get("/v1/models/m")).json()["version"] == "2"

    asyncio.run(test())


@pytest.mark.parametrize("what", ["load", "unload"])
@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b'{"parameters": 1}', b"x" * 70_000])
def test_what_is_no_json_loads_nothing(tmp_path: Path, what: str, body: bytes) -> None:
    path = toy.make_bundle(tmp_path / "m").path

    async def test() -> None:
        async with serving([path], model_control=True) as (client, _):
            answer = await client.post(f"/v2/repository/models/m/{what}", content=body)
            assert answer.status_code == (413 if len(body) > 65_536 else 400), answer.text
            assert await states(client) == {"m": "ready"}

    asyncio.run(test())


def test_index_of_models_that_are_ready(tmp_path: Path) -> None:
    paths = three(tmp_path)

    async def test() -> None:
        async with serving(paths, model_control=True) as (client, _):
            await client.post("/v2/repository/models/b/unload", json={})

            async def listed(**body) -> list[str]:
                found = await client.post("/v2/repository/index", **body)
                return [entry["name"] for entry in found.json()]

            assert await listed() == await listed(json={"ready": False}) == ["a", "b", "c"]
            assert await listed(json={"ready": True}) == ["a", "c"]
            a, b, _ = (await client.post("/v2/repository/index")).json()
            assert a == {"name": "a", "version": "1", "state": "READY"}
            assert b == {"name": "b", "state": "UNAVAILABLE", "reason": "unloaded"}
            answer = await client.post("/v2/repository/index", json={"ready": "yes"})
            assert answer.status_code == 400

    asyncio.run(test())


@asynccontextmanager
async def held_loading(service: Service) -> AsyncIterator[threading.Event]:
    """Hold up every load until the event is set, at the latest at the end of the block."""
    go, loader = threading.Event(), service.repository._loader
    loader.submit(go.wait)
    try:
        yield go
    finally:
        go.set()


def test_unloading_what_is_being_loaded(tmp_path: Path, png: bytes) -> None:
    """It is unloaded in the end, and the request that it was loaded for is told so."""
    paths = three(tmp_path)

    async def test() -> None:
        async with serving(paths, load="demand", model_control=True) as (client, service):
            async with held_loading(service) as go:
                asked = [
                    asyncio.create_task(
                        client.post("/v1/models/b/segment", content=png, headers=PNG)
                    ),
                    asyncio.create_task(client.post("/v2/repository/models/b/load")),
                ]
                while service.repository.get("b").loading is None:
                    await asyncio.sleep(0.005)
                unload = asyncio.create_task(client.post("/v2/repository/models/b/unload"))
                await asyncio.sleep(0.05)
                assert not unload.done()
                go.set()
                assert (await unload).status_code == 200
            assert await states(client) == dict.fromkeys("abc", "unloaded")
            refused, loaded = await asyncio.gather(*asked)
            assert (refused.status_code, loaded.status_code) == (503, 200)
            assert "is unloaded" in refused.json()["detail"]
            await client.post("/v2/repository/models/b/load")
            answer = await client.post("/v1/models/b/segment", content=png, headers=PNG)
            assert answer.status_code == 200

    asyncio.run(test())


def test_a_bundle_that_goes_while_it_is_loaded_leaves_nothing(tmp_path: Path) -> None:
    toy.make_bundle(tmp_path / "all" / "a")
    gone = toy.make_bundle(tmp_path / "all" / "b").path

    async def test() -> None:
        async with serving([tmp_path / "all"], load="demand", model_control=True) as (
            client,
            service,
        ):
            model = service.repository.get("b")
            async with held_loading(service) as go:
                load = asyncio.create_task(client.post("/v2/repository/models/b/load"))
                while model.loading is None:
                    await asyncio.sleep(0.005)
                gone.rename(tmp_path / "elsewhere")
                await service.repository.poll()
                assert await states(client) == {"a": "unloaded"}
                (tmp_path / "elsewhere").rename(gone)  # so that it does load
                go.set()
                await load
            assert model.version is None
            assert 'fdconv_model_bytes{model="b"}' not in (await client.get("/metrics")).text

    asyncio.run(test())


def test_the_deadline_covers_loading(tmp_path: Path, png: bytes) -> None:
    paths = three(tmp_path)

    async def test() -> None:
        async with serving(paths, load="demand") as (client, service):
            headers = {**PNG, "X-Timeout-Ms": "50"}
            async with held_loading(service):  # for ever, were it not for the deadline
                answer = await client.post("/v1/models/b/segment", content=png, headers=headers)
                assert answer.status_code == 504
            answer = await client.post("/v1/models/b/segment", content=png, headers=PNG)
            assert answer.status_code == 200  # it went on loading

    asyncio.run(test())


def test_memory_is_told_of_a_bundle_that_was_replaced(tmp_path: Path) -> None:
    path = toy.make_bundle(tmp_path / "m").path

    async def test() -> None:
        async with serving([path]) as (client, service):
            touch(path)
            await service.repository.poll()
            assert 'fdconv_model_bytes{model="m"}' in (await client.get("/metrics")).text

    asyncio.run(test())


def test_what_cannot_be_served_is_said_once(tmp_path: Path, caplog) -> None:
    toy.make_bundle(tmp_path / "all" / "a")

    async def test() -> None:
        async with serving([tmp_path / "all"]) as (client, service):
            toy.make_bundle(tmp_path / "all" / "not a name")
            for _ in range(3):
                await service.repository.poll()
            assert await states(client) == {"a": "ready"}

    with caplog.at_level(logging.WARNING):
        asyncio.run(test())
    assert sum("is not served" in record.message for record in caplog.records) == 1


def test_card_times_runs_of_the_network_alone(bundles: list[Path], monkeypatch) -> None:
    """Every batch size more than once, the least of them taken; no loading, no pixels."""
    with open_session(bundles[0], threads=1) as session:
        session.warm_up()
        ran: list[int] = []
        run = session.run_batches

        def recorded(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            ran.append(len(feeds["images"]))
            return run(feeds)

        monkeypatch.setattr(session, "run_batches", recorded)
        monkeypatch.setattr(session, "_pipeline", None)
        found = timed_runs(session)
        assert [entry.batch for entry in found] == list(session.batch_sizes)
        assert set(ran) == set(session.batch_sizes)
        assert len(ran) > len(found)
