"""What a training's record says beside the scores."""

from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from examples.training.layers import dynamic_layers
from examples.training.scenes import SIZE, TRAINING_SEEDS
from fdconv_deploy.demo import HELD_OUT_SEEDS
from fdconv_deploy.latency.machine import cpu_model


def origins(classes: Iterable[str], recipe: dict[str, Any], evaluation: range) -> dict[str, Any]:
    """How a record begins: what was learnt, by which recipe, from which scenes, where.

    :param recipe: as `run.describe` tells it.
    :param evaluation: the seeds of the scenes that are scored.
    """
    training = TRAINING_SEEDS[: recipe["scenes"]]
    seeds = {"training": training, "evaluation": evaluation, "held_out": HELD_OUT_SEEDS}
    return {
        "classes": list(classes),
        "recipe": recipe,
        "seeds": {name: [each.start, each.stop] for name, each in seeds.items()},
        "scene_size": list(SIZE),
        "machine": f"{cpu_model()}, {os.cpu_count()} cores",
        "seconds": "wall-clock time, whatever else the machine was doing",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
        },
    }


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


def write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """Write a JSON file; ``indent=None`` for one that nobody reads."""
    separators = (",", ":") if indent is None else None
    path.write_text(json.dumps(content, indent=indent, separators=separators) + "\n")
