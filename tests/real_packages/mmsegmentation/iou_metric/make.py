"""Scores of mmsegmentation's own IoUMetric on small masks, written for tests/benchmark.

    python tests/real_packages/mmsegmentation/iou_metric/make.py      # see README.md

Each case is a folder of masks as they lie on disk, answers beside them, and what mmsegmentation's
LoadAnnotations and IoUMetric made of them. Nothing of this project is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from compiled_operators import declare  # noqa: E402

declare()

import mmseg  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.datasets.transforms import LoadAnnotations  # noqa: E402
from mmseg.evaluation import IoUMetric  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402
from PIL import Image  # noqa: E402

SIZES = ((24, 31), (17, 40), (40, 22))


def blobs(rng: np.random.Generator, size: tuple[int, int], values: list[int]) -> np.ndarray:
    """(H, W) uint8: rectangles of the values over one of them."""
    made = np.full(size, rng.choice(values), np.uint8)
    for value in rng.choice(values, 12):
        top, left = rng.integers(0, size[0]), rng.integers(0, size[1])
        made[top : top + rng.integers(2, 14), left : left + rng.integers(2, 14)] = value
    return made


def case(
    name: str,
    seed: int,
    classes: int,
    held: list[int],
    answered: list[int],
    *,
    reduce_zero_label: bool = False,
    ignore_index: int = 255,
    label_map: dict[int, int] | None = None,
) -> None:
    rng = np.random.default_rng(seed)
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    metric = IoUMetric(ignore_index=ignore_index, iou_metrics=["mIoU"])
    metric.dataset_meta = {"classes": [f"class {n}" for n in range(classes)]}
    load = LoadAnnotations()
    for index, size in enumerate(SIZES):
        mask, answer = blobs(rng, size, held), blobs(rng, size, answered)
        Image.fromarray(mask).save(folder / f"{index}.png")
        Image.fromarray(answer).save(folder / f"{index}_answer.png")
        loaded = load(
            {
                "seg_map_path": str(folder / f"{index}.png"),
                "seg_fields": [],
                "reduce_zero_label": reduce_zero_label,
                "label_map": label_map,
            }
        )["gt_seg_map"]
        # Half of each answer right, were it to stand there: a score worth having.
        right = rng.random(size) < 0.5
        answer[right & (loaded < classes)] = loaded[right & (loaded < classes)]
        Image.fromarray(answer).save(folder / f"{index}_answer.png")
        sample = SegDataSample(
            gt_sem_seg=PixelData(data=torch.from_numpy(loaded)[None]),
            pred_sem_seg=PixelData(data=torch.from_numpy(answer)[None]),
        )
        metric.process({}, [sample.to_dict()])
    areas = tuple(sum(each) for each in zip(*metric.results, strict=True))
    exact = IoUMetric.total_area_to_metrics(*areas, ["mIoU"], None, 1)
    metrics = metric.compute_metrics(metric.results)
    told = {
        "mmsegmentation": mmseg.__version__,
        "classes": classes,
        "reduce_zero_label": reduce_zero_label,
        "ignore_index": ignore_index,
        "label_map": label_map,
        "metrics": {key: float(value) for key, value in metrics.items()},
        "IoU": [None if np.isnan(v) else float(v) for v in exact["IoU"]],
        "Acc": [None if np.isnan(v) else float(v) for v in exact["Acc"]],
        "aAcc": float(exact["aAcc"]),
    }
    (folder / "scores.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    MMLogger.get_instance("make", log_level="ERROR")
    case("plain", 0, 5, [0, 1, 2, 3, 4, 255], [0, 1, 2, 3, 4])
    # 3 is in neither, 4 is answered alone, 2 is never answered.
    case("absent", 1, 5, [0, 1, 2, 255], [0, 1, 4])
    case("reduced", 2, 4, [0, 1, 2, 3, 4, 255], [0, 1, 2, 3], reduce_zero_label=True)
    case("ignored_class", 3, 5, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], ignore_index=0)
    case(
        "reduced_and_ignored",
        4,
        4,
        [1, 2, 3, 4],
        [0, 1, 2, 3],
        reduce_zero_label=True,
        ignore_index=1,
    )
    case("mapped", 5, 3, [7, 8, 11], [0, 1, 2], label_map={7: 0, 8: 2, 11: 1})
    case(
        "mapped_and_ignored",
        6,
        3,
        [7, 8, 11, 255],
        [0, 1, 2],
        label_map={7: 0, 8: 255, 11: 1},
        ignore_index=255,
    )
    case("binary", 7, 2, [0, 1], [0, 1])
