"""Train the packaged FDConv segmentor and its baseline on drawn streets.

    python -m examples.streets.train                     # from the repository's root: all of it
    python -m examples.streets.train --only fdconv       # one network: two processes, two cores
    python -m examples.streets.train --steps 60 --scenes 64 --out /tmp/try

As FDConv networks are made in practice: a plain network is trained first (`base`), its
kernels become spectra, and training goes on. Both networks start from that base and get the
same seed, scenes, order, augmentation, schedule and number of steps; the one difference is
`ResNetConfig.conv`. Training can be stopped and started again: it goes on from the last
state in --work. Runs on a CPU; the packaged networks took about an hour.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.streets.data import Scenes, batch_of, class_weights, draw_scenes
from examples.streets.network import TWINS, architecture, continue_from
from examples.streets.package import evaluate
from examples.streets.schedule import Recipe, rate
from examples.training.layers import parameter_groups, quicken
from examples.training.run import STOPPED, Run, add_arguments, console, load_state, recipe_of
from examples.training.scenes import TRAINING_SEEDS, normalise
from fdconv_deploy.nn import Segmentor


def train(name: str, recipe: Recipe, scenes: Scenes, work: Path, minutes: float) -> bool:
    """Train one network to the end of its span, or for `minutes`. True when it is done.

    Its state is ``work/<name>.state``; each network starts from ``work/base.state``.
    """
    torch.manual_seed(recipe.seed)
    network = Segmentor(architecture(name))
    if name in TWINS:
        continue_from(network, load_state(work / "base.state")["network"])
    quicken(network)
    optimiser = torch.optim.AdamW(parameter_groups(network, recipe), lr=recipe.learning_rate)
    weights = class_weights(scenes)
    run = Run(name, work, recipe, network, optimiser, *recipe.span(name))
    network.train()
    for step in run.steps(minutes):
        images, labels = batch_of(recipe, step, scenes)
        images = normalise(network.architecture.preprocessing, images)
        parts = losses(network, images, labels, weights if step < recipe.turn else None)
        loss = parts["loss"] + recipe.auxiliary_weight * parts["auxiliary"]
        run.learn(rate(recipe, step), loss, parts, largest_gradient=5.0)
    return run.done


def losses(
    network: Segmentor, images: Tensor, labels: Tensor, weights: Tensor | None
) -> dict[str, Tensor]:
    """Both heads' losses of a batch. Without the classes' weights the Jaccard loss is added."""
    features = network.backbone(images)
    loss = segmentation_loss(
        network.decode_head(features), labels, weights, jaccard=weights is None
    )
    assert network.auxiliary_head is not None
    auxiliary = segmentation_loss(network.auxiliary_head(features), labels, weights)
    return {"loss": loss, "auxiliary": auxiliary}


def segmentation_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None, jaccard: bool = False
) -> Tensor:
    """Cross-entropy at the labels' size, where thin structures still exist.

    With ``jaccard``, plus one minus the batch's mean IoU, counted with probabilities.
    """
    full = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(full, labels, weights)
    if jaccard:
        guess = full.softmax(1)
        truth = torch.zeros_like(guess).scatter_(1, labels[:, None], 1.0)
        shared = (guess * truth).sum((0, 2, 3))
        union = (guess + truth).sum((0, 2, 3)) - shared
        loss = loss + 1 - (shared / union).mean()
    return loss


def main() -> None:
    """Parse the command line and go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, Recipe(), Path("/tmp/fdconv-streets"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=("base", *TWINS), help="and compare nothing")
    given = parser.parse_args()
    recipe = recipe_of(Recipe(), given)
    torch.set_num_threads(given.threads)
    console.print(f"drawing {recipe.scenes} training scenes")
    scenes = draw_scenes(TRAINING_SEEDS[: recipe.scenes])
    done = True
    for name in [given.only] if given.only else ("base", *TWINS):
        done = done and train(name, recipe, scenes, given.work, given.minutes)
    if not done:
        console.print(STOPPED)
    elif not given.only:
        evaluate(recipe, given.work, given.out)


if __name__ == "__main__":
    main()
