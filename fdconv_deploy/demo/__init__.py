"""A trained FDConv segmentor of drawn streets, its plain twin, and held-out scenes.

`scenes` draws the streets, `metrics` scores predictions; ``examples/streets/train.py``
trained what is packaged here and wrote down how, in ``assets/training.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = [
    "HELD_OUT_SEEDS",
    "held_out",
    "packaged_checkpoint",
    "plain_checkpoint",
    "training_record",
]

# No training scene has one of these seeds: see TRAINING_SEEDS in examples/streets/train.py.
HELD_OUT_SEEDS = range(9_000_000, 9_000_016)

_ASSETS = Path(__file__).parent / "assets"


def packaged_checkpoint() -> Path:
    """The FDConv segmentor, a checkpoint as mmengine publishes it."""
    return _asset("streets.pth")


def plain_checkpoint() -> Path:
    """Its twin with plain convolutions, trained on the same scenes in the same order."""
    return _asset("streets_plain.pth")


def held_out() -> list[tuple[Path, Path]]:
    """(image, labels) files of the held-out scenes, in the order of ``HELD_OUT_SEEDS``.

    Images are RGB PNGs; labels are PNGs of class indices with the classes' palette.
    """
    folder = _asset("heldout")
    names = [f"{index:03d}" for index in range(len(HELD_OUT_SEEDS))]
    return [(folder / f"{name}.png", folder / f"{name}_labels.png") for name in names]


def training_record() -> dict[str, Any]:
    """What the training script measured and wrote: scores of both networks, steps, time."""
    record: dict[str, Any] = json.loads(_asset("training.json").read_text())
    return record


def _asset(name: str) -> Path:
    path = _ASSETS / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing from this installation. Reinstall fdconv-deploy, or make it "
            "anew with `python examples/streets/train.py`."
        )
    return path
