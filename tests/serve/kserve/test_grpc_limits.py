"""What a gRPC client can do by sending or reading too little: bounded, and no others kept out."""

from __future__ import annotations

import queue
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from fdconv_deploy.serve import Settings, running
from tests.serve.kserve.conftest import free_port
from tests.serve.kserve.test_grpc_health import SERVING, check, watch
from tests.serve.test_http_limits import wait_for

grpc = pytest.importorskip("grpc")
PROTOCOL = "/inference.GRPCInferenceService"


@contextmanager
def opened(bundles: list[Path], **settings: float) -> Iterator[tuple[grpc.Channel, int]]:
    """A channel to a service with these settings, and its port."""
    port = free_port()
    found = Settings(threads=1, grpc_port=port, **settings)
    with running(bundles, settings=found), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel, port


@contextmanager
def silent(channel: grpc.Channel, count: int, method: str = "ModelInfer") -> Iterator[list]:
    """Calls that begin and send no message, in the order in which they began."""
    end = threading.Event()

    def nothing() -> Iterator[bytes]:
        end.wait(300)
        yield from ()

    with ExitStack() as stack:
        stack.callback(end.set)
        calls = []
        for _ in range(count):
            calls.append(channel.stream_unary(f"{PROTOCOL}/{method}").future(nothing()))
            stack.callback(calls[-1].cancel)
        yield calls


def live(channel: grpc.Channel) -> bytes:
    return channel.unary_unary(f"{PROTOCOL}/ServerLive")(b"", timeout=60)


def test_calls_without_a_message_do_not_keep_others_out(bundles: list[Path]) -> None:
    """The longest idle give their places up; health would be answered even without."""
    with opened(bundles, max_connections=20) as (channel, _), silent(channel, 60) as calls:
        assert "others had no place" in calls[0].exception(timeout=60).details()
        for _ in range(30):
            assert live(channel) == b"\x08\x01"
            assert check(channel) == SERVING
            name = channel.unary_unary(f"{PROTOCOL}/ServerMetadata")(b"", timeout=60)
            assert b"fdconv" in name


def test_a_message_has_to_arrive_in_time(bundles: list[Path]) -> None:
    with opened(bundles, body_seconds=0.3) as (channel, _), silent(channel, 1) as calls:
        error = calls[0].exception(timeout=60)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "within 0.3 s" in error.details()


def test_a_stream_may_wait_for_its_first_message(bundles: list[Path]) -> None:
    """Clients of cameras open their stream at the start, and have the first image much later."""
    triton, found = pytest.importorskip("tritonclient.grpc"), queue.Queue()
    with (
        opened(bundles, body_seconds=0.3) as (channel, port),
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        client.start_stream(lambda result, error: found.put(error or result))
        with silent(channel, 1) as calls:
            assert "within 0.3 s" in calls[0].exception(timeout=60).details()
        images = triton.InferInput("images", (1, 3, 32, 48), "FP32")
        images.set_data_from_numpy(np.zeros((1, 3, 32, 48), np.float32))
        client.async_stream_infer("street", [images])
        assert found.get(timeout=60).as_numpy("labels").shape == (1, 32, 48)
        client.stop_stream()


@pytest.mark.parametrize("method", [f"{PROTOCOL}/ModelInfer", "/grpc.health.v1.Health/Watch"])
def test_a_call_that_ends_without_a_message(bundles: list[Path], method: str) -> None:
    with opened(bundles) as (channel, _):
        with pytest.raises(grpc.RpcError, match="without a message") as error:
            list(channel.stream_stream(method)(iter(()), timeout=60))
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_what_is_idle_does_not_keep_the_service_from_stopping(bundles: list[Path]) -> None:
    stopped, port = threading.Event(), free_port()
    service = ExitStack()
    settings = Settings(threads=1, grpc_port=port, drain_seconds=600)
    service.enter_context(running(bundles, settings=settings))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, silent(channel, 3) as calls:
        seen = watch(channel)
        assert next(seen) == SERVING
        threading.Thread(target=lambda: (service.close(), stopped.set())).start()
        for call in calls:
            error = call.exception(timeout=60)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert error.details() == "The service is stopping."
        assert stopped.wait(100)


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """A frame of HTTP/2, RFC 9113."""
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + body


def unread(method: str, message: bytes = b"") -> bytes:
    """All that a client sends that has room for no byte of the answer."""
    head = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "x"}
    head |= {"content-type": "application/grpc", "te": "trailers"}
    names = b"".join(
        b"\x00" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode()
        for k, v in head.items()
    )
    no_window = struct.pack(">HI", 4, 0)
    data = b"\x00" + struct.pack(">I", len(message)) + message
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"".join(
        [
            frame(4, 0, 0, no_window),
            frame(4, 1, 0, b""),
            frame(1, 4, 1, names),
            frame(0, 1, 1, data),
        ]
    )


@pytest.mark.parametrize("method", ["ServerMetadata", "ModelMetadata"])
def test_an_answer_that_is_not_read_is_given_up(bundles: list[Path], method: str) -> None:
    port = free_port()
    settings = Settings(threads=1, grpc_port=port, write_seconds=0.5)
    with (
        running(bundles, settings=settings) as url,
        socket.create_connection(("127.0.0.1", port), timeout=60) as plug,
    ):
        plug.sendall(unread(f"{PROTOCOL}/{method}", b"\x0a\x06street"))
        wait_for(url, f'route="grpc/{method}",status="CANCELLED"}} 1.0')
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert live(channel)
