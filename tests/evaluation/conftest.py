"""Networks that the evaluation's tests score, and what they are scored on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.streets.instances import CLASSES, coco_annotations
from fdconv_deploy.checkpoints import save_checkpoint
from fdconv_deploy.config import SegmentorConfig
from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.export import export_checkpoint
from tests.checkpoints.small import small_architecture, weights_of
from tests.evaluation.drawn_streets import drawn
from tests.runtime import toy_detector


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


@pytest.fixture(scope="package")
def street_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``annotations/instances_val2017.json`` and ``val2017``, and a training part beside it."""
    root = tmp_path_factory.mktemp("coco")
    scenes = []
    for part in ("train2017", "val2017"):
        (root / part).mkdir()
        (root / "annotations").mkdir(exist_ok=True)
        scenes = []
        for number, (image, things) in enumerate(drawn()):
            Image.fromarray(image).save(root / part / f"{number:012d}.png")
            scenes.append((f"{number:012d}.png", things))
        file = root / "annotations" / f"instances_{part}.json"
        file.write_text(json.dumps(coco_annotations(scenes)))
    (root / "annotations" / "captions_val2017.json").write_text("{}")
    return root


@pytest.fixture(scope="package")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy detector's bundle that names the streets' things."""
    arch = toy_detector.architecture(classes=CLASSES)
    path = tmp_path_factory.mktemp("detector") / "toy"
    return toy_detector.make_bundle(path, arch=arch).path
