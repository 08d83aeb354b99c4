"""NVIDIA's clients in their other forms: asyncio, streams, compression, TLS, shared memory."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fdconv_deploy.runtime import Session, open_session
from fdconv_deploy.serve import Settings, running
from tests.serve.kserve.conftest import Served, free_port
from tests.serve.kserve.test_tritonclient import close

http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")


def given(module: Any, array: np.ndarray) -> list[Any]:
    tensor = module.InferInput("images", array.shape, "FP32")
    tensor.set_data_from_numpy(array)
    return [tensor]


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_asyncio_clients_are_answered(served: Served, session, tensor, kind: str) -> None:
    module = pytest.importorskip(f"tritonclient.{kind}.aio")

    async def ask() -> None:
        async with module.InferenceServerClient(getattr(served, kind)) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("street")
            for method in ("get_server_metadata", "get_model_repository_index"):
                assert await getattr(client, method)()
            for method in ("get_model_metadata", "get_model_config", "get_inference_statistics"):
                assert await getattr(client, method)("street")
            answers = await asyncio.gather(
                *(client.infer("street", given(module, tensor)) for _ in range(3))
            )
            for answer in answers:
                assert close(answer.as_numpy("logits"), session.run(tensor))

    asyncio.run(ask())


class Held:
    """A service whose runs wait until they may go on, and a gRPC client of it."""

    def __init__(self, session: Session) -> None:
        self.sizes: list[int] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.client: Any = None
        self.address = ""
        self._run = session.run_batches
        session.run_batches = self.run  # type: ignore[method-assign]
        self.go_on.set()  # for the runs that loading makes

    def run(self, inputs: Any) -> Any:
        self.sizes.append(len(inputs["images"]))
        self.begun.set()
        assert self.go_on.wait(60)
        return self._run(inputs)

    def wait_for(self, line: str) -> None:
        while line not in httpx.get(f"{self.address}/metrics").text:
            time.sleep(0.01)


@pytest.fixture
def held(bundles: list[Path]) -> Iterator[Held]:
    port = free_port()
    with open_session(bundles[0], threads=1) as session:
        found = Held(session)
        with (
            running([session], settings=Settings(threads=1, grpc_port=port)) as found.address,
            grpc.InferenceServerClient(f"127.0.0.1:{port}") as found.client,
        ):
            found.sizes.clear()
            found.begun.clear()
            found.go_on.clear()
            yield found
            found.go_on.set()


def test_cancelled_requests_are_dropped_from_the_queue(held: Held, tensor) -> None:
    done: queue.Queue = queue.Queue()

    def ask() -> Any:
        return held.client.async_infer(
            "street", given(grpc, tensor[:1]), callback=lambda result, error: done.put(error)
        )

    ask()
    assert held.begun.wait(60)
    calls = [ask() for _ in range(3)]
    held.wait_for("fdconv_queue_images 3.0")
    for call in calls:
        call.cancel()
    held.wait_for("fdconv_in_hand_images 1.0")
    held.go_on.set()
    errors = [done.get(timeout=60) for _ in range(4)]
    assert sum(error is None for error in errors) == 1
    assert held.sizes == [1]


def test_requests_of_a_stream_that_ends_are_dropped_from_the_queue(held: Held, tensor) -> None:
    held.client.start_stream(lambda result, error: None)
    for n in range(4):
        held.client.async_stream_infer("street", given(grpc, tensor[:1]), request_id=str(n))
        assert held.begun.wait(60)
    held.wait_for("fdconv_in_hand_images 4.0")
    held.client.stop_stream(cancel_requests=True)
    held.wait_for("fdconv_in_hand_images 0.0")
    held.go_on.set()
    assert held.sizes == [1]


class TestStreams:
    @pytest.fixture
    def streaming(self, served: Served) -> Iterator[tuple[Any, queue.Queue]]:
        found: queue.Queue = queue.Queue()
        with grpc.InferenceServerClient(served.grpc) as client:
            client.start_stream(callback=lambda result, error: found.put((result, error)))
            yield client, found
            client.stop_stream()

    def test_requests_are_answered_in_order(self, streaming, session, tensor) -> None:
        client, found = streaming
        for n in range(4):
            client.async_stream_infer("street", given(grpc, tensor + n), request_id=str(n))
        for n in range(4):
            answer, error = found.get(timeout=60)
            assert error is None
            response = answer.get_response()
            assert response.id == str(n)
            assert response.parameters["triton_final_response"].bool_param
            assert close(answer.as_numpy("logits"), session.run(tensor + n))

    def test_an_error_does_not_end_the_stream(self, streaming, session, tensor) -> None:
        client, found = streaming
        client.async_stream_infer("none", given(grpc, tensor), request_id="a")
        client.async_stream_infer("street", given(grpc, tensor[:, :, :5]), request_id="b")
        client.async_stream_infer("street", given(grpc, tensor), request_id="c")
        says = [str(found.get(timeout=60)[1]) for _ in range(2)]
        assert "no model of that name" in says[0]
        assert "shape" in says[1]
        answer, error = found.get(timeout=60)
        assert error is None
        assert close(answer.as_numpy("logits"), session.run(tensor))

    def test_requests_of_one_stream_share_a_batch(self, held: Held, tensor) -> None:
        found: queue.Queue = queue.Queue()
        held.client.start_stream(lambda result, error: found.put((result, error)))
        held.client.async_stream_infer("street", given(grpc, tensor[:1]), request_id="0")
        assert held.begun.wait(60)
        for n in range(1, 5):
            held.client.async_stream_infer("street", given(grpc, tensor[:1]), request_id=str(n))
        held.wait_for("fdconv_queue_images 4.0")
        held.go_on.set()
        answers = [found.get(timeout=60) for _ in range(5)]
        held.client.stop_stream()
        assert [answer.get_response().id for answer, _ in answers] == list("01234")
        assert held.sizes == [1, 4]

    def test_asyncio_clients_stream(self, served: Served, session, tensor) -> None:
        aio = pytest.importorskip("tritonclient.grpc.aio")

        async def requests():
            for n in range(3):
                yield {"model_name": "street", "inputs": given(aio, tensor + n)}

        async def ask() -> list[np.ndarray]:
            async with aio.InferenceServerClient(served.grpc) as client:
                found = []
                async for answer, error in client.stream_infer(requests()):
                    assert error is None
                    found.append(answer.as_numpy("logits"))
                return found

        found = asyncio.run(ask())
        assert len(found) == 3
        for n, logits in enumerate(found):
            assert close(logits, session.run(tensor + n))

    def test_streams_need_the_key_and_are_counted_by_request(
        self, bundles: list[Path], tensor
    ) -> None:
        port = free_port()
        settings = Settings(threads=1, grpc_port=port, api_keys=("k",))
        with (
            running(bundles, settings=settings) as address,
            http.InferenceServerClient(address.removeprefix("http://")) as rest,
            grpc.InferenceServerClient(f"127.0.0.1:{port}") as client,
        ):
            found: queue.Queue = queue.Queue()

            def told(result: Any, error: Any) -> None:
                found.put((result, error))

            client.start_stream(told)
            assert "API key" in str(found.get(timeout=60)[1])
            client.stop_stream()
            client.start_stream(told, headers={"x-api-key": "k"})
            for _ in range(3):
                client.async_stream_infer("street", given(grpc, tensor[:1]))
            assert [found.get(timeout=60)[1] for _ in range(3)] == [None] * 3
            client.stop_stream()
            statistics = rest.get_inference_statistics("street", headers={"x-api-key": "k"})
            assert statistics["model_stats"][0]["inference_count"] == 3
            counted = httpx.get(f"{address}/metrics", headers={"x-api-key": "k"}).text
        route = 'fdconv_requests_total{route="grpc/ModelStreamInfer"'
        assert f'{route},status="OK"}} 3.0' in counted
        assert f'{route},status="UNAUTHENTICATED"}} 1.0' in counted


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_over_grpc_and_of_answers(
    served: Served, session, tensor, algorithm: str
) -> None:
    with grpc.InferenceServerClient(served.grpc) as client:
        found = client.infer("street", given(grpc, tensor), compression_algorithm=algorithm)
        assert close(found.as_numpy("logits"), session.run(tensor))
    with http.InferenceServerClient(served.http) as client:
        found = client.infer(
            "street",
            given(http, tensor),
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        assert close(found.as_numpy("logits"), session.run(tensor))


def test_shared_memory_is_refused_in_words(served: Served) -> None:
    with http.InferenceServerClient(served.http) as client:
        with pytest.raises(http.InferenceServerException, match="nothing at this address"):
            client.register_system_shared_memory("region", "/key", 64)
        with pytest.raises(http.InferenceServerException, match="nothing at this address"):
            client.get_cuda_shared_memory_status()
    with (
        grpc.InferenceServerClient(served.grpc) as client,
        pytest.raises(grpc.InferenceServerException, match="UNIMPLEMENTED"),
    ):
        client.register_system_shared_memory("region", "/key", 64)


def test_tls_over_http_and_grpc(bundles: list[Path], session, tensor, tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    authority, port = trustme.CA(), free_port()
    made = authority.issue_cert("127.0.0.1", "localhost")
    names = {name: tmp_path / f"{name}.pem" for name in ("ca", "certificate", "key")}
    authority.cert_pem.write_to_path(str(names["ca"]))
    made.cert_chain_pems[0].write_to_path(str(names["certificate"]))
    made.private_key_pem.write_to_path(str(names["key"]))
    settings = Settings(
        threads=1, grpc_port=port, tls_certificate=names["certificate"], tls_key=names["key"]
    )
    with running(bundles, settings=settings) as address:
        clients = (
            (http, address.removeprefix("https://"), {"ssl_options": {"ca_certs": names["ca"]}}),
            (grpc, f"localhost:{port}", {"root_certificates": str(names["ca"])}),
        )
        for module, url, options in clients:
            with module.InferenceServerClient(url, ssl=True, **options) as client:
                assert client.is_server_ready()
                found = client.infer("street", given(module, tensor))
                assert close(found.as_numpy("logits"), session.run(tensor))
