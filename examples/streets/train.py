"""Train the packaged FDConv segmentor and its plain twin on drawn streets.

    python examples/streets/train.py                     # all of it, then the comparison
    python examples/streets/train.py --only fdconv       # one network: two processes, two cores
    python examples/streets/train.py --steps 60 --scenes 64 --out /tmp/try

As FDConv networks are made in practice: a plain network is trained first (`base`), its
kernels become spectra, and training goes on. The twins both start from that base and get the
same seed, scenes, order, augmentation, schedule and number of steps; the one difference is
`BackboneConfig.conv`. Training can be stopped and started again: it goes on from the last
state in --work. Runs on a CPU; the packaged networks took about an hour.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fdconv_deploy.demo
from fdconv_deploy.architecture import (
    Architecture,
    BackboneConfig,
    FDConvConfig,
    HeadConfig,
)
from fdconv_deploy.benchmark.metrics import Scores, confusion_matrix, scores
from fdconv_deploy.checkpoints import convert_state_dict, save_checkpoint
from fdconv_deploy.demo import HELD_OUT_SEEDS
from fdconv_deploy.demo.scenes import CLASSES, PALETTE, draw_scene
from fdconv_deploy.nn import FDConv2d, Segmentor, build_segmentor

TRAINING_SEEDS = range(1_000_000, 9_000_000)
# The packaged held-out scenes and as many again and more, for a steadier number.
EVALUATION_SEEDS = range(HELD_OUT_SEEDS.start, HELD_OUT_SEEDS.start + 200)
SIZE = (192, 256)
TWINS = ("fdconv", "plain")
FILES = {"fdconv": "streets.pth", "plain": "streets_plain.pth"}

Scenes = tuple[NDArray[np.uint8], NDArray[np.uint8]]
console = Console()


class Rates(Protocol):
    """What of a recipe `parameter_groups` needs."""

    @property
    def attention_factor(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...


@dataclass(frozen=True)
class Recipe:
    """All that decides how a network comes out, the architecture apart.

    Two cycles of falling learning rate. The base learns from small crops, by cross-entropy
    that favours rare classes. The twins' cycle, the last third of the steps, sees larger
    crops and adds a soft Jaccard loss: favouring made people and poles fat, and IoU is what
    is scored.
    """

    steps: int = 3900
    batch: int = 8
    crop: tuple[int, int] = (128, 176)
    learning_rate: float = 2e-3
    second_crop: tuple[int, int] = (160, 224)
    second_learning_rate: float = 1e-3
    attention_factor: float = 3.0
    weight_decay: float = 0.01
    warm_up: int = 100
    auxiliary_weight: float = 0.4
    scenes: int = 2000
    seed: int = 0

    @property
    def turn(self) -> int:
        """The twins' first step."""
        return 2 * self.steps // 3

    def span(self, name: str) -> tuple[int, int]:
        """A network's first step and the one after its last."""
        return (0, self.turn) if name == "base" else (self.turn, self.steps)


def architecture(name: str) -> Architecture:
    """A slim three-stage ResNet-50 under UPerHead; `name` is ``base``, ``plain`` or ``fdconv``."""
    base = 16
    widths = tuple(base * 4 * 2**stage for stage in range(3))
    return Architecture(
        backbone=BackboneConfig(
            depth=50,
            base_channels=base,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            out_indices=(0, 1, 2),
            conv=FDConvConfig(kernel_num=16) if name == "fdconv" else None,
        ),
        decode_head=HeadConfig(
            type="UPerHead",
            in_channels=widths,
            in_index=(0, 1, 2),
            channels=32,
            num_classes=len(CLASSES),
        ),
        auxiliary_head=HeadConfig(
            type="FCNHead",
            in_channels=widths[-1:],
            in_index=(2,),
            channels=32,
            num_classes=len(CLASSES),
            num_convs=1,
            concat_input=False,
        ),
        classes=CLASSES,
        palette=PALETTE,
    )


def draw_many(seeds: range, size: tuple[int, int] = SIZE) -> Scenes:
    """Images ``(N, H, W, 3)`` and labels ``(N, H, W)`` uint8, drawn by a process per core."""
    draw = partial(draw_scene, height=size[0], width=size[1])
    # Fresh processes: a fork of one that has run torch's threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, cv2.setNumThreads, (1,)) as pool:
        drawn = list(pool.map(draw, seeds, chunksize=16))
    return np.stack([rgb for rgb, _ in drawn]), np.stack([labels for _, labels in drawn])


def batch_of(recipe: Recipe, step: int, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Step number `step`'s batch: a function of (seed, step), so that twins see the same.

    Returns RGB 0..255 float32 ``(B, 3, h, w)`` and labels int64 ``(B, h, w)``.
    """
    rng = np.random.default_rng([recipe.seed, step])
    crop = recipe.crop if step < recipe.turn else recipe.second_crop
    height, width = crop
    images, labels = [], []
    for index in rng.integers(0, len(scenes[0]), recipe.batch):
        rgb, truth = scenes[0][index], scenes[1][index]
        zoom = min(rng.uniform(0.75, 1.3), *(np.array(truth.shape) / crop))
        h, w = int(height * zoom), int(width * zoom)
        top = rng.integers(0, truth.shape[0] - h + 1)
        left = rng.integers(0, truth.shape[1] - w + 1)
        window = slice(top, top + h), slice(left, left + w)
        rgb = cv2.resize(rgb[window], (width, height), interpolation=cv2.INTER_LINEAR)
        truth = cv2.resize(truth[window], (width, height), interpolation=cv2.INTER_NEAREST)
        if rng.random() < 0.5:
            rgb, truth = rgb[:, ::-1], truth[:, ::-1]
        light = rng.uniform(0.8, 1.25) * rng.uniform(0.93, 1.07, 3)
        images.append(rgb.astype(np.float32) * light.astype(np.float32))
        labels.append(truth.astype(np.int64))
    return (
        torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy()).clamp_(0, 255),
        torch.from_numpy(np.stack(labels)),
    )


def normalise(network: Segmentor, rgb: Tensor) -> Tensor:
    """RGB 0..255 to the network's input, as its preprocessing says."""
    preprocessing = network.architecture.preprocessing
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    return (rgb - mean[:, None, None]) / std[:, None, None]


class FastSpectrum(nn.Module):
    """The layer's `modulated_spectrum` as a product with a 0/1 matrix: the same numbers.

    Scatter and its gradient are slow on a CPU; a step is a fifth faster without them.
    """

    def __init__(self, layer: FDConv2d) -> None:
        super().__init__()
        self.layer = [layer]  # in a list, so that it is not registered below itself
        groups, bins = layer.kernel_num, layer.rows * (layer.columns // 2 + 1)
        rows, columns = layer.indices[0]
        self.spread = torch.zeros(groups, bins)
        flat = rows * (layer.columns // 2 + 1) + columns
        self.spread.scatter_(1, flat, 1.0)

    def forward(self, attention: Tensor) -> Tensor:
        """``(B, G)`` -> ``(B, R, C/2+1, 2)``."""
        layer = self.layer[0]
        gain = (attention @ self.spread).reshape(-1, layer.rows, layer.columns // 2 + 1, 1)
        return layer.dft_weight * layer.alpha * gain


def dynamic_layers(network: nn.Module) -> dict[str, FDConv2d]:
    """The dynamic FDConv layers by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, FDConv2d) and module.is_dynamic
    }


def parameter_groups(network: nn.Module, recipe: Rates) -> list[dict[str, Any]]:
    """AdamW's groups: no decay on vectors; rates that let the twins learn alike.

    AdamW moves each number by about the learning rate. Moving every bin of a stored spectrum
    by r moves its kernel's weights by r · scale / sqrt(R·C / 2) only, three to four times
    less than r; the group's rate makes up for it. Attention and band modulation start from
    nothing where all else is trained: they get `attention_factor` times the rate.
    """
    factors: dict[int, float] = {}
    for layer in dynamic_layers(network).values():
        factors |= {id(p): recipe.attention_factor for p in layer.parameters()}
        scale = math.sqrt(layer.rows * layer.columns / 2) / layer.spectrum_scale
        factors[id(layer.dft_weight)] = scale
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in network.parameters():
        factor = round(factors.get(id(parameter), 1.0), 1)
        decay = recipe.weight_decay / factor if parameter.ndim > 1 else 0.0
        groups[factor, decay].append(parameter)
    return [
        {"params": members, "factor": factor, "weight_decay": decay}
        for (factor, decay), members in groups.items()
    ]


def rate(recipe: Recipe, step: int) -> float:
    """Learning rate: in each cycle a linear warm-up, then half a cosine down to nothing."""
    peak, (start, end) = recipe.learning_rate, recipe.span("base")
    if step >= recipe.turn:
        peak, (start, end) = recipe.second_learning_rate, recipe.span("twins")
    if step - start < recipe.warm_up:
        return peak * (step - start + 1) / recipe.warm_up
    share = (step - start - recipe.warm_up) / max(end - start - recipe.warm_up, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def class_weights(scenes: Scenes) -> Tensor:
    """Rare classes weigh more, by the fourth root of how rare; mean weight 1 over pixels."""
    counts = np.bincount(scenes[1].reshape(-1), minlength=len(CLASSES)) + 1.0
    share = counts / counts.sum()
    weights = share**-0.25
    return torch.from_numpy((weights / (weights * share).sum()).astype(np.float32))


def train(name: str, recipe: Recipe, scenes: Scenes, work: Path, minutes: float) -> bool:
    """Train one network to the end of its span, or for `minutes`. True when it is done.

    The state goes to ``work/<name>.state`` every two minutes and at the end; a twin starts
    from ``work/base.state``.
    """
    torch.manual_seed(recipe.seed)
    network = build_segmentor(architecture(name))
    start, end = recipe.span(name)
    if name in TWINS:
        continue_from(network, load_state(work / "base.state")["network"])
    for layer in dynamic_layers(network).values():
        object.__setattr__(layer, "modulated_spectrum", FastSpectrum(layer))
    optimiser = torch.optim.AdamW(parameter_groups(network, recipe), lr=recipe.learning_rate)
    weights = class_weights(scenes)
    path, step, seconds = work / f"{name}.state", start, 0.0
    if path.exists():
        state = load_state(path)
        if state["recipe"] != describe(recipe):
            raise SystemExit(f"{path} was trained by another recipe. Move it away, or give its.")
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        step, seconds = state["step"], state["seconds"]
    network.train()
    began = saved = time.monotonic()
    recent: list[float] = []

    def save() -> None:
        content = {
            "recipe": describe(recipe),
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "step": step,
            "seconds": seconds + time.monotonic() - began,
        }
        partial_path = path.with_suffix(".part")
        torch.save(content, partial_path)
        partial_path.replace(path)

    while step < end and time.monotonic() - began < 60 * minutes:
        for group in optimiser.param_groups:
            group["lr"] = rate(recipe, step) * group["factor"]
        rgb, labels = batch_of(recipe, step, scenes)
        features = network.backbone(normalise(network, rgb))
        first = step < recipe.turn
        favour = weights if first else None
        loss = segmentation_loss(network.decode_head(features), labels, favour, jaccard=not first)
        assert network.auxiliary_head is not None
        auxiliary = segmentation_loss(network.auxiliary_head(features), labels, favour)
        optimiser.zero_grad(set_to_none=True)
        (loss + recipe.auxiliary_weight * auxiliary).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        step += 1
        recent.append(loss.item())
        if step % 50 == 0 or step == end:
            pace = (time.monotonic() - began) / len(recent)
            last = sum(recent[-50:]) / len(recent[-50:])
            console.print(
                f"{name} step {step}/{end}  loss {last:.3f}  {pace:.2f} s/step",
                highlight=False,
            )
        if time.monotonic() - saved > 120:
            save()
            saved = time.monotonic()
    if recent:
        save()
    return step >= end


def continue_from(network: Segmentor, base: dict[str, Tensor]) -> None:
    """Start a twin where the base ended; an FDConv network computes the same at first.

    Kernels become spectra by the published conversion. The published layer leaves one
    attention head, `filter_fc`, far from zero, which would spoil what the base has learnt:
    here it starts near zero as its sisters do.
    """
    layers = dynamic_layers(network)
    if not layers:
        network.load_state_dict(base)
        return
    conv = network.architecture.backbone.conv
    assert conv is not None
    converted = convert_state_dict(base, use_fdconv_if_c_gt=conv.use_fdconv_if_c_gt)
    missing, unexpected = network.load_state_dict(converted, strict=False)
    assert not unexpected, unexpected
    assert all(".KSM_" in key or ".FBM." in key for key in missing), missing
    for layer in layers.values():
        assert layer.KSM_Global.filter_fc is not None
        nn.init.normal_(layer.KSM_Global.filter_fc.weight, std=1e-6)


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


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state this script wrote."""
    state: dict[str, Any] = torch.load(path, weights_only=True)  # noqa: TID251 (own file, weights only)
    return state


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON would hold it."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in vars(recipe).items()}


@torch.no_grad()
def confusions(network: Segmentor, scenes: Scenes) -> Iterator[NDArray[np.int64]]:
    """One confusion matrix per scene, by the network's own test mode."""
    for rgb, truth in zip(*scenes, strict=True):
        image = torch.from_numpy(rgb.transpose(2, 0, 1).astype(np.float32))[None]
        logits = network.predict(normalise(network, image))
        yield confusion_matrix(truth, logits.argmax(1)[0].numpy(), len(CLASSES))


@torch.no_grad()
def attention_spread(network: nn.Module, images: Iterable[Tensor]) -> dict[str, dict[str, float]]:
    """How much each attention differs from image to image, ``(1, 3, H, W)`` normalised each.

    Per kind: the standard deviation over images, averaged over an attention's entries, as
    the smallest, the mean and the largest of the dynamic layers.
    """
    seen: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    hooks = []
    for name, layer in dynamic_layers(network).items():

        def keep_global(_: nn.Module, __: Any, out: Any, name: str = name) -> None:
            for kind, value in out._asdict().items():
                if value is not None:
                    seen[kind, name].append(value.flatten(1))

        def keep_local(_: nn.Module, __: Any, out: Tensor, name: str = name) -> None:
            seen["local", name].append(out.flatten(1))

        def keep_bands(_: nn.Module, inputs: tuple[Tensor], out: Tensor, name: str = name) -> None:
            # What band modulation did, relative to its input.
            change = (out - inputs[0]).flatten(1).norm(dim=1) / inputs[0].flatten(1).norm(dim=1)
            seen["bands (relative change)", name].append(change[:, None])

        hooks.append(layer.KSM_Global.register_forward_hook(keep_global))
        if layer.KSM_Local is not None:
            hooks.append(layer.KSM_Local.register_forward_hook(keep_local))
        if layer.FBM is not None:
            hooks.append(layer.FBM.register_forward_hook(keep_bands))
    for image in images:
        network(image)
    for hook in hooks:
        hook.remove()
    by_kind: dict[str, list[float]] = defaultdict(list)
    for (kind, _), values in seen.items():
        stacked = torch.cat(values)
        spread = stacked.mean() if kind.startswith("bands") else stacked.std(0).mean()
        by_kind[kind].append(float(spread))
    return {
        kind: {"min": min(v), "mean": sum(v) / len(v), "max": max(v)} for kind, v in by_kind.items()
    }


def evaluate(recipe: Recipe, work: Path, out: Path) -> None:
    """Score both networks on the same scenes, package them, write the record."""
    console.print(f"drawing {len(EVALUATION_SEEDS)} held-out scenes")
    scenes = draw_many(EVALUATION_SEEDS)
    record: dict[str, Any] = {
        "classes": list(CLASSES),
        "recipe": describe(recipe),
        "seeds": {
            "training": [TRAINING_SEEDS.start, TRAINING_SEEDS.start + recipe.scenes],
            "evaluation": [EVALUATION_SEEDS.start, EVALUATION_SEEDS.stop],
            "held_out": [HELD_OUT_SEEDS.start, HELD_OUT_SEEDS.stop],
        },
        "scene_size": list(SIZE),
        **circumstances(),
        "networks": {},
    }
    found: dict[str, Scores] = {}
    base_seconds = load_state(work / "base.state")["seconds"]
    out.mkdir(parents=True, exist_ok=True)
    for name in TWINS:
        state = load_state(work / f"{name}.state")
        network = build_segmentor(architecture(name))
        network.load_state_dict(state["network"])
        network.eval()
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
            seen = (normalise(network, image[None]) for image in images)
            record["networks"][name]["attention_spread"] = attention_spread(network, seen)
    folder = out / "heldout"
    folder.mkdir(exist_ok=True)
    for index in range(len(HELD_OUT_SEEDS)):
        save_scene(folder / f"{index:03d}.png", scenes[0][index], scenes[1][index])
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(table(found))


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


def circumstances() -> dict[str, Any]:
    """On what and with what a record's network was trained."""
    return {
        "machine": machine(),
        "seconds": "wall-clock time, whatever else the machine was doing",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
        },
    }


def machine() -> str:
    """The processor's name and how many cores there were."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return f"{model}, {os.cpu_count()} cores"


def main() -> None:
    """Parse the command line and go."""
    standard = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=standard.steps)
    parser.add_argument("--scenes", type=int, default=standard.scenes, help="training scenes")
    parser.add_argument("--seed", type=int, default=standard.seed)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop each network after")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=("base", *TWINS), help="and compare nothing")
    parser.add_argument("--work", type=Path, default=Path("/tmp/fdconv-streets"))
    parser.add_argument(
        "--out", type=Path, default=Path(fdconv_deploy.demo.__file__).parent / "assets"
    )
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps, scenes=arguments.scenes, seed=arguments.seed)
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    console.print(f"drawing {recipe.scenes} training scenes")
    scenes = draw_many(TRAINING_SEEDS[: recipe.scenes])
    done = True
    for name in [arguments.only] if arguments.only else ("base", *TWINS):
        done = done and train(name, recipe, scenes, arguments.work, arguments.minutes)
    if not done:
        console.print("stopped before the end; the same command goes on from here")
    elif not arguments.only:
        evaluate(recipe, arguments.work, arguments.out)


if __name__ == "__main__":
    main()
