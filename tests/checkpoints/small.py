"""Small networks and their weights, and key lists of big ones without data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.infer_config import infer_config
from fdconv_deploy.checkpoints.settings import Inference
from fdconv_deploy.config import (
    HEAD_CONFIGS,
    DecodeHeadConfig,
    FCNHeadConfig,
    FDConvConfig,
    Preprocessing,
    ResNetConfig,
    SegmentorConfig,
    TestMode,
)
from fdconv_deploy.nn import Segmentor

# What plain files hold.
WEIGHTS = {
    "backbone.conv1.weight": torch.arange(6.0).reshape(2, 3),
    "decode_head.conv_seg.weight": torch.ones(2, 2),
}
CLASSES = ("sky", "road", "tree")
PALETTE = ((70, 130, 180), (128, 64, 128), (107, 142, 35))


def head_config(*, type: str, **fields: Any) -> DecodeHeadConfig:  # noqa: A002 - the field's name
    """The head's own kind of config."""
    return HEAD_CONFIGS[type](**fields)


def small_architecture(
    *,
    auxiliary: bool = False,
    preprocessing: Preprocessing | None = None,
    head: Mapping[str, object] | None = None,
    **backbone: object,
) -> SegmentorConfig:
    """A ResNet-18 with base 8 and two dynamic stages, UPerHead, three classes."""
    fields: dict[str, object] = {"depth": 18, "base_channels": 8, "conv": FDConvConfig()}
    config = ResNetConfig(**(fields | backbone))
    widths = tuple(config.base_channels * 2**i * expansion(config) for i in config.out_indices)
    index = tuple(range(len(widths)))
    values = {"type": "UPerHead", "in_channels": widths, "in_index": index, "channels": 8}
    first = head_config(**{**values, "num_classes": 3, **(head or {})})
    second = FCNHeadConfig(
        in_channels=widths[-1:],
        in_index=index[-1:],
        channels=8,
        num_classes=3,
        num_convs=1,
        concat_input=False,
    )
    return SegmentorConfig(
        backbone=config,
        decode_head=first,
        auxiliary_head=second if auxiliary else None,
        test=TestMode(mode="slide", crop_size=(64, 64), stride=(48, 48)),
        preprocessing=preprocessing or Preprocessing(scale=(256, 128)),
        classes=CLASSES[: first.num_classes],
        palette=PALETTE[: first.num_classes],
    )


def expansion(config: ResNetConfig) -> int:
    return 1 if config.depth in (18, 34) else 4


def shapes_of(architecture: SegmentorConfig) -> dict[str, Tensor]:
    """The network's state dict on the meta device: names and shapes without data."""
    with torch.device("meta"):
        return dict(Segmentor(architecture).state_dict())


def weights_of(architecture: SegmentorConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights for a network."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for key, value in shapes_of(architecture).items():
        if not value.is_floating_point():
            weights[key] = torch.zeros(value.shape, dtype=value.dtype)
            continue
        numbers = torch.rand(value.shape, generator=generator)
        # Scales and variances around 1, the rest small and of both signs.
        norm = value.ndim == 1 and key.endswith((".weight", ".running_var", ".scale"))
        weights[key] = numbers + 0.5 if norm else (numbers - 0.5) * 0.5
    return weights


def key_list(path: Path) -> dict[str, Tensor]:
    """A reference key list as tensors on the meta device."""
    keys = json.loads(path.read_text())["keys"]
    return {
        key["key"]: torch.empty(key["shape"], dtype=getattr(torch, key["dtype"]), device="meta")
        for key in keys
    }


def saved(path: Path, content: Any, **options: Any) -> Path:
    """``content`` in a file, by PyTorch."""
    torch.save(content, path, **options)
    return path


def dynamic_state(**conv: Any) -> dict[str, Tensor]:
    """The shapes of a small network with dynamic layers."""
    return shapes_of(small_architecture(conv=FDConvConfig(**conv)))


def infer(state: dict[str, Tensor], model: dict[str, Any] | None = None, **more: Any) -> Inference:
    """What weights and a config's ``model`` tell."""
    config = None if model is None else Config({"model": model})
    return infer_config(state, config=config, whole=True, **more)


@contextmanager
def bounded_work(most: int) -> Iterator[None]:
    """A block that may make this many calls of functions, however long they take."""
    count = 0

    def look(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")
        if count > most:
            sys.setprofile(None)
            raise AssertionError(f"more than {most} calls")

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)
