"""The service to NVIDIA's own clients, over HTTP and gRPC."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fdconv_deploy.runtime import open_session
from fdconv_deploy.serve import Settings, running
from tests.serve.kserve.conftest import free_port

http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")


@pytest.fixture(params=["http", "grpc"])
def triton(request, served) -> Any:
    module: ModuleType = http if request.param == "http" else grpc
    client = module.InferenceServerClient(getattr(served, request.param))
    client.module = module
    yield client
    client.close()


def given(triton, array: np.ndarray, kind: str = "FP32"):
    tensor = triton.module.InferInput("images", array.shape, kind)
    tensor.set_data_from_numpy(array)
    return [tensor]


def wanted(triton, *names: str):
    return [triton.module.InferRequestedOutput(name) for name in names]


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal but for ONNX Runtime's order of sums, which depends on where a tensor lies."""
    return bool(np.allclose(found, expected, rtol=1e-5, atol=1e-5))


def as_dict(triton, found) -> Any:
    if triton.module is http:
        return found
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(found, preserving_proto_field_name=True)


def test_client_reads_health(triton) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("street")
    assert triton.is_model_ready("street", "1")


def test_client_reads_server_metadata(triton) -> None:
    found = as_dict(triton, triton.get_server_metadata())
    assert found["name"] == "fdconv-deploy"
    assert "binary_tensor_data" in found["extensions"]


def test_client_reads_model_metadata(triton) -> None:
    found = as_dict(triton, triton.get_model_metadata("street"))
    assert found["name"] == "street"
    assert found["versions"] == ["1"]
    inputs = [(t["name"], t["datatype"], [int(s) for s in t["shape"]]) for t in found["inputs"]]
    outputs = [(t["name"], t["datatype"], [int(s) for s in t["shape"]]) for t in found["outputs"]]
    assert inputs == [("images", "FP32", [-1, 3, 32, 48])]
    assert outputs == [("logits", "FP32", [-1, 5, 8, 12]), ("labels", "UINT8", [-1, 32, 48])]


def test_client_infers_float(triton, session, tensor) -> None:
    found = triton.infer("street", given(triton, tensor), outputs=wanted(triton, "logits"))
    assert close(found.as_numpy("logits"), session.run(tensor))
    assert found.as_numpy("labels") is None


def test_client_infers_pixels(triton, session, pixels) -> None:
    found = triton.infer("street", given(triton, pixels, "UINT8"), request_id="abc")
    assert close(found.as_numpy("logits"), session.run(pixels))
    expected = [session.segment(image).labels for image in pixels]
    assert np.array_equal(found.as_numpy("labels"), np.stack(expected))
    assert as_dict(triton, found.get_response())["id"] == "abc"


def test_client_infers_asynchronously(triton, session, tensor) -> None:
    import queue

    done: queue.Queue = queue.Queue()
    asked = [tensor[:1] + n for n in range(4)]
    if triton.module is http:
        pending = [triton.async_infer("street", given(triton, x)) for x in asked]
        found = [p.get_result() for p in pending]
    else:
        for n, x in enumerate(asked):
            triton.async_infer(
                "street",
                given(triton, x),
                callback=lambda result, error, n=n: done.put((n, error or result)),
            )
        by_number = dict(done.get(timeout=60) for _ in asked)
        found = [by_number[n] for n in range(4)]
    for x, answer in zip(asked, found, strict=True):
        assert close(answer.as_numpy("logits"), session.run(x))


def test_client_infers_json_tensors(served, session, pixels) -> None:
    client = http.InferenceServerClient(served.http)
    tensor = http.InferInput("images", pixels.shape, "UINT8")
    tensor.set_data_from_numpy(pixels, binary_data=False)
    outputs = [http.InferRequestedOutput(name, binary_data=False) for name in ("labels", "logits")]
    found = client.infer("street", [tensor], outputs=outputs)
    assert np.allclose(found.as_numpy("logits"), session.run(pixels), rtol=1e-6)
    assert found.as_numpy("labels").dtype == np.uint8


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_client_infers_compressed(served, session, tensor, algorithm: str) -> None:
    client = http.InferenceServerClient(served.http)
    x = http.InferInput("images", tensor.shape, "FP32")
    x.set_data_from_numpy(tensor)
    found = client.infer("street", [x], request_compression_algorithm=algorithm)
    assert close(found.as_numpy("logits"), session.run(tensor))


@pytest.mark.parametrize(
    ("array", "kind", "says"),
    [
        (np.zeros((1, 3, 32, 47), np.float32), "FP32", "shape"),
        (np.zeros((9, 3, 32, 48), np.float32), "FP32", "from 1 to 8"),
        (np.zeros((1, 3, 32, 48), np.float64), "FP64", "FP32"),
        (np.zeros((1, 3, 32, 48), np.uint8), "UINT8", "shape"),
        (np.zeros((3, 32, 48), np.float32), "FP32", "shape"),
    ],
)
def test_client_is_refused_other_tensors(triton, array, kind: str, says: str) -> None:
    with pytest.raises(triton.module.InferenceServerException, match=says):
        triton.infer("street", given(triton, array, kind))


def test_client_is_refused_other_names(triton, tensor) -> None:
    error = triton.module.InferenceServerException
    with pytest.raises(error, match="no model of that name"):
        triton.infer("none", given(triton, tensor))
    with pytest.raises(error, match="no version '7'"):
        triton.infer("street", given(triton, tensor), model_version="7")
    with pytest.raises(error, match="no output 'scores'"):
        triton.infer("street", given(triton, tensor), outputs=wanted(triton, "scores"))
    other = triton.module.InferInput("x", tensor.shape, "FP32")
    other.set_data_from_numpy(tensor)
    with pytest.raises(error, match="'images'"):
        triton.infer("street", [other])


def test_client_timeout_is_a_deadline(triton, tensor) -> None:
    with pytest.raises(triton.module.InferenceServerException, match=r"deadline|Deadline"):
        triton.infer("street", given(triton, tensor), timeout=1)


def test_client_loads_and_unloads_models(triton, tensor) -> None:
    def states() -> dict[str, str]:
        found = as_dict(triton, triton.get_model_repository_index())
        entries = found if isinstance(found, list) else found["models"]
        return {entry["name"]: entry["state"] for entry in entries}

    assert states() == {"street": "READY", "sliding": "READY"}
    triton.unload_model("sliding")
    assert states()["sliding"] == "UNAVAILABLE"
    assert not triton.is_model_ready("sliding")
    with pytest.raises(triton.module.InferenceServerException, match="unloaded"):
        triton.infer("sliding", given(triton, tensor))
    triton.load_model("sliding")
    assert triton.is_model_ready("sliding")
    triton.infer("sliding", given(triton, tensor))


def config_of(triton, model: str, version: str = "") -> dict[str, Any]:
    found = as_dict(triton, triton.get_model_config(model, version))
    return found["config"] if triton.module is grpc else found


def test_client_reads_model_config(triton) -> None:
    found = config_of(triton, "street")
    assert config_of(triton, "street", "1") == found
    (images,), outputs = found["input"], found["output"]
    assert found["name"] == "street"
    assert found["platform"] == "onnxruntime_onnx"
    assert (images["name"], images["data_type"]) == ("images", "TYPE_FP32")
    assert [int(d) for d in images["dims"]] == [3, 32, 48]
    assert [(o["name"], o["data_type"]) for o in outputs] == [
        ("logits", "TYPE_FP32"),
        ("labels", "TYPE_UINT8"),
    ]
    assert found["max_batch_size"] == 8  # of Settings.max_images
    assert found["dynamic_batching"]["preferred_batch_size"] == [1, 4]


def statistics_of(triton, *model: str) -> dict[str, dict[str, Any]]:
    """Numbers by model, whichever way: JSON's 64-bit integers in protobuf are strings."""
    found = as_dict(triton, triton.get_inference_statistics(*model))
    return {entry["name"]: entry for entry in found["model_stats"]}


def count(entry: dict[str, Any], *path: str) -> int:
    for key in path:
        entry = entry.get(key, {})
    return int(entry or 0)  # type: ignore[call-overload]


def test_client_reads_statistics(triton, tensor) -> None:
    before = statistics_of(triton, "street")["street"]
    triton.infer("street", given(triton, tensor))
    triton.infer("street", given(triton, tensor[:1]))
    with pytest.raises(triton.module.InferenceServerException):
        triton.infer("street", given(triton, tensor), timeout=1)
    after = statistics_of(triton, "street", "1")["street"]

    def more(*path: str) -> int:
        return count(after, *path) - count(before, *path)

    assert more("inference_count") == 4
    assert 2 <= more("execution_count") <= 5
    stages = ("success", "queue", "compute_input", "compute_infer", "compute_output")
    assert [more("inference_stats", s, "count") for s in stages] == [2] * 5
    assert more("inference_stats", "fail", "count") == 1
    spent = [more("inference_stats", stage, "ns") for stage in stages]
    assert 0 < spent[0] == sum(spent[1:])
    runs = [(count(b, "batch_size"), b["compute_infer"]) for b in after["batch_stats"]]
    assert sum(count(run, "count") for _, run in runs) == count(after, "execution_count")
    assert {size for size, _ in runs} <= {1, 2, 3, 4}
    assert count(after, "last_inference") > 1.7e12  # milliseconds
    if triton.module is not grpc:  # as Triton writes them over REST
        assert (after["response_stats"], after["memory_usage"]) == ({}, [])


def test_client_reads_statistics_of_all_models(triton) -> None:
    assert sorted(statistics_of(triton)) == ["sliding", "street"]


def test_client_is_refused_config_and_statistics_of_other_names(triton) -> None:
    error = triton.module.InferenceServerException
    for ask in (triton.get_model_config, triton.get_inference_statistics):
        with pytest.raises(error, match="no model of that name"):
            ask("none")
        with pytest.raises(error, match="no version '7'"):
            ask("street", "7")


def test_client_reads_a_model_called_stats(bundles, tmp_path, tensor) -> None:
    """Its metadata and every model's statistics have one address over HTTP."""
    folder = Path(shutil.copytree(bundles[0], tmp_path / "stats"))
    port = free_port()
    settings = Settings(threads=1, grpc_port=port)
    with (
        open_session(bundles[1], threads=1) as other,
        running([folder, other], settings=settings) as address,
    ):
        for module, url in ((http, address.removeprefix("http://")), (grpc, f"127.0.0.1:{port}")):
            client = module.InferenceServerClient(url)
            client.module = module
            assert client.is_model_ready("stats")
            assert as_dict(client, client.get_model_metadata("stats"))["name"] == "stats"
            assert sorted(statistics_of(client)) == ["sliding", "stats"]
            assert sorted(statistics_of(client, "stats")) == ["stats"]
            assert config_of(client, "stats")["name"] == "stats"
            client.infer("stats", given(client, tensor[:1]))
            client.close()


def test_grpc_requests_have_ids_and_a_line_in_the_log(served, tensor, caplog) -> None:
    import grpc as grpcio

    from fdconv_deploy.serve.kserve.grpc_server import MESSAGES, PROTOCOL

    with (
        caplog.at_level("INFO", "fdconv.access"),
        grpcio.insecure_channel(served.grpc) as channel,
    ):
        ask = channel.unary_unary(
            f"/{PROTOCOL.full_name}/ModelMetadata",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=MESSAGES["ModelMetadataResponse"].FromString,
        )
        request = MESSAGES["ModelMetadataRequest"](name="street")
        _, call = ask.with_call(request, metadata=[("x-request-id", "mine-1")])
        assert dict(call.trailing_metadata())["x-request-id"] == "mine-1"
        with pytest.raises(grpcio.RpcError) as error:
            ask(MESSAGES["ModelMetadataRequest"](name="none"), metadata=[("x-request-id", "a b")])
        assert len(dict(error.value.trailing_metadata())["x-request-id"]) == 32
    first, second = (record.fields for record in caplog.records[-2:])
    assert (first["request_id"], first["status"]) == ("mine-1", "OK")
    assert first["path"] == "/inference.GRPCInferenceService/ModelMetadata"
    assert second["status"] == "NOT_FOUND"


def test_grpc_bytes_in_hand_are_bounded(bundles, tensor) -> None:
    port = free_port()
    settings = Settings(threads=1, grpc_port=port, max_bytes_in_hand=1000)
    with running(bundles, settings=settings):
        client = grpc.InferenceServerClient(f"127.0.0.1:{port}")
        x = grpc.InferInput("images", tensor.shape, "FP32")
        x.set_data_from_numpy(tensor)
        with pytest.raises(grpc.InferenceServerException, match="bytes of requests"):
            client.infer("street", [x])
        assert client.is_server_ready()
        client.close()


def test_grpc_calls_at_a_time_are_bounded(bundles, tensor) -> None:
    """Past the bound a call is turned away before anybody looks at it."""
    import queue
    import threading

    port = free_port()
    settings = Settings(threads=1, grpc_port=port, queue_limit=0)
    with open_session(bundles[0], threads=1) as session:
        run, go_on = session.run_batches, threading.Event()

        def held(inputs):
            assert go_on.wait(60)
            return run(inputs)

        with running([session], settings=settings):
            session.run_batches = held  # type: ignore[method-assign]
            client = grpc.InferenceServerClient(f"127.0.0.1:{port}")
            x = grpc.InferInput("images", (1, *tensor.shape[1:]), "FP32")
            x.set_data_from_numpy(tensor[:1])
            done: queue.Queue = queue.Queue()
            for _ in range(40):
                client.async_infer("street", [x], callback=lambda result, error: done.put(error))
            turned_away = [str(done.get(timeout=60)) for _ in range(39)]
            assert all("UNAVAILABLE" in e or "RESOURCE_EXHAUSTED" in e for e in turned_away)
            go_on.set()
            assert done.get(timeout=60) is None
            client.close()
