"""Score the packaged detector in PyTorch and as a bundle, side by side, and keep the scores.

    python -m examples.instances.measure                 # from the repository's root

On the 16 packaged held-out scenes and on 200 more. Each image goes through both before the
next one. The scores go into ``examples/assets/instances_training.json``, and a
picture of a few answers into ``docs/instances.png``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from examples.instances.package import EVALUATION_SEEDS
from examples.streets.instances import COLOURS, coco_annotations, draw_instances
from examples.training.record import write_json
from examples.training.scenes import SIZE
from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.demo import (
    HELD_OUT_SEEDS,
    assets_folder,
    held_out,
    held_out_instances,
    packaged_detector,
)
from fdconv_deploy.evaluation.coco import CocoSet, read_coco
from fdconv_deploy.evaluation.compare import Evaluation, evaluate
from fdconv_deploy.evaluation.networks import bundle_target, torch_target
from fdconv_deploy.export import export_checkpoint
from fdconv_deploy.runtime import Session, open_session, read_image

SIDES = ("pytorch", "bundle")
SHOWN = (2, 5, 9)
console = Console()


def draw_set(seeds: range, folder: Path) -> CocoSet:
    """Scenes as a folder of images, annotated."""
    scenes = []
    for seed in seeds:
        rgb, found = draw_instances(seed)
        Image.fromarray(rgb).save(folder / f"{seed}.png")
        scenes.append((f"{seed}.png", found))
    write_json(folder / "instances.json", coco_annotations(scenes), indent=None)
    return read_coco(folder / "instances.json", folder)


def packaged_set() -> CocoSet:
    """The packaged held-out scenes."""
    return read_coco(held_out_instances(), held_out()[0][0].parent)


def measure(session: Session, data: CocoSet) -> Evaluation:
    """Both sides on the same images, at the bundle's size."""
    network = load_checkpoint(packaged_detector())
    eager = torch_target(network, packaged_detector(), sizes=session.sizes)
    return evaluate([eager, bundle_target(session)], data)


def summary(result: Evaluation) -> dict[str, Any]:
    """Scores as the record holds them."""
    sides: dict[str, Any] = {}
    for side, found in zip(SIDES, result.results, strict=True):
        entry = found.as_dict()
        sides[side] = {
            kind: {name: round(entry[kind][name], 4) for name in ("ap", "ap50", "ap75")}
            for kind in ("box", "mask")
        } | {
            "classes": {
                each["name"]: {k: round(each[k], 4) for k in ("box_ap", "mask_ap")}
                for each in entry["classes"]
            },
            "agreement": round(entry["agreement"], 5),
        }
    return {"images": result.images, "objects": result.truth["objects"], **sides}


def sheet(session: Session, chosen: tuple[int, ...] = SHOWN) -> NDArray[np.uint8]:
    """A row per held-out scene: the image, what is in it, what the bundle finds from 0.5 on."""
    rows = []
    for index in chosen:
        _, truth = draw_instances(HELD_OUT_SEEDS[index])
        image = read_image(held_out()[index][0])
        answer = session.detect(image).kept(0.5)
        assert answer.masks is not None
        cells = [
            image,
            laid_over(image, truth.labels, truth.masks),
            laid_over(image, answer.labels, answer.masks),
        ]
        rows.append(np.concatenate([np.pad(c, ((2, 2), (2, 2), (0, 0))) for c in cells], axis=1))
    return np.concatenate(rows)


def laid_over(
    image: NDArray[np.uint8], labels: NDArray[np.int64], masks: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Masks over their image with a light outline; no names, which would hide small things."""
    out = image.copy()
    for label, mask in zip(labels, masks, strict=True):
        out[mask] = (0.35 * out[mask] + 0.65 * np.float32(COLOURS[label])).astype(np.uint8)
        outline = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[
            0
        ]
        cv2.drawContours(out, outline, -1, (255, 255, 255), 1)
    return out


def table(title: str, scores: dict[str, Any]) -> Table:
    """Both sides' scores."""
    result = Table(title, *SIDES)
    for kind in ("box", "mask"):
        for name in ("ap", "ap50", "ap75"):
            result.add_row(f"{kind} {name}", *(f"{scores[s][kind][name]:.4f}" for s in SIDES))
    for name in scores[SIDES[0]]["classes"]:
        both = (scores[s]["classes"][name] for s in SIDES)
        result.add_row(name, *(f"{c['box_ap']:.3f} / {c['mask_ap']:.3f}" for c in both))
    return result


def main() -> None:
    """Parse the command line and go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=len(EVALUATION_SEEDS))
    parser.add_argument("--picture", type=Path, default=Path("docs/instances.png"))
    given = parser.parse_args()
    record = json.loads((assets_folder() / "instances_training.json").read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scenes").mkdir()
        bundle = export_checkpoint(packaged_detector(), folder / "bundle", size=SIZE, batches=(1,))
        drawn = draw_set(EVALUATION_SEEDS[: given.scenes], folder / "scenes")
        with open_session(bundle) as session:
            for title, data in (("held_out", packaged_set()), ("evaluation", drawn)):
                record[title] = summary(measure(session, data))
                console.print(table(title, record[title]))
            Image.fromarray(sheet(session)).save(given.picture, optimize=True)
    assets = assets_folder()
    write_json(assets / "instances_training.json", record)


if __name__ == "__main__":
    main()
