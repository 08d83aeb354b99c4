"""Trained networks → what is packaged: checkpoints, held-out scenes, the comparison's record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from examples.streets.data import Scenes, draw_scenes
from examples.streets.network import FILES, TWINS, architecture
from examples.streets.scenes import CLASSES, PALETTE
from examples.streets.schedule import Recipe
from examples.training.attention_statistics import FRAMES, SIZES, frames, recalibrate
from examples.training.layers import dynamic_layers
from examples.training.record import attention_spread, origins, write_json
from examples.training.run import console, describe, load_state
from examples.training.scenes import normalise
from fdconv_deploy.checkpoints import save_checkpoint
from fdconv_deploy.demo import HELD_OUT_SEEDS
from fdconv_deploy.evaluation.metrics import Scores, confusion_matrix, scores
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.nn.heads import resize

# The packaged held-out scenes and as many again and more, for a steadier number.
EVALUATION_SEEDS = range(HELD_OUT_SEEDS.start, HELD_OUT_SEEDS.start + 200)


def evaluate(recipe: Recipe, work: Path, out: Path) -> None:
    """Score both networks on the same scenes, package them, write the record.

    The FDConv network's attention statistics are measured anew first; the plain one has none.
    """
    console.print(f"drawing {len(EVALUATION_SEEDS)} held-out scenes")
    scenes = draw_scenes(EVALUATION_SEEDS)
    record = origins(CLASSES, describe(recipe), EVALUATION_SEEDS) | {"networks": {}}
    found: dict[str, Scores] = {}
    base_seconds = load_state(work / "base.state")["seconds"]
    out.mkdir(parents=True, exist_ok=True)
    for name in TWINS:
        state = load_state(work / f"{name}.state")
        network = Segmentor(architecture(name))
        network.load_state_dict(state["network"])
        network.eval()
        if dynamic_layers(network):
            recalibrate(network, frames(network.architecture.preprocessing))
        matrices = list(confusions(network, scenes))
        found[name] = scores(np.sum(matrices, axis=0))
        packaged = scores(np.sum(matrices[: len(HELD_OUT_SEEDS)], axis=0))
        save_checkpoint(out / FILES[name], network.state_dict(), network.architecture)
        record["networks"][name] = {
            "file": FILES[name],
            "parameters": sum(p.numel() for p in network.parameters()),
            "dynamic_layers": len(dynamic_layers(network)),
            "steps": state["step"],
            "base_steps": recipe.turn,
            "training_seconds": round(state["seconds"], 1),
            "base_training_seconds": round(base_seconds, 1),
            "evaluation": summary(found[name]),
            "held_out": summary(packaged),
        }
        if name == "fdconv":
            images = torch.from_numpy(scenes[0][:64].transpose(0, 3, 1, 2).astype(np.float32))
            seen = (normalise(network.architecture.preprocessing, image[None]) for image in images)
            record["networks"][name]["attention_statistics"] = {"sizes": SIZES, "frames": FRAMES}
            record["networks"][name]["attention_spread"] = attention_spread(network, seen)
    folder = out / "heldout"
    folder.mkdir(exist_ok=True)
    for index in range(len(HELD_OUT_SEEDS)):
        save_scene(folder / f"{index:03d}.png", scenes[0][index], scenes[1][index])
    write_json(out / "training.json", record)
    console.print(table(found))


@torch.no_grad()
def confusions(network: Segmentor, scenes: Scenes) -> Iterator[NDArray[np.int64]]:
    """One confusion matrix per scene."""
    for rgb, truth in zip(*scenes, strict=True):
        image = torch.from_numpy(rgb.transpose(2, 0, 1).astype(np.float32))[None]
        logits = network(normalise(network.architecture.preprocessing, image))
        logits = resize(logits, truth.shape, network.architecture.decode_head.align_corners)
        yield confusion_matrix(truth, logits.argmax(1)[0].numpy(), len(CLASSES))


def summary(result: Scores) -> dict[str, Any]:
    """Scores as the record holds them."""
    return {
        "mean_iou": round(result.mean_iou, 4),
        "pixel_accuracy": round(result.pixel_accuracy, 4),
        "iou": {name: round(value, 4) for name, value in zip(CLASSES, result.iou, strict=True)},
    }


def save_scene(path: Path, rgb: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    """Write an image and, beside it, its labels as an indexed PNG."""
    Image.fromarray(rgb).save(path, optimize=True)
    indexed = Image.fromarray(labels, mode="P")
    indexed.putpalette(np.array(PALETTE, np.uint8).tobytes())
    indexed.save(path.with_name(f"{path.stem}_labels.png"), optimize=True)


def table(found: dict[str, Scores]) -> Table:
    """The comparison, a class a row."""
    result = Table("class", *(f"{name} IoU" for name in found))
    for index, name in enumerate(CLASSES):
        result.add_row(name, *(f"{value.iou[index]:.3f}" for value in found.values()))
    result.add_section()
    result.add_row("mIoU", *(f"{value.mean_iou:.4f}" for value in found.values()))
    result.add_row("pixel accuracy", *(f"{value.pixel_accuracy:.4f}" for value in found.values()))
    return result
