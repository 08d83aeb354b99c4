"""Train the packaged detector, a small Mask R-CNN with FDConv, on drawn streets.

    python -m examples.instances.train                   # from the repository's root
    python -m examples.instances.train --minutes 10      # stop; the same command goes on

It starts from the packaged segmentor's backbone, trained on such streets, which goes on
learning slowly under a pyramid and heads that know nothing yet. As in the published recipe
BatchNorm keeps its statistics. Losses, assignment and sampling are mmdetection's. Runs on one
core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.instances.data import Truth, altered, draw_scene, images_of
from examples.instances.losses import Regions, box_losses, mask_loss, proposal_losses
from examples.instances.network import start
from examples.instances.package import package
from examples.instances.regions import extract
from examples.streets.instances import CLASSES
from examples.training.layers import parameter_groups, quicken
from examples.training.run import STOPPED, Run, add_arguments, console, cosine, recipe_of
from examples.training.scenes import SIZE, TRAINING_SEEDS, draw_many, normalise
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.detection.box_ops import anchors_at


@dataclass(frozen=True)
class Recipe:
    """All that decides how the network comes out, the architecture apart.

    The backbone learns `backbone_factor` times as fast as the rest, and its attention
    `attention_factor` times as fast again. With BatchNorm standing still nothing holds the
    attention's activations, which are squared, within bounds: at 3e-4 it ran away.
    """

    scenes: int = 1500
    batch: int = 8
    steps: int = 1100
    rate: float = 1.5e-3
    backbone_factor: float = 0.05
    attention_factor: float = 0.1
    weight_decay: float = 0.01
    warm_up: int = 100
    regions: int = 64
    seed: int = 0


def losses(
    network: Detector,
    levels: Sequence[Tensor],
    truths: Sequence[Truth],
    recipe: Recipe,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The five losses of a batch, given its pyramid."""
    rpn, heads = network.rpn_head, network.roi_head
    coder = rpn.config.bbox_coder
    scores, deltas = (torch.cat(parts, 1) for parts in rpn(levels))
    anchors = []
    for level, x in enumerate(levels):
        places = torch.arange(x.shape[2] * x.shape[3] * rpn.config.num_anchors, device=x.device)
        anchors.append(anchors_at(places, rpn.config, level, x.shape[3]))
    found = {}
    found["rpn class"], found["rpn box"] = proposal_losses(
        scores, deltas, torch.cat(anchors), truths, coder, generator
    )
    sizes = torch.tensor(SIZE, dtype=torch.float32).expand(len(truths), 2)
    with torch.no_grad():
        proposals, valid = rpn.propose(levels, sizes)
    chosen = [
        Regions(boxes[there], truth, len(CLASSES), recipe.regions, generator)
        for boxes, there, truth in zip(proposals, valid, truths, strict=True)
    ]
    box = heads.bbox_head
    cut = extract(levels, [region.boxes for region in chosen], box.config.roi)
    found["class"], found["box"] = box_losses(*box(cut), chosen, box.config.bbox_coder)
    mask = heads.mask_head
    assert mask is not None
    on_things = [region.boxes[: region.positive] for region in chosen]
    found["mask"] = mask_loss(mask(extract(levels, on_things, mask.config.roi)), chosen)
    return found


def train(recipe: Recipe, work: Path, minutes: float, processes: int) -> bool:
    """Train to the end, or for so many minutes. True when it is done.

    The state is ``work/instances.state``.
    """
    torch.manual_seed(recipe.seed)
    network = start()
    quicken(network)
    run = Run("instances", work, recipe, network, optimiser_of(network, recipe), 0, recipe.steps)
    console.print(f"drawing {recipe.scenes} training scenes")
    scenes = draw_many(draw_scene, TRAINING_SEEDS[: recipe.scenes], processes)
    for step in run.steps(minutes):
        # What a step sees is a function of (seed, step): a stopped training goes on alike.
        rng = np.random.default_rng([recipe.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        chosen = rng.integers(0, len(scenes), recipe.batch)
        seen = [altered(scenes[i], rng) for i in chosen]
        images = normalise(network.architecture.preprocessing, images_of(seen))
        truths = [scene.truth() for scene in seen]
        parts = losses(network, network.features(images), truths, recipe, generator)
        rate = cosine(recipe.rate, step, recipe.steps, recipe.warm_up)
        total = torch.stack(list(parts.values())).sum()
        run.learn(rate, total, parts, largest_gradient=10.0)
    return run.done


def optimiser_of(network: Detector, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; a group's ``factor`` multiplies the learning rate."""
    new = [p for name, p in network.named_parameters() if not name.startswith("backbone.")]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in new if p.ndim > 1], "factor": 1.0},
        {"params": [p for p in new if p.ndim == 1], "factor": 1.0, "weight_decay": 0.0},
    ]
    groups += [
        group | {"factor": group["factor"] * recipe.backbone_factor}
        for group in parameter_groups(network.backbone, recipe)
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, weight_decay=recipe.weight_decay)


def main() -> None:
    """Parse the command line and go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, Recipe(), Path("/tmp/fdconv-instances"))
    parser.add_argument("--processes", type=int, default=1, help="that draw the scenes")
    given = parser.parse_args()
    recipe = recipe_of(Recipe(), given)
    if train(recipe, given.work, given.minutes, given.processes):
        package(given.work / "instances.state", given.out)
    else:
        console.print(STOPPED)


if __name__ == "__main__":
    main()
