"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Small layers on two busy cores would spend their time waiting for each other's threads.
# Before torch is first imported, since it reads this once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def oracle() -> Path:
    """Folder of reference tensors computed with the published code."""
    path = Path(os.environ.get("FDCONV_ORACLE", ROOT.parent / "shared" / "oracle"))
    if not (path / "README.md").is_file():
        pytest.skip(f"no reference tensors at {path} (set FDCONV_ORACLE)")
    return path
