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
                    assert go_on.wait(20)
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
                for _ in range(1000):
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
                assert (await states(client))["d"] == "unloaded"
                (tmp_path / "models" / "b").rename(tmp_path / "gone")
                await service.repository.poll()
                assert list(await states(client)) == ["a", "c", "d"]
                assert (await client.get("/v1/models/b")).status_code == 404

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
