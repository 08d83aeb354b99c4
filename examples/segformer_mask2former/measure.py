"""Export both trained networks, and score checkpoint and bundle on the same scenes.

    python -m examples.segformer_mask2former.measure --work FOLDER      # of `train`

Everything goes through the command line: ``fdconv export`` makes a bundle with a graph for each
factor of multi-scale inference, ``fdconv evaluate`` scores bundle and checkpoint in one run, on
single images and then at six sizes, each also mirrored.
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

from examples.segformer_mask2former.networks import NETWORKS, architecture
from examples.streets.data import draw_scenes
from examples.streets.package import save_scene
from examples.streets.scenes import CLASSES
from examples.training.record import origins, write_json
from examples.training.run import console, load_state
from examples.training.scenes import SIZE, TRAINING_SEEDS
from fdconv_deploy.demo import HELD_OUT_SEEDS
from fdconv_deploy.evaluation.metrics import confusion_matrix, scores
from fdconv_deploy.nn import build_segmentor

SCENES = 64
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
RECORD = RESULTS / f"{date.today()}-segformer-mask2former.json"
FORMS = {
    "single scale": (),
    "multi-scale and flip": ("--multi-scale", ",".join(map(str, FACTORS)), "--flip"),
}


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


def score(checkpoint: Path, bundle: Path, scenes: Path, form: tuple[str, ...]) -> dict[str, Any]:
    """mIoU of both, and how many pixels they label differently."""
    where = ("--images", scenes / "images", "--masks", scenes / "labels")
    answer = fdconv("evaluate", bundle, "--against", checkpoint, *where, *form, "--json")
    found = json.loads(answer)
    exported, trained = found["sides"]
    return {
        "checkpoint": trained["mean_iou"],
        "bundle": exported["mean_iou"],
        "pixels": found["pixels"],
        "different_pixels": round((1 - trained["agreement"]) * found["pixels"]),
    }


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


def baseline(truths: list[NDArray[np.uint8]], scenes: int) -> float:
    """The mIoU of giving each pixel the class that is most frequent there in training."""
    _, labels = draw_scenes(TRAINING_SEEDS[:scenes])
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
    found = {"kind": "segformer_mask2former", "date": str(date.today())}
    found |= origins(CLASSES, recipe, evaluation)
    del found["recipe"]
    found |= {"factors": FACTORS, "networks": {}}
    found["baseline"] = {
        "rule": "each pixel the class most frequent there in training",
        "mean_iou": baseline(truths, recipe["scenes"]),
    }
    table = Table("", "form", "checkpoint mIoU", "bundle mIoU", "pixels that differ")
    for name, state in states.items():
        bundle = export(work, name)
        network = build_segmentor(architecture(name))
        entry: dict[str, Any] = {
            "recipe": state["recipe"],
            "steps": state["step"],
            "training_seconds": round(state["seconds"], 1),
            "parameters": sum(p.numel() for p in network.parameters()),
            "fdconv_layers": json.loads((bundle / "manifest.json").read_text())["graph"][
                "fdconv_layers"
            ],
        }
        for form, flags in FORMS.items():
            scored = score(work / f"{name}.pth", bundle, work / "scenes", flags)
            entry[form] = scored
            table.add_row(
                name,
                form,
                f"{scored['checkpoint']:.4f}",
                f"{scored['bundle']:.4f}",
                f"{scored['different_pixels']} of {scored['pixels']}",
            )
        found["networks"][name] = entry
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
