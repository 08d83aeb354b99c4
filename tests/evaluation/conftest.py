"""Networks that the evaluation's tests score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fdconv_deploy.export import export_checkpoint

from fdconv_deploy.checkpoints import save_checkpoint
from fdconv_deploy.config import SegmentorConfig
from fdconv_deploy.demo import packaged_checkpoint
from tests.checkpoints.small import small_architecture, weights_of


@pytest.fixture(scope="package")
def streets(tmp_path_factory) -> Path:
    """A bundle of the packaged network, at a size that is not the scenes'."""
    path = tmp_path_factory.mktemp("evaluate") / "streets"
    return export_checkpoint(packaged_checkpoint(), path, size=(96, 128)).path


@pytest.fixture(scope="package")
def sliding(tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, bundle) of an untrained network that was tested in slide mode."""
    folder = tmp_path_factory.mktemp("slide")
    architecture: SegmentorConfig = small_architecture()
    torch.manual_seed(0)
    save_checkpoint(folder / "slide.pth", weights_of(architecture), architecture)
    bundle = export_checkpoint(folder / "slide.pth", folder / "bundle", size=(64, 64))
    return folder / "slide.pth", bundle.path
