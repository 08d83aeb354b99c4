"""Masks' numbers to classes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fdconv_deploy.benchmark.labels import LabelRule, cityscapes_classes, read_label_map
from fdconv_deploy.errors import FDConvError

CLASSES = ("road", "sky", "car")


def mask(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int64)


def test_numbers_are_classes_by_default():
    truth = LabelRule(3).apply(mask([0, 1, 2], [255, 2, 0]))
    assert truth.tolist() == [[0, 1, 2], [-1, 2, 0]]


def test_reduce_zero_label_as_mmsegmentation_does_it():
    raw = np.random.default_rng(0).integers(0, 152, (40, 50)).astype(np.uint8)
    raw[raw == 151] = 255
    # Its three lines, in uint8 as there.
    expected = raw.copy()
    expected[expected == 0] = 255
    expected = expected - 1
    expected[expected == 254] = 255
    truth = LabelRule(150, reduce_zero_label=True).apply(raw.astype(np.int64))
    np.testing.assert_array_equal(np.where(truth < 0, 255, truth), expected)


def test_more_than_255_classes_have_a_class_255():
    truth = LabelRule(300, ignore=65535).apply(mask([255, 299, 65535]))
    assert truth.tolist() == [[255, 299, -1]]


def test_a_label_map_comes_first(tmp_path):
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"0": None, "7": "sky", "9": 2, "11": "car", "12": 255}))
    rule = LabelRule(3, read_label_map(file, CLASSES))
    assert rule.apply(mask([0, 7, 9], [11, 12, 255])).tolist() == [[-1, 1, 2], [2, -1, -1]]
    reduced = LabelRule(3, {5: 0, 6: 3}, reduce_zero_label=True)
    assert reduced.apply(mask([5, 6])).tolist() == [[-1, 2]]


@pytest.mark.parametrize(
    ("rule", "raw", "message"),
    [
        (LabelRule(3), [0, 3, 3], "has 2 pixels of label 3; .* 0 to 2.*--reduce-zero-label"),
        (LabelRule(3), [0, 9], "1 pixels of label 9.*--label-map"),
        (LabelRule(3, {0: 0}), [0, 4], "names label 4, which the label map does not have"),
        (LabelRule(3, {0: 7}), [0], "has 1 pixels of label 0"),
        (LabelRule(3, ignore=254), [255], "label 255.*254 stands for pixels"),
    ],
)
def test_what_is_no_class_is_refused(rule, raw, message):
    with pytest.raises(ValueError, match=message):
        rule.apply(mask(raw))


# The evaluated classes of Cityscapes by label id, from its published table of labels.
CITY = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip


def test_cityscapes_ids():
    raw = np.arange(34, dtype=np.int64).reshape(2, 17)
    truth = cityscapes_classes(raw)
    order = list(CITY)
    for label in range(34):
        expected = order.index(label) if label in CITY else -1
        assert truth.ravel()[label] == expected
    assert cityscapes_classes(mask([255])).tolist() == [[-1]]
    with pytest.raises(ValueError, match="label 34, and Cityscapes' label ids go from 0 to 33"):
        cityscapes_classes(mask([7, 34]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"a": 1}', "'a' is not a number"),
        ('{"1": "tree"}', "no class 'tree'; it has road, sky, car"),
        ('{"1": 1.5}', "not 1.5"),
        ('{"1": true}', "not True"),
        ('{"1": -1}', "not -1"),
    ],
)
def test_label_maps_that_are_none(tmp_path, text, message):
    file = tmp_path / "map.json"
    file.write_text(text)
    with pytest.raises(FDConvError, match=message):
        read_label_map(file, CLASSES)
