#!/bin/bash
# supervision 0.31.2: DetectionDataset.as_coco() writes every mask that has a hole or several pieces with
# iscrowd=1. COCO's own code (pycocotools) does not score crowds: an object with a hole, exported so, is no
# object to be found, and a class of such objects alone has no AP (-1), though every answer is right.
# Seen: "solid iscrowd=0, holed iscrowd=1", AP -1.0 of the holed object found exactly. Expected: 0 for both,
# and an AP of 1. Exits with another status than 0 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
    supervision==0.31.2 pycocotools==2.0.11 numpy==2.4.6 opencv-python==5.0.0.93
cd "$folder"
"$folder/env/bin/python" - <<'EOF'
import contextlib
import io
import json

import numpy as np
import supervision
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Image.new("RGB", (96, 64)).save("a.png")
masks = np.zeros((2, 64, 96), bool)
masks[:, 8:50, 10:40] = True
masks[1, 20:30, 20:30] = False  # a hole, as a window frame has one
found = supervision.Detections(
    xyxy=np.array([[10.0, 8, 40, 50]] * 2), mask=masks, class_id=np.array([0, 1])
)
supervision.DetectionDataset(
    classes=["solid", "holed"], images=["a.png"], annotations={"a.png": found}
).as_coco(annotations_path="a.json")
solid, holed = json.load(open("a.json"))["annotations"]
print(f"supervision {supervision.__version__}: solid iscrowd={solid['iscrowd']}, "
      f"holed iscrowd={holed['iscrowd']}")
with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO("a.json")
    answer = {"image_id": 1, "category_id": holed["category_id"], "bbox": holed["bbox"], "score": 1}
    evaluator = COCOeval(truth, truth.loadRes([answer]), "bbox")
    evaluator.params.catIds = [holed["category_id"]]
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
print(f"AP of the holed object found exactly: {evaluator.stats[0]}")
assert (solid["iscrowd"], holed["iscrowd"], evaluator.stats[0]) == (0, 1, -1)
EOF
