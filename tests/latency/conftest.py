from __future__ import annotations

from pathlib import Path

import pytest

from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.export import export_checkpoint
from tests.runtime import toy


@pytest.fixture(scope="package")
def toy_bundle(tmp_path_factory) -> Path:
    """A segmentor of one convolution at 32×48, batches 1 and 4."""
    return toy.make_bundle(tmp_path_factory.mktemp("speed") / "toy").path


@pytest.fixture(scope="package")
def other_bundle(tmp_path_factory) -> Path:
    """The same, batch 1 only."""
    return toy.make_bundle(tmp_path_factory.mktemp("speed") / "other", batches=(1,)).path


@pytest.fixture(scope="package")
def streets(tmp_path_factory) -> Path:
    """A bundle of the packaged network at 96×128, batch 1."""
    path = tmp_path_factory.mktemp("speed") / "streets"
    return export_checkpoint(packaged_checkpoint(), path, size=(96, 128)).path


@pytest.fixture(autouse=True)
def _as_if_no_native_operators_were_built(monkeypatch) -> None:
    """Whatever this machine has; tests of native operators ask for them by name."""
    monkeypatch.setenv("FDCONV_NATIVE", "0")
