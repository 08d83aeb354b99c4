"""Work is bounded by what a request may need, counted before it is done, and by its deadline."""

from __future__ import annotations

import asyncio
import gzip
import io
import threading
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fdconv_deploy.serve import Settings, create_app, responses, segment_request, uploads
from tests.serve.conftest import encoded, wait_until_ready
from tests.serve.test_refusals import refused
from tests.serve.test_repository import serving

PNG = {"Content-Type": "image/png"}
INFER = "/v2/models/street/infer"


def large(kind: str = "PNG", mode: str = "RGB", **options) -> bytes:
    """A picture of 16 million pixels in some kilobytes."""
    buffer = io.BytesIO()
    Image.new(mode, (4000, 4000)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def small_room(bundles: list[Path]):
    """A service that works in 100 MB."""
    with TestClient(
        create_app(bundles, Settings(threads=1, max_memory_in_hand=100 << 20))
    ) as found:
        wait_until_ready(found)
        yield found


class TestPixels:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("PNG", {}),
            ("PNG", {"mode": "P"}),
            ("JPEG", {"progressive": True}),
            ("JPEG", {"mode": "CMYK"}),
            ("WEBP", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
            ("BMP", {}),
        ],
    )
    def test_are_counted_before_they_are_decoded(
        self, small_room: TestClient, monkeypatch, kind: str, options: dict
    ) -> None:
        def decoded(*_) -> None:
            raise AssertionError("the picture was decoded")

        data = large(kind, **options)
        monkeypatch.setattr(Image.Image, "crop", decoded)
        answer = small_room.post("/v1/segment?size=network", content=data, headers=PNG)
        assert "bytes of memory" in refused(answer, 413)

    def test_are_waited_for_in_turn(self, bundles: list[Path], monkeypatch) -> None:
        """Seventeen at once, of which one fits at a time: all are answered."""
        data = encoded(np.zeros((600, 600, 3), np.uint8), "PNG")

        async def test() -> None:
            async with serving(bundles[:1], max_memory_in_hand=40 << 20) as (client, service):
                taken: list[int] = []
                take_now = service.admission.take_now

                def noted(size: int) -> bool:
                    taken.append(size)
                    return take_now(size)

                monkeypatch.setattr(service.admission, "take_now", noted)
                asked = [client.post("/v1/segment", content=data, headers=PNG) for _ in range(17)]
                for answer in await asyncio.gather(*asked):
                    assert answer.status_code == 200, answer.text
                assert min(taken) > 600 * 600 * 9
                assert service.admission.memory_used == 0

        asyncio.run(test())

    def test_are_counted_on_the_way_to_decoding(
        self, client: TestClient, png: bytes, monkeypatch
    ) -> None:
        """The header is read once; a request goes to another thread to decode, and to encode."""
        service, ways, headers = client.app.state.service, [], []
        code, real = service.scheduler.code, Image.open

        def noted(call, **options):
            ways.append(call)
            return code(call, **options)

        def opened(*arguments, **options):
            headers.append(arguments)
            return real(*arguments, **options)

        monkeypatch.setattr(service.scheduler, "code", noted)
        monkeypatch.setattr(Image, "open", opened)
        answer = client.post("/v1/segment?output=mask", content=png, headers=PNG)
        assert answer.status_code == 200, answer.text
        assert (len(ways), len(headers)) == (2, 1)

    def test_of_all_images_of_a_request_count(self, small_room: TestClient) -> None:
        data = encoded(np.zeros((1200, 1200, 3), np.uint8), "PNG")
        for count, status in ((1, 200), (16, 413)):
            files = [("image", (f"{n}.png", data)) for n in range(count)]
            answer = small_room.post("/v1/segment?output=overlay", files=files)
            assert answer.status_code == status, answer.text[:300]


class TestDeadline:
    @pytest.mark.parametrize("stage", ["_open", "answer"])
    def test_covers_decoding_and_the_answer(
        self, bundles: list[Path], png: bytes, monkeypatch, stage: str
    ) -> None:
        """A client is answered by its deadline; what goes on holds its memory until it ends."""
        go_on, real = threading.Event(), getattr(segment_request._Image, stage)

        def held(self):
            assert go_on.wait(60)
            return real(self)

        async def test() -> None:
            async with serving(bundles[:1]) as (client, service):
                monkeypatch.setattr(segment_request._Image, stage, held)
                headers = {**PNG, "X-Timeout-Ms": "300"}
                answer = await client.post("/v1/segment", content=png, headers=headers)
                assert "deadline" in refused(answer, 504)
                assert service.admission.memory_used > 0
                go_on.set()
                while service.admission.memory_used:
                    await asyncio.sleep(0.005)

        asyncio.run(test())

    def test_covers_the_writing_of_json(self, bundles: list[Path], monkeypatch) -> None:
        from fdconv_deploy.serve.routes import kserve

        go_on, real = threading.Event(), kserve.write_answer

        def held(*arguments):
            assert go_on.wait(60)
            return real(*arguments)

        call = {
            "inputs": [
                {
                    "name": "images",
                    "shape": [1, 32, 48, 3],
                    "datatype": "UINT8",
                    "data": [7] * 4608,
                }
            ]
        }

        async def test() -> None:
            async with serving(bundles[:1]) as (client, service):
                monkeypatch.setattr(kserve, "write_answer", held)
                answer = await client.post(INFER, json=call, headers={"X-Timeout-Ms": "300"})
                assert "deadline" in refused(answer, 504)
                go_on.set()
                while service.admission.memory_used:
                    await asyncio.sleep(0.005)
                assert service.statistics["street"].inference_stats.fail.count == 1

        asyncio.run(test())

    def test_stops_a_sliding_window(self, bundles: list[Path], monkeypatch) -> None:
        """Between two crops, not after all of an image's."""
        data = encoded(np.zeros((700, 700, 3), np.uint8), "PNG")

        async def test() -> None:
            async with serving(bundles) as (client, service):
                session, runs = service.repository.get("sliding").version.session, 0
                real, answered = session.run_batches, threading.Event()

                def held(inputs):
                    nonlocal runs
                    runs += 1
                    assert answered.wait(60)
                    return real(inputs)

                session.run_batches = held
                headers = {**PNG, "X-Timeout-Ms": "2000"}
                url = "/v1/models/sliding/segment"
                answer = await client.post(url, content=data, headers=headers)
                refused(answer, 504)
                answered.set()
                while service.scheduler.running:
                    await asyncio.sleep(0.005)
                assert runs == 1  # of 420 crops

        asyncio.run(test())


class TestAnswers:
    @pytest.mark.parametrize("mask", ["rle", "polygons"])
    def test_of_too_many_runs_or_corners(
        self, client: TestClient, png: bytes, monkeypatch, mask: str
    ) -> None:
        assert client.post(f"/v1/segment?mask={mask}", content=png, headers=PNG).status_code == 200
        monkeypatch.setattr(responses, "MAX_JSON", 100)
        answer = client.post(f"/v1/segment?mask={mask}", content=png, headers=PNG)
        assert "Ask for image/png" in refused(answer, 413)

    def test_of_too_many_mask_pixels(self, detecting: TestClient, png: bytes, monkeypatch) -> None:
        monkeypatch.setattr(responses, "MAX_MASKS", 10)
        url = "/v1/segment?min_score=0"
        answer = detecting.post(url, content=png, headers=PNG)
        assert "raise min_score" in refused(answer, 413)
        assert detecting.post(url + "&mask=none", content=png, headers=PNG).status_code == 200


class TestCompressed:
    def test_bounded_by_what_the_model_takes(self, bundles: list[Path]) -> None:
        """Of 16 images of 32x48, not of what any request may bring."""
        with TestClient(create_app(bundles, Settings(threads=1))) as client:
            wait_until_ready(client)
            body = gzip.compress(bytes(30 << 20))
            answer = client.post(INFER, content=body, headers={"Content-Encoding": "gzip"})
            assert "larger than the 3,604,480 bytes" in refused(answer, 413)
            assert client.app.state.service.admission.body_bytes == 0

    def test_unpacked_beside_the_event_loop(self, client: TestClient, monkeypatch) -> None:
        loop, seen = [], []
        real = uploads.zlib.decompressobj

        class Watched:
            def __init__(self, window: int) -> None:
                self._real = real(window)
                loop.append(threading.get_ident())

            def decompress(self, data: bytes, most: int) -> bytes:
                found = self._real.decompress(data, most)
                seen.append((threading.get_ident(), len(found)))
                return found

            def __getattr__(self, name: str):
                return getattr(self._real, name)

        monkeypatch.setattr(uploads.zlib, "decompressobj", Watched)
        body = gzip.compress(bytes(150_000))
        client.post("/v1/segment", content=body, headers={**PNG, "Content-Encoding": "gzip"})
        assert sum(size for _, size in seen) == 150_000
        assert all(size <= 32 << 10 for thread, size in seen if thread == loop[0])


class TestJson:
    @pytest.mark.parametrize("values", ["1,", "[],", "{},", "[[[1]]],"])
    def test_counted_before_it_is_parsed(
        self, bundles: list[Path], monkeypatch, values: str
    ) -> None:
        from fdconv_deploy.serve.kserve import tensors

        def parsed(*_) -> None:
            raise AssertionError("the JSON was parsed")

        with TestClient(create_app(bundles, Settings(threads=1))) as client:
            wait_until_ready(client)
            head = '{"inputs": [{"name": "images", "shape": [1], "datatype": "FP32", "data": ['
            body = head + values * 200_000 + "1]}]}"
            monkeypatch.setattr(tensors.InferCall, "model_validate_json", parsed)
            answer = client.post(INFER, content=body.encode())
            assert "73,728 numbers" in refused(answer, 413)

    def test_its_memory_is_counted(self, bundles: list[Path]) -> None:
        given = {"name": "images", "shape": [16, 32, 48, 3], "datatype": "UINT8"}
        call = {"inputs": [{**given, "data": [7] * (16 * 4608)}], "outputs": [{"name": "labels"}]}
        for room, status in ((4 << 20, 413), (64 << 20, 200)):
            settings = Settings(threads=1, max_memory_in_hand=room)
            with TestClient(create_app(bundles, settings)) as client:
                wait_until_ready(client)
                answer = client.post(INFER, json=call)
                assert answer.status_code == status, answer.text[:300]
