"""The packaged held-out scenes, written out as the data sets have theirs on disk."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from fdconv_deploy.demo import held_out


@cache
def truths() -> list[np.ndarray]:
    return [np.asarray(Image.open(labels)).astype(np.int64) for _, labels in held_out()]


def save(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.astype(np.uint8)).save(path)


def ade20k(root: Path) -> Path:
    """``images/validation`` and ``annotations/validation``, classes from 1.

    Images are PNGs here, so that their pixels are the packaged ones; JPEGs are tested apart.
    """
    for index, (image, _) in enumerate(held_out()):
        name = f"ADE_val_{index + 1:08d}"
        place = root / "images" / "validation" / f"{name}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, place)
        save(root / "annotations" / "validation" / f"{name}.png", truths()[index] + 1)
    # As unpacked, there are training images beside them.
    save(root / "images" / "training" / "ADE_train_00000001.png", np.zeros((4, 4)))
    return root


# Label ids of Cityscapes that have train ids 0 to 10.
LABEL_IDS = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23])


def cityscapes(root: Path, kind: str) -> Path:
    """``leftImg8bit/val/CITY`` and ``gtFine/val/CITY``; kind labelTrainIds or labelIds."""
    for index, (image, _) in enumerate(held_out()):
        city = ("frankfurt", "lindau", "munster")[index % 3]
        name = f"{city}_{index:06d}_000019"
        place = root / "leftImg8bit" / "val" / city / f"{name}_leftImg8bit.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, place)
        labels = truths()[index]
        masks = root / "gtFine" / "val" / city
        if kind == "labelIds":
            labels = LABEL_IDS[labels]
        save(masks / f"{name}_gtFine_{kind}.png", labels)
        # What else lies there.
        save(masks / f"{name}_gtFine_instanceIds.png", np.zeros((4, 4)))
        (masks / f"{name}_gtFine_polygons.json").write_text("{}")
    return root
