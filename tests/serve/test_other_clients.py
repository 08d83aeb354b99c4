"""Java's HttpClient, Node's fetch and curl: the programs of benchmarks.serving.clients."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fdconv_deploy.runtime import Session, open_session
from fdconv_deploy.serve import Settings, running

PROGRAMS = Path(__file__).parents[2] / "benchmarks" / "serving" / "clients"
COLUMNS = {"health", "metadata", "infer", "config", "statistics"}


@pytest.fixture(scope="module")
def address(bundles: list[Path]) -> Iterator[str]:
    with running(bundles, settings=Settings(threads=1)) as found:
        yield found.removeprefix("http://")


@pytest.fixture(scope="module")
def inference(bundles: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The JSON of a request, its binary tensor, and the labels that are the answer's end."""
    pixels = np.random.default_rng(6).integers(0, 256, (1, 32, 48, 3), dtype=np.uint8)
    session: Session
    with open_session(bundles[0], threads=1) as session:
        labels = session.segment(pixels[0]).labels
    tensor = {
        "name": "images",
        "datatype": "UINT8",
        "shape": list(pixels.shape),
        "parameters": {"binary_data_size": pixels.nbytes},
    }
    outputs = [{"name": "labels", "parameters": {"binary_data": True}}]
    folder = tmp_path_factory.mktemp("inference")
    files = [folder / name for name in ("head.json", "tensor", "labels")]
    files[0].write_text(json.dumps({"inputs": [tensor], "outputs": outputs}))
    files[1].write_bytes(pixels.tobytes())
    files[2].write_bytes(labels.tobytes())
    return files


def needs(program: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")


def said(*command: object) -> bytes:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.parametrize(
    ("program", "file"), [("java", "JavaClient.java"), ("node", "node_client.mjs")]
)
def test_default_clients_of_other_languages(
    address: str, inference: list[Path], program: str, file: str
) -> None:
    """Java's offers HTTP/2 with the first request of a connection, which may have a body."""
    needs(program)
    found = json.loads(said(program, PROGRAMS / file, address, "street", *inference))
    assert found["cells"] == dict.fromkeys(COLUMNS, "ok")


def test_curl_that_offers_http2(address: str, inference: list[Path], tmp_path: Path) -> None:
    needs("curl")
    head, tensor, labels = (path.read_bytes() for path in inference)
    (tmp_path / "body").write_bytes(head + tensor)
    ask = ("curl", "-sS", "--http2", "--fail-with-body", "-w", "%{stderr}%{http_version}")
    assert json.loads(said(*ask, f"http://{address}/v2/health/ready")) == {"ready": True}
    answer = said(
        *(*ask, "-H", f"Inference-Header-Content-Length: {len(head)}"),
        *("--data-binary", f"@{tmp_path / 'body'}"),
        f"http://{address}/v2/models/street/infer",
    )
    assert answer.endswith(labels)
