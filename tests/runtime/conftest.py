from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from fdconv_deploy.runtime import open_session
from tests.runtime import toy, toy_detector

# Importing torch inside an example, or a busy two-core runner, is no failure; pytest-timeout
# guards against hangs.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmentor's bundle, 32×48, five classes, batches 1 and 4. Read-only by custom."""
    return toy.make_bundle(tmp_path_factory.mktemp("toy") / "bundle").path


@pytest.fixture
def bundle_copy(tmp_path: Path) -> Path:
    """As ``toy_bundle``, to be damaged."""
    return toy.make_bundle(tmp_path / "bundle").path


@pytest.fixture
def image() -> np.ndarray:
    """(50, 70, 3) uint8 RGB."""
    return np.random.default_rng(7).integers(0, 256, (50, 70, 3), dtype=np.uint8)


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
