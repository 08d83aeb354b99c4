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
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

import fdconv_deploy.demo
from examples.instances.data import Truth, altered, draw_many, images_of
from examples.instances.losses import Regions, box_losses, mask_loss, proposal_losses
from examples.instances.network import SIZE, normalise, start
from examples.instances.package import package
from examples.instances.regions import extract
from examples.streets.train import (
    TRAINING_SEEDS,
    FastSpectrum,
    dynamic_layers,
    load_state,
    parameter_groups,
)
from fdconv_deploy.demo.instances import CLASSES
from fdconv_deploy.nn.detection import Detector

console = Console()


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
    anchors = torch.cat(rpn.anchors(levels))
    found = {}
    found["rpn class"], found["rpn box"] = proposal_losses(
        scores, deltas, anchors, truths, coder, generator
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

    The state goes to ``work/instances.state`` every minute and at the end.
    """
    torch.manual_seed(recipe.seed)
    network = start()
    for layer in dynamic_layers(network).values():
        object.__setattr__(layer, "modulated_spectrum", FastSpectrum(layer))
    optimiser = optimiser_of(network, recipe)
    path, step, seconds = work / "instances.state", 0, 0.0
    if path.exists():
        state = load_state(path)
        if state["recipe"] != asdict(recipe):
            raise SystemExit(f"{path} was trained by another recipe. Move it away, or give its.")
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        step, seconds = state["step"], state["seconds"]
    began = saved = time.monotonic()
    console.print(f"drawing {recipe.scenes} training scenes")
    scenes = draw_many(TRAINING_SEEDS[: recipe.scenes], processes)
    console.print(f"ready after {time.monotonic() - began:.0f} s", highlight=False, soft_wrap=True)
    recent: list[dict[str, float]] = []

    def save() -> None:
        content = {
            "recipe": asdict(recipe),
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "step": step,
            "seconds": seconds + time.monotonic() - began,
        }
        partial_path = path.with_suffix(".part")
        torch.save(content, partial_path)
        partial_path.replace(path)

    while step < recipe.steps and time.monotonic() - began < 60 * minutes:
        for group in optimiser.param_groups:
            group["lr"] = rate(recipe, step) * group["factor"]
        # What a step sees is a function of (seed, step): a stopped training goes on alike.
        rng = np.random.default_rng([recipe.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        chosen = rng.integers(0, len(scenes), recipe.batch)
        seen = [altered(scenes[i], rng) for i in chosen]
        features = network.features(normalise(network, images_of(seen)))
        truths = [scene.truth() for scene in seen]
        parts = losses(network, features, truths, recipe, generator)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimiser.step()
        step += 1
        recent.append({name: value.item() for name, value in parts.items()})
        if step % 50 == 0 or step == recipe.steps:
            pace = (time.monotonic() - began) / len(recent)
            last = recent[-50:]
            shown = "  ".join(f"{n} {sum(r[n] for r in last) / len(last):.3f}" for n in parts)
            said = f"step {step}/{recipe.steps}  {shown}  {pace:.2f} s"
            console.print(said, highlight=False, soft_wrap=True)
        if time.monotonic() - saved > 60:
            save()
            saved = time.monotonic()
    save()
    return step >= recipe.steps


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


def rate(recipe: Recipe, step: int) -> float:
    """Learning rate: a linear warm-up, then half a cosine down to nothing."""
    if step < recipe.warm_up:
        return recipe.rate * (step + 1) / recipe.warm_up
    share = (step - recipe.warm_up) / max(recipe.steps - recipe.warm_up, 1)
    return recipe.rate * 0.5 * (1 + math.cos(math.pi * share))


def main() -> None:
    """Parse the command line and go."""
    standard = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=standard.steps)
    parser.add_argument("--scenes", type=int, default=standard.scenes, help="training scenes")
    parser.add_argument("--seed", type=int, default=standard.seed)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after")
    parser.add_argument("--processes", type=int, default=1, help="that draw the scenes")
    parser.add_argument("--work", type=Path, default=Path("/tmp/fdconv-instances"))
    parser.add_argument(
        "--out", type=Path, default=Path(fdconv_deploy.demo.__file__).parent / "assets"
    )
    given = parser.parse_args()
    recipe = Recipe(steps=given.steps, scenes=given.scenes, seed=given.seed)
    given.work.mkdir(parents=True, exist_ok=True)
    if train(recipe, given.work, given.minutes, given.processes):
        package(given.work / "instances.state", given.out)
    else:
        console.print("stopped before the end; the same command goes on from here")


if __name__ == "__main__":
    main()
