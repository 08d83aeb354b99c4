"""Write random panoptic truths and answers, and what COCO's own code scores them."""

import json
import sys
from pathlib import Path

import numpy as np
from panopticapi.evaluation import pq_compute_single_core
from panopticapi.utils import id2rgb
from PIL import Image

CATEGORIES = [
    {"id": number * 7 + 1, "name": name, "isthing": int(number < 3), "supercategory": name}
    for number, name in enumerate(("person", "car", "dog", "road", "sky", "unused"))
]
SIZE, IMAGES = (30, 44), 12


def blobs(generator, count):
    """Rectangles over each other: (H, W) numbers 0 to count."""
    ids = np.zeros(SIZE, np.int64)
    for number in range(1, count + 1):
        top, left = generator.integers(0, SIZE[0] - 6), generator.integers(0, SIZE[1] - 6)
        height, width = generator.integers(5, 20, 2)
        ids[top : top + height, left : left + width] = number
    return ids


def save(folder, name, ids, infos):
    Image.fromarray(id2rgb(ids)).save(folder / name)
    present = set(np.unique(ids).tolist())
    return [info for info in infos if info["id"] in present]


def main(folder):
    generator = np.random.default_rng(0)
    truth, found = [], []
    for kind in ("truth", "found", "images"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES):
        name, image = f"{number:03}.png", {"image_id": number, "file_name": f"{number:03}.png"}
        count = int(generator.integers(4, 9))
        ids = blobs(generator, count)
        kinds = generator.integers(0, 5, count + 1)
        # One crowd of a class in an image at most, as in COCO.
        crowd = int(generator.integers(1, count + 1))
        values = np.append(0, generator.permutation(70000)[:count] + 1)
        infos = [
            {
                "id": int(values[i]),
                "category_id": CATEGORIES[kinds[i]]["id"],
                "iscrowd": int(i == crowd),
                "area": int((ids == i).sum()),
            }
            for i in range(1, count + 1)
        ]
        truth.append({**image, "segments_info": save(folder / "truth", name, values[ids], infos)})
        # The answer: moved by a pixel or two, some classes wrong, some segments gone or made up.
        moved = np.roll(ids, generator.integers(-2, 3, 2), (0, 1))
        moved[moved == generator.integers(1, count + 1)] = 0
        extra = blobs(generator, 2) * (generator.random() < 0.7)
        moved = np.where(extra > 0, count + extra, moved)
        guessed = np.append(kinds, generator.integers(0, 5, 2))
        guessed[generator.integers(1, count + 1)] = generator.integers(0, 5)
        answers = [
            {"id": i, "category_id": CATEGORIES[guessed[i]]["id"]} for i in range(1, count + 3)
        ]
        found.append({**image, "segments_info": save(folder / "found", name, moved, answers)})
        Image.fromarray(generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).resize(
            (SIZE[1], SIZE[0])
        ).save(folder / "images" / name.replace("png", "jpg"), quality=40)
    images = [{"id": n, "file_name": f"{n:03}.jpg"} for n in range(IMAGES)]
    file = {"images": images, "annotations": truth, "categories": CATEGORIES}
    (folder / "truth.json").write_text(json.dumps(file))
    (folder / "found.json").write_text(json.dumps({"annotations": found}))
    by_id = {category["id"]: category for category in CATEGORIES}
    pairs = list(zip(truth, found, strict=True))
    stat = pq_compute_single_core(0, pairs, str(folder / "truth"), str(folder / "found"), by_id)
    scores = {}
    for name, isthing in (("all", None), ("things", True), ("stuff", False)):
        scores[name], classes = stat.pq_average(by_id, isthing)
        if isthing is None:
            scores["classes"] = {by_id[number]["name"]: one for number, one in classes.items()}
    (folder / "scores.json").write_text(json.dumps(scores, indent=1))


main(Path(sys.argv[1]))
