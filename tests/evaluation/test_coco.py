from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.evaluation.coco import CocoSet, find_coco, read_coco
from fdconv_deploy.evaluation.datasets import DatasetError


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """One annotated image."""
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(images / "a.png")
    told = {
        "images": [{"id": 4, "file_name": "a.png", "height": 6, "width": 8}],
        "categories": [{"id": 9, "name": "thing"}, {"id": 2, "name": "other"}],
        "annotations": [
            {"id": 0, "image_id": 4, "category_id": 9, "bbox": [1, 1, 3, 3], "area": 9},
            {"id": 1, "image_id": 5, "category_id": 9, "bbox": [1, 1, 3, 3], "area": 9},
        ],
    }
    (tmp_path / "told.json").write_text(json.dumps(told))
    return tmp_path / "told.json", images


def test_reading(files: tuple[Path, Path]) -> None:
    data = read_coco(*files)
    (sample,) = data
    assert (sample.name, sample.number, sample.image.shape) == ("a.png", 1, (6, 8, 3))
    assert not data.checked.has_masks
    (entry,) = data.truth["annotations"]
    assert (entry["id"], entry["image_id"], entry["iscrowd"]) == (1, 1, 0)
    assert entry["category_id"] == data.category_ids(("thing",))[0]
    assert data.category_ids(("other", "thing")) == [1, 2]
    (left,) = data.checked.left_out
    assert str(left) == (
        "Annotation 1: of an image that is not listed: image_id 5; expected the id of a listed "
        "image."
    )


def test_layout(street_set: Path, tmp_path: Path) -> None:
    found = find_coco(street_set)
    assert found == (street_set / "annotations" / "instances_val2017.json", street_set / "val2017")
    assert find_coco(tmp_path) is None
    assert len(read_coco(*found, limit=2)) == 2


def test_several_parts_and_none_to_validate(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / "annotations" / f"instances_{name}.json").write_text("{}")
    with pytest.raises(DatasetError, match="several annotated parts"):
        find_coco(tmp_path)


def refusal(files: tuple[Path, Path]) -> str:
    with pytest.raises(FDConvError) as caught:
        list(read_coco(*files))
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("categories"), "no list of categories"),
        (lambda t: t.update(images=3), "no list of images"),
        (lambda t: t["images"][0].update(height=7), "7x8"),
        (lambda t: t["images"][0].update(height="6"), "'6'x8"),
        (lambda t: t["images"][0].update(id=[1]), "number 0 of images has the id [1]; expected a"),
        (lambda t: t["images"][0].update(id=None), "the id None"),
        (lambda t: t["images"][0].update(id=float("nan")), "the id nan"),
        (lambda t: t["images"][0].update(file_name=7), "has the file_name 7; expected a text"),
        (lambda t: t["images"][0].update(file_name="b.png"), "b.png does not exist"),
        (lambda t: t["images"][0].update(file_name=""), "is not a file"),
        (lambda t: t["images"][0].update(file_name="a\0.png"), "does not exist"),
        (lambda t: t["images"][0].update(file_name="a" * 5000), "cannot be opened"),
        (
            lambda t: t["images"].append({**t["images"][0], "file_name": "b.png"}),
            "'a.png' and 'b.png'",
        ),
        (lambda t: t["images"].insert(0, 3), "number 0 of images is 3"),
        (lambda t: t["images"][0].pop("file_name"), "has no 'file_name'"),
        (lambda t: t["categories"][1].update(name=["a"]), "number 1 of categories has the name"),
        (lambda t: t["categories"][0].update(id={}), "the id {}"),
        (lambda t: t["categories"][1].update(id=9), "of the id 9: 'thing' and 'other'"),
        (lambda t: t["annotations"][0].update(bbox=[1, 2]), "not of four numbers: [1, 2]"),
        (lambda t: t["annotations"][0].update(image_id=8), "no objects in 1 images that could be"),
        (lambda t: t["annotations"].clear(), "no objects in 1 images"),
    ],
)
def test_refusals(files: tuple[Path, Path], change, says: str) -> None:
    told = json.loads(files[0].read_text())
    change(told)
    files[0].write_text(json.dumps(told))
    assert says in refusal(files)


def read(files: tuple[Path, Path], change, limit: int | None = None) -> CocoSet:
    told = json.loads(files[0].read_text())
    change(told)
    files[0].write_text(json.dumps(told))
    return read_coco(*files, limit)


def test_what_exporters_leave_out_comes_from_the_image_and_the_box(files) -> None:
    def change(told: dict) -> None:
        for field in ("height", "width"):
            told["images"][0].pop(field)
        told["annotations"][0].pop("area")

    data = read(files, change)
    assert data.truth["images"][0]["width"] == 8
    assert data.truth["annotations"][0]["area"] == 9
    (noted,) = data.checked.noted
    assert (noted.part, noted.problem) == ("object", "without an area in the file")


def test_an_image_on_its_side_is_measured_as_it_is_read(files) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(files[1] / "a.png", exif=exif)
    data = read(files, lambda told: told["images"][0].update(height=8, width=6))
    (sample,) = data
    assert sample.image.shape == (8, 6, 3)


def test_ids_may_be_of_any_kind(files) -> None:
    """Numbers and texts in one file, which pycocotools cannot sort."""

    def change(told: dict) -> None:
        Image.new("RGB", (8, 6)).save(files[1] / "b.png")
        told["images"].append({"id": "4", "file_name": "b.png", "height": 6, "width": 8})
        told["categories"][1]["id"] = "x"
        told["annotations"][1].update(image_id="4", category_id="x", id=None)

    data = read(files, change)
    assert [entry["image_id"] for entry in data.truth["annotations"]] == [1, 2]
    assert [sample.name for sample in data] == ["a.png", "b.png"]
    assert data.category_ids(("other",)) == [2]
    assert len(read(files, lambda told: None, limit=1).truth["annotations"]) == 1


def test_an_image_listed_twice_is_one(files) -> None:
    data = read(files, lambda told: told["images"].append(dict(told["images"][0])))
    assert len(data) == 1


@pytest.mark.parametrize(
    "told",
    ["deep/a.png", "deep\\a.png", "images/deep/a.png", "/home/x/deep/a.png", "C:\\x\\deep\\a.png"],
)
def test_paths_as_exporters_write_them(files, told: str) -> None:
    (files[1] / "deep").mkdir()
    (files[1] / "a.png").rename(files[1] / "deep" / "a.png")
    (sample,) = read(files, lambda j: j["images"][0].update(file_name=told))
    assert sample.name == "deep/a.png"


def test_paths_that_end_in_one_file_are_refused(files) -> None:
    def change(told: dict) -> None:
        told["images"][0]["file_name"] = "train/a.png"
        told["images"].append({"id": 5, "file_name": "val/a.png"})

    with pytest.raises(DatasetError, match=r"has a\.png alone for both"):
        read(files, change)


def test_a_mark_at_the_beginning_is_no_fault(files) -> None:
    files[0].write_text(files[0].read_text(), encoding="utf-8-sig")
    assert len(read_coco(*files)) == 1


@pytest.mark.parametrize("half", ["\ud800", "a\udfff", "\udc80b"])
def test_findings_about_half_characters_can_be_written(files, half: str) -> None:
    told = json.loads(files[0].read_text())
    told["annotations"][1]["id"] = half
    told["categories"][1]["name"] = half
    files[0].write_text(json.dumps(told))
    data = read_coco(*files)
    (left,) = data.checked.left_out
    written = half.replace(half.strip("ab"), "?")
    assert written in str(left).encode().decode()
    assert data.truth["categories"][0]["name"] == written


def test_whole_characters_of_two_halves_stay(files) -> None:
    told = json.loads(files[0].read_text())
    told["categories"][1]["name"] = "💡"
    files[0].write_text(json.dumps(told))
    assert read_coco(*files).category_ids(("💡",)) == [1]


def test_categories_of_one_name(files) -> None:
    data = read(files, lambda told: told["categories"].append({"id": 3, "name": "thing"}))
    assert data.category_ids(("other",)) == [1]
    with pytest.raises(DatasetError, match="2 categories named 'thing'"):
        data.category_ids(("thing",))


def test_not_json_or_not_there(files: tuple[Path, Path], tmp_path: Path) -> None:
    files[0].write_text("{")
    assert "not JSON" in refusal(files)
    files[0].write_text("[" * 5000)
    assert "not JSON" in refusal(files)
    files[0].write_text('{"images": ' + "9" * 5000 + "}")
    assert "not JSON" in refusal(files)
    files[0].write_text("[]")
    assert "no list of images" in refusal(files)
    assert "is none" in refusal((tmp_path / "none.json", files[1]))
    assert "folder of images" in refusal((files[0], tmp_path / "none"))
