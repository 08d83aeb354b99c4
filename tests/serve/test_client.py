"""The Python client against a real server."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdconv_deploy.client import Client, ServiceError
from fdconv_deploy.runtime import open_session, read_image
from fdconv_deploy.serve import Settings, running

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def client(bundles: list[Path]) -> Iterator[Client]:
    settings = Settings(threads=1, api_keys=("k",))
    with running(bundles, settings=settings) as url, Client(url, api_key="k") as made:
        yield made


@pytest.fixture(scope="module")
def labels(bundles: list[Path], picture: np.ndarray) -> np.ndarray:
    with open_session(bundles[0], threads=1) as session:
        return session.segment(picture).labels


def test_client_segments(client: Client, picture, png: bytes, labels, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png)
    for image in (png, file, str(file), picture):
        answer = client.segment(image)
        assert np.array_equal(answer.labels, labels)
    assert sum(answer.areas.values()) == labels.size
    assert (answer.model, answer.mode, answer.fit) == ("street", "whole", "stretched")
    assert answer.timings_ms["inference"] > 0
    assert len(answer.request_id) == 32


def test_client_passes_options(client: Client, png: bytes, labels) -> None:
    answer = client.segment(png, classes=["class 1", 3])
    assert np.array_equal(answer.labels, np.where(np.isin(labels, [1, 3]), labels.astype(int), -1))
    assert client.segment(png, size="network").labels.shape == (32, 48)
    assert client.segment(png, "sliding", mode="whole").mode == "whole"


def test_client_gets_files(client: Client, picture, png: bytes, labels) -> None:
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(client.mask(png)))), labels)
    assert read_image(client.overlay(png, opacity=0)).tolist() == picture.tolist()
    assert client.overlay(png, kind="jpeg")[:3] == b"\xff\xd8\xff"
    found = client.logits(png, size="original")
    assert np.array_equal(found["logits"].argmax(axis=0), labels)


def test_client_infers(client: Client, bundles) -> None:
    batch = np.random.default_rng(1).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    with open_session(bundles[0], threads=1) as session:
        expected = session.run(batch)
    assert np.allclose(client.infer("street", batch), expected, rtol=1e-5, atol=1e-5)
    assert client.infer("street", batch, "labels").shape == (3, 32, 48)


def test_client_reads_cards(client: Client) -> None:
    assert [card["name"] for card in client.models()] == ["street", "sliding"]
    assert client.model("street")["input"] == {
        "channels": 3,
        "height": 32,
        "width": 48,
    }
    assert client.ready()


def test_client_raises_refusals(client: Client, png: bytes) -> None:
    with pytest.raises(ServiceError, match="no model of that name") as caught:
        client.segment(png, "none")
    assert caught.value.status == 404
    assert len(caught.value.request_id) == 32
    with pytest.raises(ServiceError) as caught:
        client.segment(png, "../none")
    assert caught.value.status == 404
    with pytest.raises(ServiceError, match="is not a JPEG"):
        client.segment(b"junk")
    with pytest.raises(ServiceError, match="bands and not colours"):
        client.segment(np.zeros((4, 4), np.uint8))
    with pytest.raises(ServiceError, match="real numbers"):
        client.segment(np.zeros((4, 4, 3), complex))
    with pytest.raises(ServiceError, match="API key"), Client(_url(client)) as stranger:
        stranger.models()


def _url(client: Client) -> str:
    return f"http://{client._connection.host}:{client._connection.port}"


def test_client_names_an_unreachable_service() -> None:
    client = Client("http://127.0.0.1:9", retries=0)
    assert not client.ready()
    with pytest.raises(ServiceError, match="cannot be reached"):
        client.models()
    with pytest.raises(ServiceError, match="looks like"):
        Client("localhost:8000")


def test_client_retries_when_turned_away() -> None:
    """A 503 with Retry-After, a broken connection, then an answer."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            if len(asked) == 2:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            body = b'{"models": []}' if len(asked) == 3 else b'{"detail": "Full."}'
            self.send_response(200 if len(asked) == 3 else 503)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert Client(url).models() == []
        assert len(asked) == 3
        with pytest.raises(ServiceError, match=r"Full\."):
            Client(url, retries=0).models()
    finally:
        server.shutdown()


def test_client_imports_no_service_and_no_runtime() -> None:
    code = (
        "import sys, fdconv_deploy.client\n"
        "bad = {'serve', 'fastapi', 'onnxruntime', 'torch', 'onnx', 'cv2', 'pydantic'}\n"
        "sys.exit(str(bad & set(sys.modules)) if bad & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
