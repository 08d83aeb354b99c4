"""Export both trained networks, and score checkpoint and bundle on the same scenes.

    python -m examples.segformer_mask2former.measure --work FOLDER      # of `train`

Everything goes through the command line: ``fdconv export`` makes a bundle with a graph for each
factor of multi-scale inference, ``fdconv evaluate`` scores bundle and checkpoint in one run, then
the bundle at six sizes, each also mirrored.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from examples.segformer_mask2former.networks import NETWORKS
from examples.streets.data import draw_scenes
from examples.streets.package import save_scene
from examples.streets.scenes import CLASSES
from examples.training.record import origins, write_json
from examples.training.run import console, load_state
from examples.training.scenes import SIZE, TRAINING_SEEDS
from fdconv_deploy.demo import HELD_OUT_SEEDS
from fdconv_deploy.evaluation.metrics import confusion_matrix, scores

SCENES = len(HELD_OUT_SEEDS)
BASELINE_SCENES = 100
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
RECORD = RESULTS / f"{date.today()}-segformer-mask2former.json"
MULTI_SCALE = ("--multi-scale", ",".join(map(str, FACTORS)), "--flip")


def fdconv(*arguments: str | Path) -> str:
    """What the command prints; its complaints go to the terminal."""
    command = [sys.executable, "-m", "fdconv_deploy", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def export(work: Path, name: str) -> Path:
    """A bundle of a graph for each factor, the scenes' own size first."""
    bundle = work / f"{name}-bundle"
    sizes = [tuple(round(side * f) for side in SIZE) for f in sorted(FACTORS, key=lambda f: f != 1)]
    flags = [flag for height, width in sizes for flag in ("--size", f"{height}x{width}")]
    fdconv("export", work / f"{name}.pth", "-o", bundle, *flags, "--overwrite", "--quiet")
    return bundle


def score(scenes: Path, bundle: Path, *flags: str | Path) -> dict[str, Any]:
    """What ``fdconv evaluate`` finds on the scenes."""
    where = ("--images", scenes / "images", "--masks", scenes / "labels")
    found: dict[str, Any] = json.loads(fdconv("evaluate", bundle, *where, *flags, "--json"))
    return found


def draw(folder: Path, count: int) -> list[NDArray[np.uint8]]:
    """Write held-out scenes as images and masks, the packaged ones first; gives the labels."""
    images, labels = draw_scenes(range(HELD_OUT_SEEDS.start, HELD_OUT_SEEDS.start + count))
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for old in (folder / name).iterdir():
            old.unlink()
    for index, (image, truth) in enumerate(zip(images, labels, strict=True)):
        save_scene(folder / "images" / f"{index:03d}.png", image, truth)
        mask = folder / "images" / f"{index:03d}_labels.png"
        mask.rename(folder / "labels" / mask.name)
    return list(labels)


def baseline(truths: list[NDArray[np.uint8]]) -> float:
    """The mIoU of giving each pixel the class that is most frequent there in training."""
    _, labels = draw_scenes(TRAINING_SEEDS[:BASELINE_SCENES])
    counts = np.stack([(labels == index).sum(0) for index in range(len(CLASSES))])
    guess = counts.argmax(0).astype(np.uint8)
    total = sum(confusion_matrix(truth, guess, len(CLASSES)) for truth in truths)
    return scores(np.asarray(total)).mean_iou


def measure(work: Path, record: Path, count: int = SCENES) -> None:
    """Export and score both networks; print the table and write the record."""
    truths = draw(work / "scenes", count)
    states = {name: load_state(work / f"{name}.state") for name in NETWORKS}
    evaluation = range(HELD_OUT_SEEDS.start, HELD_OUT_SEEDS.start + count)
    recipe = states[NETWORKS[0]]["recipe"]
    found: dict[str, Any] = {"kind": "segformer_mask2former", "date": str(date.today())}
    found |= origins(CLASSES, recipe, evaluation)
    del found["recipe"]
    found |= {"factors": FACTORS, "networks": {}}
    found["baseline"] = {
        "rule": "each pixel the class most frequent there in training",
        "scenes": BASELINE_SCENES,
        "mean_iou": baseline(truths),
    }
    table = Table("mIoU", "checkpoint", "bundle", "pixels that differ", "bundle, MS and flip")
    for name, state in states.items():
        checkpoint, bundle = work / f"{name}.pth", export(work, name)
        single = score(work / "scenes", bundle, "--against", checkpoint)
        several = score(work / "scenes", bundle, *MULTI_SCALE)
        exported, trained = single["sides"]
        graph = json.loads((bundle / "manifest.json").read_text())["graph"]
        entry = {
            "recipe": state["recipe"],
            "steps": state["step"],
            "training_seconds": round(state["seconds"], 1),
            "fdconv_layers": graph["fdconv_layers"],
            "mean_iou": {
                "checkpoint": trained["mean_iou"],
                "bundle": exported["mean_iou"],
                "bundle, multi-scale and flip": several["sides"][0]["mean_iou"],
            },
            "pixels": single["pixels"],
            "different_pixels": round((1 - trained["agreement"]) * single["pixels"]),
        }
        found["networks"][name] = entry
        scored = [f"{value:.4f}" for value in entry["mean_iou"].values()]
        differ = f"{entry['different_pixels']} of {entry['pixels']}"
        table.add_row(name, *scored[:2], differ, scored[2])
    write_json(record, found)
    console.print(table)
    console.print(f"class most frequent at each pixel: {found['baseline']['mean_iou']:.4f}")


def main() -> None:
    """Parse the command line and go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--scenes", type=int, default=SCENES)
    given = parser.parse_args()
    measure(given.work, given.record, given.scenes)


if __name__ == "__main__":
    main()
