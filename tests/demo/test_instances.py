"""Instances of drawn streets: they are the labels' things, and COCO reads them back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.streets.classes import CAR, PERSON, POLE
from examples.streets.instances import (
    CLASSES,
    COLOURS,
    SMALLEST,
    boxes_of,
    coco_annotations,
    draw_instances,
)
from examples.streets.scenes import draw, draw_scene
from fdconv_deploy.coco_rle import decode

LABEL = {"person": PERSON, "car": CAR, "sign": POLE}


@pytest.mark.parametrize("seed", [3, 9_000_000])
def test_the_image_is_the_scenes_own(seed):
    np.testing.assert_array_equal(draw_instances(seed)[0], draw_scene(seed)[0])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), height=st.integers(32, 200), width=st.integers(32, 280))
def test_things_are_what_the_labels_say(seed, height, width):
    """Every pixel of a car is some car's, every person's some person's, and none another's."""
    _, canvas = draw(seed, height, width)
    kinds = np.array(["", *canvas.kinds])[canvas.things]
    for name, label in LABEL.items():
        assert (canvas.labels[kinds == name] == label).all()
        if label != POLE:  # lamps are poles too
            assert (kinds[canvas.labels == label] == name).all()


@pytest.mark.parametrize("seed", range(6))
def test_boxes_fit_masks_that_do_not_overlap(seed):
    _, found = draw_instances(seed, 96, 128)
    assert len(found) == len(found.boxes) == len(found.masks) > 0
    assert found.masks.sum(0).max() == 1
    assert found.masks.sum((1, 2)).min() >= SMALLEST
    for (left, top, right, bottom), mask in zip(found.boxes.astype(int), found.masks, strict=True):
        assert mask[top:bottom, left:right].sum() == mask.sum()
        for line in (mask[top], mask[bottom - 1], mask[:, left], mask[:, right - 1]):
            assert line.any()


def test_every_class_is_common():
    labels = np.concatenate([draw_instances(seed, 96, 128)[1].labels for seed in range(30)])
    assert np.bincount(labels, minlength=len(CLASSES)).min() > 15
    assert len(COLOURS) == len(set(COLOURS)) == len(CLASSES)


def test_a_box_goes_round_its_pixels():
    mask = np.zeros((1, 8, 9), bool)
    mask[0, 2:4, 5] = mask[0, 3, 6:8] = True
    assert boxes_of(mask).tolist() == [[5, 2, 8, 4]]
    assert boxes_of(mask[:0]).shape == (0, 4)


def test_coco_says_where_everything_is():
    scenes = [(f"{seed}.png", draw_instances(seed, 96, 128)[1]) for seed in range(3)]
    content = coco_annotations(scenes)
    assert [c["name"] for c in content["categories"]] == list(CLASSES)
    assert [i["file_name"] for i in content["images"]] == ["0.png", "1.png", "2.png"]
    assert {(i["height"], i["width"]) for i in content["images"]} == {(96, 128)}
    flat = [(index, found, n) for index, (_, found) in enumerate(scenes) for n in range(len(found))]
    ids = [a["id"] for a in content["annotations"]]
    assert ids == list(range(1, len(flat) + 1))
    for (index, found, n), stored in zip(flat, content["annotations"], strict=True):
        assert stored["image_id"] == content["images"][index]["id"]
        assert content["categories"][found.labels[n]]["id"] == stored["category_id"]
        left, top, width, height = stored["bbox"]
        assert [left, top, left + width, top + height] == found.boxes[n].tolist()
        assert stored["area"] == found.masks[n].sum()
        np.testing.assert_array_equal(decode(stored["segmentation"]), found.masks[n])
