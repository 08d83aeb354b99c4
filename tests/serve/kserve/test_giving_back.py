"""Whatever becomes of a request, its place, memory, bytes and model are free again."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fdconv_deploy.runtime import Session
from fdconv_deploy.serve import Settings, running
from tests.serve.kserve.conftest import free_port
from tests.serve.test_http_limits import place, until

grpc = pytest.importorskip("grpc")
GAUGES = ("in_hand_images", "memory_bytes", "body_bytes", "queue_images", "running_images")
INFER = "/inference.GRPCInferenceService"
FORM = "Content-Type: multipart/form-data; boundary=xx"
# Seconds after a request was sent: before and after it is watched whether its client stays.
LEFT_AFTER = (0.0, 0.01, 0.07)


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def part(data: bytes) -> bytes:
    head = b'--xx\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    return head + data + b"\r\n"


def tensors(model: str, shape: list[int], data: list | None = None, **more: Any) -> bytes:
    given: dict[str, Any] = {"name": "images", "datatype": "UINT8", "shape": shape}
    size = int(np.prod(shape))
    given |= {"parameters": {"binary_data_size": size}} if data is None else {"data": data}
    head = json.dumps({"inputs": [given], **more}).encode()
    length = () if data is not None else (f"Inference-Header-Content-Length: {len(head)}",)
    tail = b"" if data is not None else bytes(size)
    return post(f"/v2/models/{model}/infer", head + tail, *length)


def whole_requests(png: bytes) -> list[bytes]:
    """Requests on every route that takes images or tensors: answered, refused, too late."""
    image, two = "Content-Type: image/png", part(png) + part(png) + b"--xx--\r\n"
    return [
        post("/v1/segment", png, image),
        post("/v1/segment?output=overlay", png, image),
        post("/v1/segment?output=logits", png, image),
        post("/v1/models/sliding/segment", png, image),
        post("/v1/models/things/segment?min_score=0", png, image),
        post("/v1/segment", two, FORM),
        post("/v1/models/sliding/segment", two, FORM),
        post("/v1/segment", part(png) + part(png[:90]) + b"--xx--\r\n", FORM),
        post("/v1/segment", png[: len(png) // 2], image),
        post("/v1/segment", b"text", image),
        post("/v1/segment?mode=slide", png, image),
        post("/v1/segment", png, image, "Content-Encoding: gzip"),
        post("/v1/segment", png, image, "X-Timeout-Ms: 5"),
        post("/v1/segment", two, FORM, "X-Timeout-Ms: 5"),
        post("/v1/models/sliding/segment", png, image, "X-Timeout-Ms: 5"),
        tensors("street", [2, 32, 48, 3]),
        tensors("things", [1, 64, 96, 3]),
        tensors("street", [2, 32, 48, 3], [7] * 9216),
        tensors("street", [8, 32, 48, 3], [7] * 36864),
        tensors("street", [8, 32, 48, 3], [7] * 36863 + [256]),
        tensors("street", [2, 32, 47, 3]),
        tensors("street", [1, 32, 48, 3], outputs=[{"name": "x"}]),
        tensors("street", [2, 32, 48, 3], parameters={"timeout": 5000}),
        tensors("street", [8, 32, 48, 3], [7] * 36864, parameters={"timeout": 1}),
        post("/v2/repository/index", b"{}"),
        post("/v2/repository/index", b"["),
        post("/v2/repository/models/street/load", b""),
    ]


@pytest.fixture(scope="module")
def service(bundles: list[Path], detectors: list[Path]) -> Iterator[tuple[str, Any]]:
    """The address of a service whose runs take their time, and a channel to it."""
    run, port = Session.run_batches, free_port()

    def slowly(session: Session, inputs: Any) -> Any:
        time.sleep(random.uniform(0.0, 0.05))
        return run(session, inputs)

    settings = Settings(threads=1, grpc_port=port, model_control=True, max_images=8)
    with (
        pytest.MonkeyPatch.context() as patch,
        running([*bundles, detectors[0]], settings=settings) as url,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        patch.setattr(Session, "run_batches", slowly)
        yield url, channel


def check_free(url: str, png: bytes) -> None:
    """Nothing is in hand, and an image is answered."""

    def free() -> bool:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return all(f"fdconv_{gauge} 0.0" in lines for gauge in GAUGES)

    until(free)
    answer = httpx.post(f"{url}/v1/segment", content=png, headers={"Content-Type": "image/png"})
    assert answer.status_code == 200


def test_of_http(service: tuple[str, Any], png: bytes) -> None:
    url = service[0]
    for request in whole_requests(png):
        for seconds in LEFT_AFTER:
            with socket.create_connection(place(url), timeout=60) as plug:
                plug.sendall(request)
                time.sleep(seconds)
        for cut in (len(request) // 2, len(request) - 1):  # its body does not come
            with socket.create_connection(place(url), timeout=60) as plug:
                plug.sendall(request[:cut])
        with socket.create_connection(place(url), timeout=60) as plug:
            plug.sendall(request)
            assert plug.recv(9) == b"HTTP/1.1 "
    check_free(url, png)


def test_of_grpc(service: tuple[str, Any], png: bytes) -> None:
    from fdconv_deploy.serve.kserve.grpc_server import MESSAGES

    url, channel = service

    def message(model: str, shape: list[int], size: int, **parameters: int) -> bytes:
        found = MESSAGES["ModelInferRequest"](model_name=model, raw_input_contents=[bytes(size)])
        found.inputs.add(name="images", datatype="UINT8", shape=shape)
        for name, value in parameters.items():
            found.parameters[name].int64_param = value
        return bytes(found.SerializeToString())

    sent = [
        message("street", [2, 32, 48, 3], 9216),
        message("things", [1, 64, 96, 3], 18432),
        message("street", [2, 32, 48, 3], 9215),
        message("street", [2, 32, 48, 3], 9216, timeout=5000),
        message("street", [2, 32, 48, 3], 9216, sequence_id=1),
        message("nobody", [2, 32, 48, 3], 9216),
        b"\xff\xff",
    ]
    once = channel.unary_unary(f"{INFER}/ModelInfer")
    stream = channel.stream_stream(f"{INFER}/ModelStreamInfer")
    for data in sent:
        for seconds in LEFT_AFTER:
            call = once.future(data, timeout=60)
            time.sleep(seconds)
            call.cancel()
            answers = stream(iter([data] * 5))
            time.sleep(seconds)
            answers.cancel()
        once.future(data, timeout=0.003).exception(timeout=60)
        once.future(data, timeout=60).exception(timeout=60)
    check_free(url, png)


def test_of_models(service: tuple[str, Any]) -> None:
    """No request of the tests before this one holds a model any more: it ends at once."""
    url = service[0]

    def held() -> set[str]:
        return set(
            re.findall('fdconv_model_bytes{model="(.+?)"}', httpx.get(f"{url}/metrics").text)
        )

    assert held() == {"street", "sliding", "things"}
    for name in sorted(held()):
        assert httpx.post(f"{url}/v2/repository/models/{name}/unload").status_code == 200
    assert held() == set()
