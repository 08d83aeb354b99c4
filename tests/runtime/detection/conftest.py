from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fdconv_deploy.runtime import open_session
from tests.runtime import toy_detector


@pytest.fixture(scope="session")
def detector_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector's bundle, 64×96, three classes, masks, batches 1 and 4."""
    return toy_detector.make_bundle(tmp_path_factory.mktemp("toy") / "detector").path


@pytest.fixture(scope="session")
def box_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``detector_bundle``, without masks."""
    arch = toy_detector.architecture(masks=False)
    return toy_detector.make_bundle(tmp_path_factory.mktemp("toy") / "boxes", arch=arch).path


@pytest.fixture
def detector(detector_bundle: Path):
    with open_session(detector_bundle, threads=1) as session:
        yield session


@pytest.fixture
def boxes_only(box_bundle: Path):
    with open_session(box_bundle, threads=1) as session:
        yield session


def picture(height: int = 50, width: int = 70, seed: int = 7) -> np.ndarray:
    """(height, width, 3) uint8 RGB."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
