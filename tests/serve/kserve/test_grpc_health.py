"""gRPC's health checks and reflection, as Kubernetes and grpcurl ask for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdconv_deploy.serve import Settings, running
from tests.serve.kserve.conftest import Served, free_port

grpc = pytest.importorskip("grpc")
# The messages as bytes, as the protocol has them: service = 1, status = 1.
SERVING, NOT_SERVING, SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"


def asked(service: str) -> bytes:
    name = service.encode()
    return b"\x0a" + bytes([len(name)]) + name if name else b""


@contextlib.contextmanager
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as opened:
        yield opened


def check(opened: grpc.Channel, service: str = "") -> bytes:
    call = opened.unary_unary("/grpc.health.v1.Health/Check")
    return call(asked(service), timeout=60)


def watch(opened: grpc.Channel, service: str = ""):
    return opened.unary_stream("/grpc.health.v1.Health/Watch")(asked(service), timeout=120)


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService", "street"])
def test_check_of_a_ready_service(served: Served, service: str) -> None:
    with channel(served.grpc) as opened:
        assert check(opened, service) == SERVING


def test_check_of_an_unknown_service(served: Served) -> None:
    with channel(served.grpc) as opened:
        with pytest.raises(grpc.RpcError) as error:
            check(opened, "none")
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        assert next(watch(opened, "none")) == SERVICE_UNKNOWN


def test_watch_tells_of_a_model_that_is_unloaded_and_loaded(served: Served) -> None:
    triton = pytest.importorskip("tritonclient.grpc")
    with triton.InferenceServerClient(served.grpc) as client, channel(served.grpc) as opened:
        seen = watch(opened, "sliding")
        assert next(seen) == SERVING
        client.unload_model("sliding")
        assert next(seen) == NOT_SERVING
        assert check(opened, "sliding") == NOT_SERVING
        assert check(opened) == SERVING
        client.load_model("sliding")
        assert next(seen) == SERVING
        seen.cancel()


def test_probes_need_no_key_and_are_below_info(bundles: list[Path], caplog) -> None:
    port = free_port()
    settings = Settings(threads=1, grpc_port=port, api_keys=("k",))
    with (
        running(bundles, settings=settings),
        caplog.at_level("DEBUG", "fdconv.access"),
        channel(f"127.0.0.1:{port}") as opened,
    ):
        assert check(opened) == SERVING
        opened.unary_unary("/inference.GRPCInferenceService/ServerReady")(b"")
        with pytest.raises(grpc.RpcError, match="API key"):
            opened.unary_unary("/inference.GRPCInferenceService/ModelReady")(asked("street"))
    levels = [record.levelname for record in caplog.records]
    assert levels == ["DEBUG", "DEBUG", "INFO"]


def test_idle_streams_give_way_to_others(bundles: list[Path]) -> None:
    """Streams on which nobody sends anything do not keep anybody out."""
    port, triton = free_port(), pytest.importorskip("tritonclient.grpc")
    settings = Settings(threads=1, grpc_port=port, max_connections=20)
    with running(bundles, settings=settings), channel(f"127.0.0.1:{port}") as opened:
        seen = []
        for _ in range(30):
            seen.append(watch(opened))
            assert next(seen[-1]) == SERVING
        assert check(opened) == SERVING
        with pytest.raises(grpc.RpcError, match="others had no place") as error:
            next(seen[0])
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            assert client.is_server_ready()
        for one in seen:
            one.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_and_describes_the_services(served: Served, version: str) -> None:
    pytest.importorskip("grpc_reflection", reason="grpcio-reflection is not installed")
    from google.protobuf import descriptor_pb2
    from grpc_reflection.v1alpha import reflection_pb2 as messages

    requests = [
        messages.ServerReflectionRequest(list_services=""),
        messages.ServerReflectionRequest(file_containing_symbol="inference.ModelInferRequest"),
        messages.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health"),
        messages.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health.Check"),
        messages.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health.None"),
        messages.ServerReflectionRequest(file_containing_symbol="nothing.of.that.Name"),
    ]
    with channel(served.grpc) as opened:
        call = opened.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=messages.ServerReflectionRequest.SerializeToString,
            response_deserializer=messages.ServerReflectionResponse.FromString,
        )
        listed, inference, health, method, *none = call(iter(requests), timeout=60)
    names = [service.name for service in listed.list_services_response.service]
    assert names == ["grpc.health.v1.Health", "inference.GRPCInferenceService"]
    found = [
        descriptor_pb2.FileDescriptorProto.FromString(
            answer.file_descriptor_response.file_descriptor_proto[0]
        )
        for answer in (inference, health, method)
    ]
    assert [file.package for file in found] == ["inference", *["grpc.health.v1"] * 2]
    codes = [answer.error_response.error_code for answer in none]
    assert codes == [grpc.StatusCode.NOT_FOUND.value[0]] * 2
