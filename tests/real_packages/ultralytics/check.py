"""Train YOLO networks with FDConv layers, export them, and open the files in Ultralytics.

Run as the README beside this file says. Prints a line a task, and ends with 1 where a prediction
of ``YOLO("model.onnx")`` is not that of ``YOLO("best.pt")``.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import onnx
import torch
import ultralytics
from layers import Bottleneck_FDConv, C3k2_FDConv, ConvOfFDConv, FDConv
from scenes import SIDE, draw, write
from ultralytics import YOLO
from ultralytics.nn import tasks

from fdconv_deploy.export import export_ultralytics
from fdconv_deploy.nn.fdconv import dynamic_layers

ROOT = Path(__file__).resolve().parents[3]
# A small YOLO11: three levels, C3k2 on each. {head} takes the levels [6, 8, 10].
LAYERS = """
nc: 2
{more}
scales: {{n: [0.5, 1.0, 256]}}
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C3k2, [32]]
  - [-1, 1, Conv, [48, 3, 2]]
  - [-1, 1, C3k2, [48]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, C3k2, [64]]
head:
{head}
"""
LEVELS = """  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 4], 1, Concat, [1]]
  - [-1, 1, C3k2, [48]]
  - [-1, 1, Conv, [48, 3, 2]]
  - [[-1, 6], 1, Concat, [1]]
  - [-1, 1, C3k2, [64]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [[9, 12, 13], 1, {head}]
"""
HEADS = {
    "detect": "Detect, [nc]",
    "segment": "Segment, [nc, 16, 32]",
    "pose": "Pose, [nc, [4, 3]]",
    "obb": "OBB, [nc, 1]",
    "classify": "Classify, [nc]",
}
PIXELS, SCORES = 1e-3, 1e-4  # what may differ
CONFIDENCE = 0.05


def described(task: str, folder: Path) -> Path:
    """The network's YAML file."""
    levels = f"  - [-1, 1, {HEADS[task]}]\n" if task == "classify" else LEVELS
    more = "kpt_shape: [4, 3]" if task == "pose" else ""
    path = folder / f"yolo11n-{task}.yaml"
    path.write_text(LAYERS.format(more=more, head=levels.replace("{head}", HEADS[task])))
    return path


def trained(task: str, folder: Path, images: int, epochs: int) -> Path:
    """The best.pt of a training."""
    data = write(task, folder / "data" / task, images)
    model = YOLO(described(task, folder), task=task)
    model.train(
        data=str(data), epochs=epochs, imgsz=SIDE, batch=4, workers=0, device="cpu", plots=False,
        verbose=False, mosaic=0.0, optimizer="AdamW", lr0=0.004, warmup_epochs=1, seed=0, val=False,
        project=str(folder), name=task, exist_ok=True,
    )  # fmt: skip
    return folder / task / "weights" / "best.pt"


def parts(result) -> dict[str, np.ndarray]:
    """What a prediction holds: pixels, scores and classes apart."""
    if result.probs is not None:
        return {"score": result.probs.data.numpy()}
    if result.obb is not None:
        found = result.obb.data.numpy()
        return {
            "pixels": found[:, :4],
            "score": found[:, 5],
            "class": found[:, 6],
            "angle": found[:, 4],
        }
    found = result.boxes.data.numpy()
    answer = {"pixels": found[:, :4], "score": found[:, 4], "class": found[:, 5]}
    if result.keypoints is not None:
        points = result.keypoints.data.numpy()
        answer |= {"keypoint pixels": points[..., :2], "keypoint score": points[..., 2]}
    if result.masks is not None:
        answer["mask"] = result.masks.data.numpy()
    return answer


def compared(first: YOLO, second: YOLO, images: list[np.ndarray]) -> tuple[int, dict[str, float]]:
    """How many objects there are, and the largest difference of each part."""
    worst: dict[str, float] = {}
    objects = 0
    options = {"imgsz": SIDE, "conf": CONFIDENCE, "rect": False, "verbose": False, "device": "cpu"}
    for image in images:
        one, other = (parts(m.predict(image, **options)[0]) for m in (first, second))
        assert one.keys() == other.keys()
        objects += len(one["score"])
        for name, array in one.items():
            assert array.shape == other[name].shape, (name, array.shape, other[name].shape)
            worst[name] = max(
                worst.get(name, 0.0), float(np.abs(array - other[name]).max(initial=0))
            )
    return objects, worst


def check(task: str, best: Path, output: Path, given) -> bool:
    """Export, open, compare, and print."""
    network = YOLO(best).model
    layers = len(dynamic_layers(network))
    export_ultralytics(given, output, imgsz=SIDE, pictures=[draw(1000)[0][..., ::-1]])
    opened = YOLO(output, task=None)
    objects, worst = compared(YOLO(best), opened, [draw(seed)[0] for seed in range(2000, 2008)])
    backend = opened.predictor.model
    assert (backend.task, backend.names, backend.imgsz) == (
        task,
        dict(network.names),
        [SIDE, SIDE],
    )
    assert (backend.batch, backend.channels, backend.stride) == (1, 3, int(max(network.stride)))
    assert opened.task == task
    left = [n.op_type for n in onnx.load(output).graph.node].count("BatchNormalization")
    right = objects > 0 and all(
        error <= (PIXELS if "pixels" in name else SCORES) for name, error in worst.items()
    )
    said = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    print(
        f"{task}: {layers} FDConv layers, {objects} {'scores' if task == 'classify' else 'objects'}"
        f" on 8 images; largest differences: {said}; {left} BatchNormalization left, "
        f"{output.stat().st_size / 1e6:.1f} MB: {'equal' if right else 'NOT EQUAL'}",
        flush=True,
    )
    return right


def check_fuse(folder: Path) -> bool:
    """A network on which Ultralytics' own fuse() fails, from memory."""
    Bottleneck_FDConv.second = ConvOfFDConv
    torch.manual_seed(0)
    model = YOLO(described("detect", folder), task="detect")
    Bottleneck_FDConv.second = FDConv
    path = export_ultralytics(model, folder / "unfused.onnx", imgsz=(64, 96), batch=2)
    opened = YOLO(path)
    found = opened.predict([np.zeros((64, 96, 3), np.uint8)] * 2, verbose=False, imgsz=(64, 96))
    try:
        model.model.fuse(verbose=False)
    except (AttributeError, TypeError, RuntimeError) as error:
        print(f"fuse() fails ({type(error).__name__}: {error}); exported, {len(found)} predictions")
        return len(found) == 2
    print("fuse() works on FDConv now")
    return False


def check_guide(folder: Path) -> bool:
    """What docs/own-networks.md says to type, at a smaller size."""
    text = (ROOT / "docs" / "own-networks.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "ultralytics" in b)
    YOLO(described("detect", folder), task="detect").save(folder / "best.pt")
    cv2.imwrite(str(folder / "street.jpg"), draw(0)[0])
    with contextlib.chdir(folder):
        exec(block.replace("640", str(SIDE)), {})
    print("docs/own-networks.md: runs")
    return True


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--tasks", nargs="*", default=list(HEADS))
    arguments.add_argument("--images", type=int, default=24)
    arguments.add_argument("--epochs", type=int, default=60)
    given = arguments.parse_args()
    print(f"ultralytics {ultralytics.__version__}, torch {torch.__version__}")
    tasks.C3k2 = C3k2_FDConv  # parse_model finds modules by name in its own module
    right = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in given.tasks:
            best = trained(task, folder, given.images, given.epochs)
            # From the path, from YOLO, from YOLO after it has predicted, from the network.
            source = {"detect": best, "segment": YOLO(best)}.get(task, YOLO(best).model)
            if task == "pose":
                source = YOLO(best)
                source.predict(draw(0)[0], verbose=False, imgsz=SIDE, device="cpu")
            right &= check(task, best, folder / f"{task}.onnx", source)
        right &= check_fuse(folder)
        right &= check_guide(folder)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
