from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fdconv_deploy.runtime import Session, open_session
from fdconv_deploy.serve import Settings, running


class Served(NamedTuple):
    http: str  # host:port
    grpc: str


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="package")
def served(bundles: list[Path]) -> Iterator[Served]:
    port = free_port()
    settings = Settings(threads=1, grpc_port=port, model_control=True, max_images=8)
    with running(bundles, settings=settings) as address:
        yield Served(address.removeprefix("http://"), f"127.0.0.1:{port}")


@pytest.fixture(scope="package")
def session(bundles: list[Path]) -> Iterator[Session]:
    with open_session(bundles[0], threads=1) as opened:
        yield opened


@pytest.fixture(scope="package")
def tensor() -> np.ndarray:
    """(3, 3, 32, 48) float32."""
    return np.random.default_rng(5).normal(size=(3, 3, 32, 48)).astype(np.float32)


@pytest.fixture(scope="package")
def pixels() -> np.ndarray:
    """(2, 32, 48, 3) uint8 RGB."""
    return np.random.default_rng(6).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
