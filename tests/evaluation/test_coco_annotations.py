"""Annotations as other people write them, held against what pycocotools makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from fdconv_deploy.evaluation.coco import CocoSet, read_coco
from fdconv_deploy.evaluation.coco_annotations import UnfitError, coco_mask, counted

HEIGHT, WIDTH = 20, 30
SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]
TRIANGLE = [4.5, 3.2, 20.25, 5, 9, 17]
NAN, INFINITE = float("nan"), float("inf")


def theirs(segmentation: Any) -> dict[str, Any]:
    """What COCO's own code makes of a segmentation; whatever it raises."""
    data = COCO()
    data.imgs = {1: {"height": HEIGHT, "width": WIDTH}}
    found = data.annToRLE({"image_id": 1, "segmentation": segmentation})
    counts = found["counts"]
    return {**found, "counts": counts if isinstance(counts, str) else counts.decode()}


def ours(segmentation: Any) -> dict[str, Any]:
    return dict(coco_mask(segmentation, HEIGHT, WIDTH))


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        [SQUARE, TRIANGLE],
        [[5, 5, 5, 5, 5, 5]],
        [[1, 1, 9, 1, 5, 1]],  # flat
        [SQUARE, [20, 4, 24, 4]],  # a second one of two points
        [SQUARE, []],
        [SQUARE, [3]],
        [[*TRIANGLE, 7]],  # half a point
        [["2", "2", "12", "2", "12", "12"]],
        [[-40, -40, 90, -40, 90, 90, -40, 90]],  # beyond the image
        [[True, 1, 9, 1, 9, 9]],
        {"size": [20, 30], "counts": [600]},
        {"size": [20, 30], "counts": [100, 50, 450]},
        {"size": [20, 30], "counts": [100, 0, 20, 30, 450]},
        {"size": [20, 30], "counts": [100.7, 50, 450]},
        {"size": [20, 30], "counts": ["100", 50, 450]},
        {"size": [20.0, 30.5], "counts": [100, 50, 450]},
        {"size": [20, 30, 3], "counts": [100, 50, 450]},
        {"size": [10, 30], "counts": [100, 50, 150]},  # another size
        [{"size": [20, 30], "counts": [100, 50, 450]}],
        [
            {"size": [20, 30], "counts": [100, 50, 450]},
            {"size": [20, 30], "counts": [120, 90, 390]},
        ],
    ],
    ids=repr,
)
def test_coco_mask_takes_what_pycocotools_takes_as_it_does(segmentation: Any) -> None:
    assert ours(segmentation) == theirs(segmentation)


def test_coco_mask_takes_compressed_run_lengths() -> None:
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    drawn[3:9, 4:20] = 1
    told = coco.encode(drawn)
    told = {"size": told["size"], "counts": told["counts"].decode()}
    assert ours(told) == theirs(told) == told


@pytest.mark.parametrize(
    ("segmentation", "found"),
    [
        ([[10, 20, 40, 20]], "a polygon of two points"),
        ([[10, 2, 14, 2], SQUARE], "a polygon of two points"),
        ([[1, 2]], "a list whose first part is not a polygon"),
        ([[]], "a list whose first part is not a polygon"),
        ([], "an empty list"),
        (SQUARE, "one list of numbers"),
        ([[[2, 2], [12, 2], [12, 12]]], "a list whose first part is not a polygon"),
        ([[[2, 2], [12, 2], [12, 12], [2, 12], [1, 5]]], "nested deeper"),
        ([SQUARE, [[2, 2], [12, 2]]], "nested deeper"),
        ([["a", "b", "c", "d", "e", "f"]], "not a list of numbers"),
        ([SQUARE, "12345"], "nested deeper than a list of numbers"),
        ([SQUARE, {"a": 1}], "not a list of numbers"),
        (None, "it is null"),
        (3, "it is a number"),
        ("abc", "it is text"),
        ({}, "run lengths without a size"),
        ({"counts": [600]}, "run lengths without a size"),
        ({"size": [20, 30]}, "run lengths without counts"),
        ({"size": ["20", 30], "counts": [600]}, "size is not [height, width]"),
        ({"size": [-20, -30], "counts": [600]}, "size is not [height, width]"),
        ({"size": 600, "counts": [600]}, "size is not [height, width]"),
        ({"size": [20, 30], "counts": [-5, 605]}, "not numbers from 0 on"),
        ({"size": [20, 30], "counts": [[600]]}, "not numbers from 0 on"),
        ({"size": [20, 30], "counts": 600}, "neither text nor a list"),
        ([{"size": [20, 30], "counts": "T3b1R>"}], "a list of compressed run lengths"),
        ([{"size": [20, 30], "counts": [600]}, SQUARE], "a list of run lengths and other things"),
    ],
    ids=repr,
)
def test_coco_mask_refuses_what_pycocotools_cannot_take(segmentation: Any, found: str) -> None:
    with pytest.raises(UnfitError) as caught:
        ours(segmentation)
    assert found in str(caught.value)
    assert caught.value.expected
    with pytest.raises(Exception):  # noqa: B017 - it raises whatever comes
        coco.area(theirs(segmentation))


@pytest.mark.parametrize(
    ("segmentation", "found"),
    [
        # It would never come back from these, or ask for gigabytes, or write beyond its memory.
        ({"size": [20, 30], "counts": [100, 50, 449]}, "do not add up"),
        ({"size": [20, 30], "counts": []}, "do not add up"),
        ({"size": [20, 30], "counts": "T3"}, "do not add up"),
        ({"size": [20, 30], "counts": [2**32 - 1, 601]}, "do not add up"),
        ({"size": [0, 30], "counts": [0]}, "size is not"),
        ({"size": [2**31, 2**31], "counts": [1]}, "size is not"),
        ({"size": [1.5, 0.5], "counts": [1]}, "size is not"),
        ({"size": [NAN, 30], "counts": [1]}, "size is not"),
        ({"size": [2**20, 2**20], "counts": [2**40]}, "more pixels than any image"),
        ({"size": [20, 30], "counts": "\x01ü"}, "other characters than COCO's"),
        ({"size": [20, 30], "counts": ""}, "other characters than COCO's"),
        ([{"size": [20, 30], "counts": [600]}, {"size": [20, 30], "counts": [9]}], "add up"),
        ([{"size": [20, 30], "counts": [600]}, {"size": [2, 3], "counts": [6]}], "several sizes"),
        ([[2, NAN, 12, 2, 12, 12]], "not finite"),
        ([[2, INFINITE, 12, 2, 12, 12]], "not finite"),
        ([[2, None, 12, 2, 12, 12]], "not finite"),
        ([[0, 0, 1e8, 0, 1e8, 1e8]], "millions of pixels long"),
        ([[0, 0, 1e300, 0, 12, 12]], "millions of pixels away"),
        ([[10**400, 0, 1, 0, 12, 12]], "not a list of numbers"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_coco_mask_refuses_what_pycocotools_would_not_survive(segmentation, found) -> None:
    with pytest.raises(UnfitError, match=found):
        ours(segmentation)


def made(folder: Path, *annotations: Any, **more: Any) -> CocoSet:
    """One image of 20x30, two categories, and annotations with the usual fields where they lack."""
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "a.png")
    usual = {
        "image_id": 1, "category_id": 1, "bbox": [2, 2, 10, 10], "area": 100, "iscrowd": 0,
        "segmentation": [SQUARE],
    }  # fmt: skip
    told = {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}],
        "annotations": [
            {"id": number, **usual, **entry} if isinstance(entry, dict) else entry
            for number, entry in enumerate(annotations, 1)
        ],
        **more,
    }
    (folder / "a.json").write_text(json.dumps(told))
    return read_coco(folder / "a.json", folder / "images")


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([NAN, 20, 30, 20], "not finite"),
        ([1, 2, INFINITE, 4], "not finite"),
        ([1, None, 3, 4], "not finite"),
        ([1, 2, 3], "not of four numbers"),
        ([[1], [2], [3], [4]], "not of four numbers"),
        ("1, 2, 3, 4", "not of four numbers"),
        ({"x": 1}, "not of four numbers"),
        (["a", "b", "c", "d"], "not of numbers"),
        ([1, [2], 3, 4], "not of numbers"),
        ([10**400, 2, 3, 4], "not of numbers"),
        (None, "missing"),
    ],
    ids=repr,
)
def test_a_box_that_is_none_leaves_the_mask_scored(tmp_path, box: Any, problem: str) -> None:
    data = made(tmp_path, {"bbox": box}, {})
    (left,) = data.checked.left_out
    assert (left.annotation, left.image, left.part, left.problem) == ("1", "a.png", "box", problem)
    assert "expected [x, y, width, height], four finite numbers" in str(left)
    assert data.checked.ignored == {"bbox": {1}, "segmentation": set()}
    assert data.truth["annotations"][0]["bbox"] == [1, 1, 12, 12]  # around its mask
    assert data.checked.has_masks


def test_a_mask_that_is_none_leaves_the_box_scored(tmp_path) -> None:
    data = made(tmp_path, {"segmentation": [[2, 2, 12, 2]]}, {"segmentation": None}, {})
    assert counted(data.checked.left_out) == [
        "1 mask (a polygon of two points)", "1 mask (it is null)",
    ]  # fmt: skip
    assert data.checked.ignored == {"bbox": set(), "segmentation": {1, 2}}
    assert coco.toBbox(data.truth["annotations"][0]["segmentation"]).tolist() == [2, 2, 10, 10]
    assert len(data.truth["annotations"]) == 3


def test_an_object_of_neither_is_left_out(tmp_path) -> None:
    data = made(tmp_path, {"bbox": [1], "segmentation": []}, {})
    assert len(data.truth["annotations"]) == 1
    assert counted(data.checked.left_out) == [
        "1 box (not of four numbers)", "1 mask (an empty list)",
    ]  # fmt: skip


@pytest.mark.parametrize("nothing", [None, []])
def test_a_file_of_boxes_alone_says_nothing_of_masks(tmp_path, nothing: Any) -> None:
    data = made(tmp_path, {"segmentation": nothing}, {"segmentation": nothing})
    assert not data.checked.has_masks
    assert not data.checked.left_out


@pytest.mark.parametrize(
    ("entry", "problem", "hint"),
    [
        ({"image_id": 7}, "of an image that is not listed", "image_id 7"),
        ({"image_id": "1"}, "of an image that is not listed", "image: 1 is, so write it as there"),
        ({"image_id": None}, "of no image", "image_id null"),
        ({"image_id": [1]}, "of an image that is not listed", "image_id [1]"),
        ({"category_id": 3}, "of a category that is not listed", "category_id 3"),
        ({"category_id": "2"}, "of a category that is not listed", "2 is, so write it as there"),
        ({"category_id": {}}, "of a category that is not listed", "category_id {}"),
        ({"iscrowd": None}, "of unknown iscrowd", "expected 0 or 1"),
        ({"iscrowd": "0"}, "of unknown iscrowd", "iscrowd '0'"),
        (5, "no annotation", "5; expected"),
        (None, "no annotation", "null; expected"),
    ],
    ids=repr,
)
def test_an_annotation_that_belongs_nowhere_is_left_out(tmp_path, entry, problem, hint) -> None:
    data = made(tmp_path, {}, entry)
    (left,) = data.checked.left_out
    assert (left.part, left.problem) == ("object", problem)
    assert hint in str(left)
    assert len(data.truth["annotations"]) == 1


def test_what_counts_all_the_same_is_noted(tmp_path) -> None:
    data = made(
        tmp_path,
        {"segmentation": [[5, 5, 5, 5, 5, 5]]},
        {"bbox": [2, 2, 0, 10]},
        {"segmentation": {"size": [10, 30], "counts": [100, 50, 150]}},
        {"area": "100"},
        {"area": None, "segmentation": None},
        {"id": 2},
    )
    assert [(one.annotation, one.part, one.problem) for one in data.checked.noted] == [
        ("1", "mask", "without a pixel"),
        ("2", "box", "without an area"),
        ("3", "mask", "of another size than its image"),
        ("4", "object", "without an area in the file"),
        ("5", "object", "without an area in the file"),
        ("2", "object", "an id of several annotations"),
    ]
    assert [entry["area"] for entry in data.truth["annotations"]][3:5] == [100, 100]
    assert len(data.truth["annotations"]) == 6
    assert "10x30 (height x width) for 20x30" in str(data.checked.noted[2])


def test_crowds_and_ids(tmp_path) -> None:
    data = made(tmp_path, {"iscrowd": True, "id": None}, {"iscrowd": 1.0, "id": 0}, {"id": "x"})
    assert [entry["iscrowd"] for entry in data.truth["annotations"]] == [1, 1, 0]
    assert [entry["id"] for entry in data.truth["annotations"]] == [1, 2, 3]
    assert not data.checked.noted
