from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fdconv_deploy.config import TestMode
from fdconv_deploy.serve import Settings, create_app
from tests.runtime import toy, toy_detector


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two segmentors: "street" (whole, batches 1 and 4) and "sliding" (slide)."""
    folder = tmp_path_factory.mktemp("served")
    test = TestMode(mode="slide", crop_size=(32, 48), stride=(20, 30))
    return [
        toy.make_bundle(folder / "street").path,
        toy.make_bundle(
            folder / "sliding", arch=toy.architecture(test=test), batches=(2,), seed=1
        ).path,
    ]


@pytest.fixture(scope="session")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two detectors: "things" (masks, batches 1 and 4) and "boxes" (no masks)."""
    folder = tmp_path_factory.mktemp("served")
    boxes = toy_detector.architecture(masks=False)
    return [
        toy_detector.make_bundle(folder / "things").path,
        toy_detector.make_bundle(folder / "boxes", arch=boxes, batches=(1,)).path,
    ]


@pytest.fixture(scope="session")
def detecting(detectors: list[Path]) -> Iterator[TestClient]:
    """A service of the two detectors, "things" first."""
    app = create_app(detectors, Settings(threads=1))
    with TestClient(app, raise_server_exceptions=False) as opened:
        wait_until_ready(opened)
        yield opened


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(threads=1, max_body_bytes=200_000, max_pixels=40_000)


@pytest.fixture(scope="session")
def client(bundles: list[Path], settings: Settings) -> Iterator[TestClient]:
    app = create_app(bundles, settings)
    with TestClient(app, raise_server_exceptions=False) as opened:
        wait_until_ready(opened)
        yield opened


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """(50, 70, 3) uint8 RGB."""
    return np.random.default_rng(3).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def png(picture: np.ndarray) -> bytes:
    return encoded(picture, "PNG")


def encoded(image: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def wait_until_ready(client: TestClient) -> None:
    for _ in range(60_000):
        if client.get("/readyz").status_code == 200:
            return
    raise AssertionError("the service did not become ready")


def typed(line: str, folder: Path, address: str) -> Path | None:
    """Run a ``curl`` line of the documentation in ``folder``; the file it writes, if any."""
    line = line.replace("localhost:8000", address)
    subprocess.run(["bash", "-c", line], cwd=folder, check=True, capture_output=True, timeout=60)
    written = re.search(r"-o (\S+)", line)
    return folder / written[1] if written else None
