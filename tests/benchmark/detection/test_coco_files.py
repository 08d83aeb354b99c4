from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdconv_deploy.benchmark.datasets import DatasetError
from fdconv_deploy.benchmark.detection.coco_files import find_coco, read_coco


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
    assert (sample.name, sample.number, sample.image.shape) == ("a.png", 4, (6, 8, 3))
    assert not data.has_masks
    (entry,) = data.truth["annotations"]  # the other's image is not there
    assert (entry["id"], entry["iscrowd"]) == (1, 0)
    assert data.category_ids(("other", "thing")) == [2, 9]


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
    with pytest.raises(DatasetError) as caught:
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
        (lambda t: t["images"][0].pop("height"), "number 0 of images has no 'height'"),
        (lambda t: t["images"][0].update(height=7), "7x8"),
        (lambda t: t["annotations"][0].pop("area"), "has no 'area'"),
        (lambda t: t["annotations"][0].update(bbox=[1, 2]), "the bbox [1, 2]"),
        (lambda t: t["annotations"][0].update(image_id=8), "no objects in 1 images"),
    ],
)
def test_refusals(files: tuple[Path, Path], change, says: str) -> None:
    told = json.loads(files[0].read_text())
    change(told)
    files[0].write_text(json.dumps(told))
    assert says in refusal(files)


def test_not_json_or_not_there(files: tuple[Path, Path], tmp_path: Path) -> None:
    files[0].write_text("{")
    assert "not JSON" in refusal(files)
    files[0].write_text("[]")
    assert "no list of images" in refusal(files)
    assert "is none" in refusal((tmp_path / "none.json", files[1]))
    assert "folder of images" in refusal((files[0], tmp_path / "none"))
