"""What tells a checkpoint's frequency order: its weights, or images and stored statistics.

    python -m benchmarks.frequency_order --output benchmarks/results/DATE-frequency-order.json

The packaged checkpoint as it is, trained on in the other order for some steps, and with its
statistics measured anew in either order; images of its kind, fewer of them, smaller ones,
inverted ones, noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from examples.streets.scenes import CLASSES, draw_scene
from fdconv_deploy.checkpoints import load_segmentor
from fdconv_deploy.checkpoints.frequency_order import detect_order
from fdconv_deploy.checkpoints.frequency_order.from_weights import CANDIDATES, NamedOrder
from fdconv_deploy.demo import held_out, packaged_checkpoint
from fdconv_deploy.evaluation.metrics import confusion_matrix, scores
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime import read_image
from fdconv_deploy.runtime.preprocessing import normalise

Pictures = list[NDArray[np.uint8]]
SIZE = (128, 176)


def training_batches(network: Segmentor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Scenes that no other seed of the project draws."""
    for step in range(steps):
        drawn = [draw_scene(20_000_000 + 4 * step + i, *SIZE) for i in range(4)]
        inputs = np.stack([normalise(rgb, network.architecture.preprocessing) for rgb, _ in drawn])
        labels = np.stack([labels for _, labels in drawn]).astype(np.int64)
        yield torch.from_numpy(inputs), torch.from_numpy(labels)


def trained_on(order: NamedOrder, steps: int) -> Segmentor:
    """The packaged network after ``steps`` of fine-tuning in an order, BatchNorms frozen."""
    network: Segmentor = load_segmentor(packaged_checkpoint(), frequency_order=order)
    optimiser = torch.optim.AdamW(network.parameters(), 1e-4)
    for inputs, labels in training_batches(network, steps):
        logits = nn.functional.interpolate(
            network(inputs), labels.shape[-2:], mode="bilinear", align_corners=False
        )
        nn.functional.cross_entropy(logits, labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    return network


@torch.no_grad()
def measured_anew(order: NamedOrder, pictures: Pictures) -> Segmentor:
    """The packaged network with the statistics that pictures have in an order."""
    network: Segmentor = load_segmentor(packaged_checkpoint(), frequency_order=order)
    for name, module in network.backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d) and "KSM" not in name:
            module.train()
            module.momentum = 1.0
    inputs = [normalise(picture, network.architecture.preprocessing) for picture in pictures]
    network.backbone(torch.from_numpy(np.stack(inputs)))
    return network.eval()


@torch.no_grad()
def accuracy(network: Segmentor, order: NamedOrder) -> float:
    """Mean IoU of a network's weights in an order, on the held-out scenes."""
    runner = load_segmentor(packaged_checkpoint(), frequency_order=order)
    runner.load_state_dict(
        {k: v for k, v in network.state_dict().items() if k in runner.state_dict()}
    )
    total = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for image, labels in held_out():
        truth = np.asarray(Image.open(labels))
        inputs = normalise(read_image(image), runner.architecture.preprocessing)[None]
        found = runner.predict(torch.from_numpy(inputs)).argmax(1)[0].numpy()
        total += confusion_matrix(truth, found, len(CLASSES))
    return round(float(scores(total).mean_iou), 4)


def image_sets() -> dict[str, Pictures]:
    held = [read_image(path) for path, _ in held_out()]
    noise = [
        np.random.default_rng(i).integers(0, 256, (192, 256, 3), dtype=np.uint8) for i in range(16)
    ]
    return {
        "held-out scenes": held,
        "eight of them": held[:8],
        "half the size": [np.asarray(cv2.resize(p, (128, 96))) for p in held],
        "inverted": [255 - picture for picture in held],
        "noise": noise,
    }


def measure(steps: int) -> list[dict[str, Any]]:
    sets = image_sets()
    held = sets["held-out scenes"]
    networks: dict[str, Segmentor] = {"as packaged": load_segmentor(packaged_checkpoint())}
    for order in CANDIDATES:
        networks[f"{steps} more steps in {order}"] = trained_on(order, steps)
        networks[f"statistics of the held-out scenes in {order}"] = measured_anew(order, held)
    rows = []
    for name, network in networks.items():
        backbone = network.architecture.backbone
        row: dict[str, Any] = {
            "network": name,
            "mean_iou": {order: accuracy(network, order) for order in CANDIDATES},
            "images": {},
        }
        for kind, pictures in sets.items():
            found = detect_order(
                network.state_dict(), backbone, network.architecture.preprocessing, pictures
            )
            assert found.images is not None
            row["weights"] = found.weights.model_dump()
            row["images"][kind] = found.images.model_dump()
            print(name, "|", kind, "|", found.images.reason, flush=True)
        print(name, "|", found.weights.reason, row["mean_iou"], flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments.steps)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
