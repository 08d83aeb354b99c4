"""AP on files as they come, held against pycocotools run on the same files by itself."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fdconv_deploy.evaluation.coco import AveragePrecision, CocoSet, average_precision, read_coco

Kind = Literal["bbox", "segm"]
HEIGHT, WIDTH = 200, 240
CATEGORIES = {7: "a", 2: "b", 11: "c"}
IMAGES = (5, 3, 9, 12)


def square(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def drawn(rng: np.random.Generator) -> list[float]:
    x, y = rng.uniform(0, 120), rng.uniform(0, 90)
    return [round(float(v), 2) for v in (x, y, *rng.uniform(8, 110, 2))]


def annotated(rng: np.random.Generator) -> list[dict[str, Any]]:
    entries = []
    for number in range(1, 61):
        box = drawn(rng)
        entries.append(
            {
                "id": number,
                "image_id": int(rng.choice(IMAGES)),
                "category_id": int(rng.choice(list(CATEGORIES))),
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(number % 10 == 0),
                "segmentation": square(*box),
            }
        )
    return entries


def odd(entries: list[dict[str, Any]]) -> None:
    """What COCO's own code takes, though it is odd."""
    entries[0]["segmentation"] = [[50, 50, 90, 50, 60, 50]]  # flat
    entries[1]["segmentation"].append([10, 10, 60, 10])
    entries[2]["segmentation"] = {"size": [80, 100], "counts": [200, 4000, 3800]}
    entries[3]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [9000, 5000, 34000]}
    entries[4]["bbox"] = [30, 30, 0, 40]
    entries[5]["bbox"] = [90, 90, -40, -40]
    entries[6]["bbox"] = [str(value) for value in entries[6]["bbox"]]
    entries[7]["image_id"] = 99
    entries[8]["category_id"] = 99
    entries[9]["image_id"] = float(entries[9]["image_id"])
    entries[11]["area"] = -5
    entries[12]["iscrowd"] = True
    entries[13]["segmentation"] = [[float("-30"), -30, 400, -30, 400, 400]]
    entries[14]["bbox"] = [1e30, 2, 1e30, 5]


def found_in(entries: list[dict[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Answers: some of what is annotated, moved a little, and some that is not."""
    boxes = [
        (entry["image_id"], entry["category_id"], np.array(drawn(rng)) * 0 + entry["bbox"])
        for entry in annotated(np.random.default_rng(0))
        if rng.random() < 0.7
    ]
    boxes += [
        (int(rng.choice(IMAGES)), int(rng.choice(list(CATEGORIES))), np.array(drawn(rng)))
        for _ in range(20)
    ]
    rows = []
    for image, category, box in boxes:
        moved = box + rng.normal(0, 2, 4)
        (rle,) = coco.frPyObjects(square(*moved), HEIGHT, WIDTH)
        rows.append(
            {
                "image_id": image,
                "category_id": category,
                "bbox": moved.tolist(),
                "segmentation": {**rle, "counts": rle["counts"].decode()},
                # Few different scores, so that their order matters.
                "score": float(rng.integers(1, 12)) / 12,
            }
        )
    return rows


def written(folder: Path, entries: list[dict[str, Any]]) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for image in IMAGES:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / f"{image}.png")
    told = {
        "images": [
            {"id": image, "file_name": f"{image}.png", "height": HEIGHT, "width": WIDTH}
            for image in IMAGES
        ],
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
        "annotations": entries,
    }
    (folder / "a.json").write_text(json.dumps(told))
    return folder / "a.json"


def theirs(file: Path, rows: list[dict[str, Any]], kind: Kind) -> np.ndarray:
    """pycocotools' own twelve numbers."""
    field = "bbox" if kind == "bbox" else "segmentation"
    keys = ("image_id", "category_id", "score", field)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        answers = truth.loadRes([{key: row[key] for key in keys} for row in rows])
        evaluator = COCOeval(truth, answers, kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


def ours(data: CocoSet, rows: list[dict[str, Any]], kind: Kind) -> AveragePrecision:
    numbers = {image: n for n, image in enumerate(sorted(IMAGES), 1)}
    classes = dict(zip(CATEGORIES, data.category_ids(tuple(CATEGORIES.values())), strict=True))
    renamed = [
        {**row, "image_id": numbers[row["image_id"]], "category_id": classes[row["category_id"]]}
        for row in rows
    ]
    return average_precision(data, renamed, list(classes.values()), kind)


def numbers(score: AveragePrecision) -> list[float]:
    values = vars(score)
    told = [values[name] for name in ("ap", "ap50", "ap75", "small", "medium", "large", "recall")]
    return [-1 if math.isnan(value) else value for value in told]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("change", [lambda entries: None, odd], ids=["plain", "odd"])
def test_average_precision_is_what_pycocotools_says(tmp_path: Path, change, kind: Kind) -> None:
    entries = annotated(np.random.default_rng(0))
    change(entries)
    file = written(tmp_path, entries)
    data = read_coco(file, tmp_path / "images")
    for seed in range(3):
        rows = found_in(entries, np.random.default_rng(seed))
        stats = theirs(file, rows, kind)
        assert numbers(ours(data, rows, kind)) == pytest.approx([*stats[:6], stats[8]], abs=1e-12)
        assert 0.05 < stats[0] < 0.95
    # And it left nothing behind that a second score would see.
    assert numbers(ours(data, rows, kind)) == pytest.approx([*stats[:6], stats[8]], abs=1e-12)


def replaced(entries: list[dict[str, Any]], number: int, **values: Any) -> list[dict[str, Any]]:
    return [{**e, **values} if e["id"] == number else e for e in entries]


def at(entry: dict[str, Any]) -> dict[str, Any]:
    """The answer that is right for an annotation."""
    (rle,) = coco.frPyObjects(entry["segmentation"], HEIGHT, WIDTH)
    told = {**rle, "counts": rle["counts"].decode()}
    return {**{k: entry[k] for k in ("image_id", "category_id", "bbox")}, "segmentation": told}


@pytest.mark.parametrize(
    ("kind", "other", "bad"),
    [
        ("bbox", "segm", {"bbox": [float("nan"), 20, 30, 20]}),
        ("bbox", "segm", {"bbox": [1, 2, 3]}),
        ("segm", "bbox", {"segmentation": [[10, 20, 40, 20]]}),
        ("segm", "bbox", {"segmentation": {"counts": [HEIGHT * WIDTH]}}),
    ],
    ids=repr,
)
def test_what_is_left_out_is_neither_right_nor_wrong(tmp_path, kind: Kind, other: Kind, bad):
    """Of both sides: no object is missed there, and an answer there is no false one."""
    entries = annotated(np.random.default_rng(1))
    target = next(e for e in entries if not e["iscrowd"])
    rows = [{**at(e), "score": 0.5} for e in entries if e["id"] % 3 and e is not target]
    answer = {**at(target), "score": 0.99}
    whole = read_coco(written(tmp_path, entries), tmp_path / "images")
    without = read_coco(
        written(tmp_path, [e for e in entries if e is not target]), tmp_path / "images"
    )
    data = read_coco(written(tmp_path, replaced(entries, target["id"], **bad)), tmp_path / "images")
    assert len(data.checked.left_out) == 1
    expected = numbers(ours(without, rows, kind))
    assert numbers(ours(data, rows, kind)) == expected
    assert numbers(ours(data, [*rows, answer], kind)) == expected
    # An answer where nothing is annotated is one too many, and the other score counts it all.
    assert numbers(ours(without, [*rows, answer], kind)) != expected
    for some in (rows, [*rows, answer]):
        assert numbers(ours(data, some, other)) == numbers(ours(whole, some, other))


def test_nothing_to_score_of_a_kind_is_not_defined(tmp_path) -> None:
    """Of one object with a box of no number, the mask alone is scored."""
    (entry,) = annotated(np.random.default_rng(2))[:1]
    entry["bbox"] = [float("inf"), 0, 1, 1]
    data = read_coco(written(tmp_path, [entry]), tmp_path / "images")
    row = {**at(entry), "bbox": [1, 1, 5, 5], "score": 0.9}
    assert math.isnan(ours(data, [row], "bbox").ap)
    assert ours(data, [row], "segm").ap == pytest.approx(1)
