"""Train a small SegFormer and a small Mask2Former with FDConv on drawn streets.

    python -m examples.segformer_mask2former.train                      # both, then their scores
    python -m examples.segformer_mask2former.train --only segformer     # one of them, no scores
    python -m examples.segformer_mask2former.train --minutes 10         # stop each after; goes on

From the repository's root. The SegFormer learns from nothing; the Mask2Former's first three stages
are the packaged segmentor's. Checkpoints go to --work, and the scores before and after
export, by `measure`, to --record. Runs on a CPU, one core for each network.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.segformer_mask2former.measure import RECORD, measure
from examples.segformer_mask2former.networks import NETWORKS, start
from examples.segformer_mask2former.set_loss import set_loss
from examples.streets.data import Scenes, batch_of, class_weights, draw_scenes
from examples.streets.schedule import Recipe
from examples.streets.train import segmentation_loss
from examples.training.attention_statistics import SIZES, frames, recalibrate
from examples.training.layers import parameter_groups, quicken
from examples.training.run import STOPPED, Run, console, cosine
from examples.training.scenes import TRAINING_SEEDS, normalise
from fdconv_deploy.checkpoints import save_checkpoint
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.nn.heads import Mask2FormerHead

# Two thirds of the steps on crops of the first size, the last on crops of the second.
SCENES = 600
RECIPES = {
    "segformer": Recipe(
        steps=540,
        batch=8,
        crop=(96, 128),
        learning_rate=1.5e-3,
        second_crop=(128, 176),
        warm_up=30,
        scenes=SCENES,
    ),
    "mask2former": Recipe(
        steps=420,
        batch=6,
        crop=(96, 128),
        learning_rate=1e-3,
        second_crop=(160, 224),
        warm_up=30,
        scenes=SCENES,
    ),
}
# Random pixels at which an image's masks are compared.
POINTS = 3000


def train(name: str, recipe: Recipe, scenes: Scenes, work: Path, minutes: float) -> bool:
    """Train one network to the end, or for so many minutes. True when it is done.

    Its state is ``work/<name>.state``, at the end its checkpoint ``work/<name>.pth``.
    """
    torch.manual_seed(recipe.seed)
    network = start(name)
    quicken(network)
    optimiser = torch.optim.AdamW(parameter_groups(network, recipe), lr=recipe.learning_rate)
    run = Run(name, work, recipe, network, optimiser, 0, recipe.steps)
    losses = query_losses(network, recipe) if name == "mask2former" else pixel_losses
    weights = class_weights(scenes)
    for step in run.steps(minutes):
        images, labels = batch_of(recipe, step, scenes)
        images = normalise(network.architecture.preprocessing, images)
        parts = losses(network, images, labels, weights if step < recipe.turn else None, step)
        total = torch.stack(list(parts.values())).sum()
        rate = cosine(recipe.learning_rate, step, recipe.steps, recipe.warm_up)
        run.learn(rate, total, parts, largest_gradient=5.0)
    if run.done:
        package(network, work / f"{name}.pth")
    return run.done


Losses = Callable[[Segmentor, Tensor, Tensor, Tensor | None, int], dict[str, Tensor]]


def pixel_losses(
    network: Segmentor, images: Tensor, labels: Tensor, weights: Tensor | None, step: int
) -> dict[str, Tensor]:
    """Cross-entropy; without the classes' weights the Jaccard loss is added."""
    loss = segmentation_loss(network(images), labels, weights, jaccard=weights is None)
    return {"loss": loss}


def query_losses(network: Segmentor, recipe: Recipe) -> Losses:
    """Losses of every decoder layer's predictions, which the head is made to keep."""
    head = network.decode_head
    assert isinstance(head, Mask2FormerHead)
    kept: list[tuple[Tensor, Tensor]] = []
    predict = head.predict

    def keep(queries: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        kept.append(predict(queries, features))
        return kept[-1]

    object.__setattr__(head, "predict", keep)

    def losses(
        network: Segmentor, images: Tensor, labels: Tensor, weights: Tensor | None, step: int
    ) -> dict[str, Tensor]:
        kept.clear()
        head(network.backbone(images))
        seed = int(np.random.default_rng([recipe.seed, step]).integers(2**31))
        return set_loss(kept, labels, POINTS, torch.Generator().manual_seed(seed))

    return losses


def package(trained: Segmentor, path: Path) -> None:
    """Save a network as mmsegmentation does, its attention statistics measured anew."""
    network = Segmentor(trained.architecture)
    network.load_state_dict(trained.state_dict())
    network.eval()
    recalibrate(network, frames(network.architecture.preprocessing, SIZES[:-1]))
    save_checkpoint(path, network, network.architecture)


def main() -> None:
    """Parse the command line and go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=NETWORKS, help="and score nothing")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop each network after")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("/tmp/fdconv-segformer-mask2former"))
    parser.add_argument("--record", type=Path, default=RECORD)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    console.print(f"drawing {SCENES} training scenes")
    scenes = draw_scenes(TRAINING_SEEDS[:SCENES])
    done = True
    for name in [given.only] if given.only else NETWORKS:
        done = train(name, RECIPES[name], scenes, given.work, given.minutes) and done
    if not done:
        console.print(STOPPED)
    elif not given.only:
        measure(given.work, given.record)


if __name__ == "__main__":
    main()
