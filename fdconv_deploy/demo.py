"""The demo's networks and scenes: trained FDConv networks of synthetic streets.

They lie in the repository's folder ``examples/assets``, not in the installed package, which serves
others' bundles. A segmentor and its baseline with plain convolutions were trained by
``examples/streets/train.py``, a detector by ``examples/instances``; how, and how well they do, is
in ``training.json`` and ``instances_training.json`` there.
"""

from __future__ import annotations

import os
from pathlib import Path

from fdconv_deploy.errors import FDConvError

# No training scene has one of these seeds: see TRAINING_SEEDS in examples/training/scenes.py.
HELD_OUT_SEEDS = range(9_000_000, 9_000_016)

# The assets' folder, where the package is not used from a clone of the repository.
SWITCH = "FDCONV_DEMO_ASSETS"
_CLONE = Path(__file__).resolve().parents[1] / "examples" / "assets"


def assets_folder() -> Path:
    """The demo's files: ``FDCONV_DEMO_ASSETS``, or the clone's folder ``examples/assets``."""
    return Path(os.environ.get(SWITCH) or _CLONE)


def packaged_checkpoint() -> Path:
    """The FDConv segmentor, a checkpoint as mmengine publishes it."""
    return _asset("streets.pth")


def plain_checkpoint() -> Path:
    """Its baseline with plain convolutions, trained on the same scenes in the same order."""
    return _asset("streets_plain.pth")


def packaged_detector() -> Path:
    """A Mask R-CNN with FDConv that finds people, cars and signs, as mmdetection 2.x saves one."""
    return _asset("instances.pth")


def held_out() -> list[tuple[Path, Path]]:
    """(image, labels) files of the held-out scenes, in the order of ``HELD_OUT_SEEDS``.

    Images are RGB PNGs; labels are PNGs of class indices with the classes' palette.
    """
    folder = _asset("heldout")
    names = [f"{index:03d}" for index in range(len(HELD_OUT_SEEDS))]
    return [(folder / f"{name}.png", folder / f"{name}_labels.png") for name in names]


def held_out_instances() -> Path:
    """What is to be found in the held-out scenes: annotations as COCO has them."""
    return _asset("heldout/instances.json")


def _asset(name: str) -> Path:
    path = assets_folder() / name
    if not path.exists():
        raise FDConvError(
            f"The demo's {name} is not at {path}. The demo's networks are part of the repository, "
            f"not of the installed package: run it from a clone (make demo), or set {SWITCH} to "
            "the clone's folder examples/assets."
        )
    return path
