"""COCO files that other people's tools wrote: tests/real_packages/coco_exporters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from fdconv_deploy.coco_rle import decode
from fdconv_deploy.evaluation.coco import read_coco
from fdconv_deploy.evaluation.coco_annotations import counted
from fdconv_deploy.evaluation.compare import Target, evaluate
from tests.evaluation.drawn_streets import as_found, drawn

FILES = Path(__file__).parents[1] / "real_packages" / "coco_exporters"


def test_labelme2coco() -> None:
    """Paths from where it was called, ids from 0, boxes beside polygons, one object of nothing."""
    folder = FILES / "labelme2coco"
    data = read_coco(folder / "dataset.json", folder / "labelled")
    assert [sample.name for sample in data] == ["0.png", "1.png", "2.png"]
    assert data.category_ids(("car", "person", "sign")) == [1, 2, 3]
    assert len(data.truth["annotations"]) == 5
    assert counted(data.checked.left_out) == [
        "3 masks (an empty list)", "1 box (not of four numbers)",
    ]  # fmt: skip
    assert data.checked.left_out[-2].found == "[]"  # the box that it gives a flat polygon
    assert data.checked.ignored == {"bbox": set(), "segmentation": {2, 5}}
    # The same from where the tool was called.
    assert len(read_coco(folder / "dataset.json", folder)) == 3


def test_supervision() -> None:
    """Polygons, and uncompressed run lengths of what has pieces or holes, which it calls crowds."""
    folder = FILES / "supervision"
    data = read_coco(folder / "annotations.json", folder / "images")
    objects = data.truth["annotations"]
    assert len(objects) == 10
    assert counted(data.checked.left_out) == ["4 masks (an empty list)"]
    assert [entry["iscrowd"] for entry in objects] == [0, 1, 1, 0, 0] * 2
    holed = decode(objects[2]["segmentation"])
    assert not holed[20:30, 70:80].any()
    assert holed.sum() == 42 * 30 - 100


@pytest.mark.parametrize(
    ("name", "images"),
    [("labelme2coco/dataset", "labelled"), ("supervision/annotations", "images")],
)
def test_masks_are_what_pycocotools_makes_of_them(name: str, images: str) -> None:
    file = FILES / f"{name}.json"
    data = read_coco(file, file.parent / images)
    theirs = COCO(str(file))
    told = [entry for entry in json.loads(file.read_text())["annotations"] if entry["segmentation"]]
    ours = [
        decode(entry["segmentation"])
        for entry in data.truth["annotations"]
        if entry["id"] not in data.checked.ignored["segmentation"]
    ]
    assert len(told) == len(ours) > 2
    for entry, mask in zip(told, ours, strict=True):
        np.testing.assert_array_equal(mask, theirs.annToMask(entry))


def test_supervisions_crowds_are_told() -> None:
    folder = FILES / "supervision"
    data = read_coco(folder / "annotations.json", folder / "images")
    _, things = drawn()[0]
    nothing = as_found(things, (64, 96)).kept(2.0)
    target = Target("none", lambda image: nothing, ("person", "car", "sign"), {"backend": "none"})
    told = evaluate([target], data).as_dict()
    assert (told["objects"], told["crowds"]) == (10, 4)
