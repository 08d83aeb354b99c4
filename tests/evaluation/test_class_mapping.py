"""Masks' numbers to classes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.evaluation.class_mapping import (
    CITYSCAPES,
    CITYSCAPES_LABEL_IDS,
    LabelRule,
    ade20k_names,
    class_order,
    read_label_map,
)

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
        (LabelRule(3, {0: 0}), [0, 4], "label 4; not every number is in the label map"),
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
CITY_NAMES = tuple(CITY.values())


def test_cityscapes_ids():
    rule = LabelRule(19, CITYSCAPES_LABEL_IDS)
    truth = rule.apply(np.arange(34, dtype=np.int64).reshape(2, 17))
    for label in range(34):
        expected = CITY_NAMES.index(CITY[label]) if label in CITY else -1
        assert truth.ravel()[label] == expected
    assert rule.apply(mask([255])).tolist() == [[-1]]
    with pytest.raises(ValueError, match="label 34; Cityscapes' label ids go from 0 to 33"):
        rule.apply(mask([7, 34]))


def test_class_order_matches_classes_by_name():
    assert class_order(CITY_NAMES, CITYSCAPES, "Cityscapes") is None
    order = class_order(CITY_NAMES[::-1], CITYSCAPES, "Cityscapes")
    assert order == tuple(range(18, -1, -1))
    # The masks' 0 is road, which the turned network has last.
    assert LabelRule(19, order=order).apply(mask([0, 18, 255])).tolist() == [[18, 0, -1]]
    ids = LabelRule(19, CITYSCAPES_LABEL_IDS, order=order)
    assert ids.apply(mask([7, 33, 0])).tolist() == [[18, 0, -1]]


def test_class_order_forgives_case_and_spaces():
    written = tuple(f" {name.title()} ".replace(" ", "  ") for name in CITY_NAMES)
    assert class_order(written, CITYSCAPES, "Cityscapes") is None


def test_class_order_says_nothing_of_classes_without_names():
    assert class_order(tuple(f"class {n}" for n in range(19)), CITYSCAPES, "Cityscapes") is None
    with pytest.raises(FDConvError, match="the network has 'class 0', 'class 1'"):
        class_order(("class 0", "class 1"), CITYSCAPES, "Cityscapes")


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (
            ("tree", *CITY_NAMES[1:]),
            r"those of Cityscapes: only the network has 'tree' and only Cityscapes has 'road'\.",
        ),
        (CITY_NAMES[:-2], r"only Cityscapes has 'motorcycle', 'bicycle'\."),
        ((*CITY_NAMES, "tram"), r"only the network has 'tram'\."),
        (("a", "b", "c", "d", "e", "f", "g"), "'e', 2 more and only Cityscapes has 'road'"),
        ((*CITY_NAMES[:-1], "road"), "only the network has 'road' and only Cityscapes has 'bic"),
    ],
)
def test_class_order_names_what_differs(classes, says):
    with pytest.raises(FDConvError, match=says):
        class_order(classes, CITYSCAPES, "Cityscapes")


# As ADE20K's own table has its lines; names and their synonyms are three of its 150.
ADE = "Idx\tRatio\tTrain\tVal\tName\n" + "\n".join(
    f"{n}\t0.1\t9\t8\t{name}"
    for n, name in enumerate(["bed ", "television, television receiver, tv", "blind, screen"], 1)
)


def test_ade20k_names_come_from_its_own_table(tmp_path):
    assert ade20k_names(tmp_path) is None
    (tmp_path / "objectInfo150.txt").write_text(ADE)
    table = ade20k_names(tmp_path)
    assert table == [["bed"], ["television", "television receiver", "tv"], ["blind", "screen"]]
    # As mmsegmentation writes them, one of them a synonym.
    assert class_order(("bed ", "television receiver", "blind"), table, "ADE20K") is None
    assert class_order(("blind", "bed ", "television receiver"), table, "ADE20K") == (1, 2, 0)
    (tmp_path / "objectInfo150.txt").write_text("something else")
    assert ade20k_names(tmp_path) is None


def test_class_order_takes_a_synonym_for_one_class_alone():
    table = [["screen door", "screen"], ["blind", "screen"], ["screen"]]
    assert class_order(("screen", "blind", "screen door"), table, "ADE20K") == (2, 1, 0)
    with pytest.raises(FDConvError, match="only ADE20K has 'screen door'"):
        class_order(("blind", "screen"), table, "ADE20K")


def test_ignore_index_is_of_classes_as_mmsegmentation_has_it():
    """It comes after the label map and after reducing, and is not a number of the file."""
    assert LabelRule(3, reduce_zero_label=True, ignore=1).apply(mask([0, 1, 2, 3])).tolist() == [
        [-1, 0, -1, 2]
    ]
    assert LabelRule(3, {5: 0, 6: 1}, ignore=1).apply(mask([5, 6])).tolist() == [[0, -1]]
    assert LabelRule(3, {0: 0, 255: 1}).apply(mask([0, 255])).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 5000, "is not JSON"),
        ('{"1": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"' + "9" * 5000 + '": 1}', "is not a number"),
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
