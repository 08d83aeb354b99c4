"""Trained FDConv networks of drawn streets, and held-out scenes.

`scenes` draws the streets, `instances` tells the things in them apart. A segmentor and its plain
twin were trained by ``examples/streets/train.py``, a detector by ``examples/instances``. How,
and how well they do, stands in ``assets/training.json`` and ``assets/instances_training.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = [
    "HELD_OUT_SEEDS",
    "detector_record",
    "held_out",
    "held_out_instances",
    "packaged_checkpoint",
    "packaged_detector",
    "plain_checkpoint",
    "training_record",
]

# No training scene has one of these seeds: see TRAINING_SEEDS in examples/training/scenes.py.
HELD_OUT_SEEDS = range(9_000_000, 9_000_016)

_ASSETS = Path(__file__).parent / "assets"
_INSTANCES = "python -m examples.instances.train"


def packaged_checkpoint() -> Path:
    """The FDConv segmentor, a checkpoint as mmengine publishes it."""
    return _asset("streets.pth")


def plain_checkpoint() -> Path:
    """Its twin with plain convolutions, trained on the same scenes in the same order."""
    return _asset("streets_plain.pth")


def packaged_detector() -> Path:
    """A Mask R-CNN with FDConv that finds people, cars and signs, as mmdetection 2.x saves one."""
    return _asset("instances.pth", _INSTANCES)


def held_out() -> list[tuple[Path, Path]]:
    """(image, labels) files of the held-out scenes, in the order of ``HELD_OUT_SEEDS``.

    Images are RGB PNGs; labels are PNGs of class indices with the classes' palette.
    """
    folder = _asset("heldout")
    names = [f"{index:03d}" for index in range(len(HELD_OUT_SEEDS))]
    return [(folder / f"{name}.png", folder / f"{name}_labels.png") for name in names]


def held_out_instances() -> Path:
    """What is to be found in the held-out scenes: annotations as COCO has them."""
    return _asset("heldout/instances.json", _INSTANCES)


def training_record() -> dict[str, Any]:
    """What the training script measured and wrote: scores of both networks, steps, time."""
    record: dict[str, Any] = json.loads(_asset("training.json").read_text())
    return record


def detector_record() -> dict[str, Any]:
    """How the detector was trained, and its scores in PyTorch and as a bundle."""
    record: dict[str, Any] = json.loads(_asset("instances_training.json", _INSTANCES).read_text())
    return record


def _asset(name: str, made_by: str = "python -m examples.streets.train") -> Path:
    path = _ASSETS / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing from this installation. Reinstall fdconv-deploy, or make it "
            f"anew with `{made_by}`."
        )
    return path
