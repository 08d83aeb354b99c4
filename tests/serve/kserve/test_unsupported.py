"""What Triton's clients can ask for and the service does not do is refused, never ignored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fdconv_deploy.serve.kserve.grpc_server import MESSAGES, PROTOCOL

http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")
plain = pytest.importorskip("grpc")


@pytest.fixture(params=["http", "grpc"])
def triton(request, served) -> Any:
    module = http if request.param == "http" else grpc
    client = module.InferenceServerClient(getattr(served, request.param))
    client.module = module
    yield client
    client.close()


def asking(triton, **output: Any) -> dict[str, Any]:
    """The arguments of an inference of zeros."""
    array = np.zeros((1, 3, 32, 48), np.float32)
    tensor = triton.module.InferInput("images", array.shape, "FP32")
    tensor.set_data_from_numpy(array)
    wanted = triton.module.InferRequestedOutput("labels", **output)
    return {"model_name": "street", "inputs": [tensor], "outputs": [wanted]}


def refused(triton, says: str, **call: Any) -> None:
    with pytest.raises(triton.module.InferenceServerException, match=says) as error:
        triton.infer(**call)
    # Such words are not answered with 5xx, after which clients try again.
    assert error.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


def test_classification(triton) -> None:
    refused(triton, "class_count", **asking(triton, class_count=3))


def test_classification_by_a_parameter_of_the_request(triton) -> None:
    refused(triton, "class_count", **asking(triton), parameters={"class_count": 3})


def test_shared_memory_of_an_input(triton) -> None:
    call = asking(triton)
    call["inputs"][0].set_shared_memory("region", 4 * 3 * 32 * 48)
    refused(triton, "shared memory", **call)


def test_shared_memory_of_an_output(triton) -> None:
    call = asking(triton)
    call["outputs"][0].set_shared_memory("region", 32 * 48)
    refused(triton, "shared memory", **call)


@pytest.mark.parametrize("sequence", [7, "seven"])
def test_sequences(triton, sequence: int | str) -> None:
    refused(triton, "keep sequences", **asking(triton), sequence_id=sequence, sequence_start=True)


def test_what_asks_for_nothing_is_taken(triton) -> None:
    found = triton.infer(**asking(triton), sequence_id=0, priority=1, timeout=0)
    assert found.as_numpy("labels").shape == (1, 32, 48)


@pytest.mark.parametrize(
    "given",
    [{"config": '{"max_batch_size": 4}'}, {"config": "{}", "files": {"file:1/model.onnx": b"x"}}],
)
def test_loading_in_another_way(triton, given: dict[str, Any]) -> None:
    with pytest.raises(triton.module.InferenceServerException, match="as its bundle says"):
        triton.load_model("street", **given)
    assert triton.is_model_ready("street", "1")


def test_model_ready_honours_versions(triton) -> None:
    assert triton.is_model_ready("street")
    assert triton.is_model_ready("street", "1")
    assert not triton.is_model_ready("street", "7")
    assert not triton.is_model_ready("none")


@pytest.mark.parametrize(
    "value",
    [
        {"int64_param": -1},
        {"string_param": "100"},
        {"bool_param": True},
        {"double_param": 1.5},
        {},
    ],
)
def test_grpc_timeouts_that_are_none(served, value: dict[str, Any]) -> None:
    request = MESSAGES["ModelInferRequest"](model_name="street")
    request.inputs.add(name="images", datatype="FP32", shape=[1, 3, 32, 48])
    request.raw_input_contents.append(bytes(4 * 3 * 32 * 48))
    request.parameters["timeout"].SetInParent()
    for kind, number in value.items():
        setattr(request.parameters["timeout"], kind, number)
    with plain.insecure_channel(served.grpc) as channel:
        infer = channel.unary_unary(
            f"/{PROTOCOL.full_name}/ModelInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )
        with pytest.raises(plain.RpcError, match="microseconds") as error:
            infer(request, timeout=60)
        assert error.value.code() is plain.StatusCode.INVALID_ARGUMENT
        del request.parameters["timeout"]
        for limit in ("0", "soon"):
            with pytest.raises(plain.RpcError, match="X-Timeout-Ms"):
                infer(request, timeout=60, metadata=[("x-timeout-ms", limit)])
        # Of several the first counts, as over HTTP.
        with pytest.raises(plain.RpcError, match="X-Timeout-Ms"):
            infer(request, timeout=60, metadata=[("x-timeout-ms", "0"), ("x-timeout-ms", "9")])


@pytest.mark.parametrize("method", ["RepositoryIndex", "RepositoryModelLoad"])
def test_repositories_by_name(served, method: str) -> None:
    request = MESSAGES[f"{method}Request"](repository_name="other")
    assert "repository_name" in invalid(served, method, request.SerializeToString())


def test_tensors_both_raw_and_in_numbers(served) -> None:
    request = MESSAGES["ModelInferRequest"](model_name="street")
    given = request.inputs.add(name="images", datatype="UINT8", shape=[1, 32, 48, 3])
    given.contents.uint_contents.append(1)
    request.raw_input_contents.append(bytes(32 * 48 * 3))
    assert "not in both" in invalid(served, "ModelInfer", request.SerializeToString())


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer", "ModelReady"])
def test_bytes_that_are_no_message(served, caplog, method: str) -> None:
    assert "not what this method takes" in invalid(served, method, b"\xff\xff")
    assert not caplog.records


def invalid(served, method: str, message: bytes) -> str:
    """What the service says of a message that it refuses as INVALID_ARGUMENT."""
    with plain.insecure_channel(served.grpc) as channel:
        call = channel.stream_stream(f"/{PROTOCOL.full_name}/{method}")
        with pytest.raises(plain.RpcError) as error:
            list(call(iter([message]), timeout=30))
    assert error.value.code() is plain.StatusCode.INVALID_ARGUMENT
    return error.value.details()
