"""Inputs to compare a graph with its network on, where nobody gave any or those cannot tell.

Drawn pictures, not noise: see `fdconv_deploy.export.validation.sample_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fdconv_deploy.export.source_network import Source
from fdconv_deploy.export.validation.detector_inputs import made_up_detector_inputs
from fdconv_deploy.export.validation.sample_inputs import made_up_images
from torch import Tensor

from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.segmentor import Segmentor

# How many sets of scenes are drawn until one can tell.
TRIES = 4


def drawn(network: Segmentor | Detector, size: tuple[int, int]) -> list[Source]:
    """Drawn street scenes of several seeds, as a segmentor's or detector's inputs.

    Args:
        size: height and width in pixels.
    """
    preprocessing = network.architecture.preprocessing

    def rows(seed: int) -> Callable[[int], tuple[Tensor, ...]]:
        def make(batch: int) -> tuple[Tensor, ...]:
            if isinstance(network, Detector):
                return made_up_detector_inputs(batch, size, preprocessing, seed=seed)
            return (made_up_images(batch, size, preprocessing, seed=seed),)

        return make

    said = "drawn street scenes"
    return [Source(f"{said}, set {n + 1}" if n else said, rows(n)) for n in range(TRIES)]


def mirrored(example: Tensor) -> list[Source]:
    """A module's example from right to left, and upside down."""

    def rows(axis: int) -> Callable[[int], tuple[Tensor, ...]]:
        def make(batch: int) -> tuple[Tensor, ...]:
            chosen = example[torch.arange(batch) % len(example)]
            return (chosen.flip(axis).contiguous(),)

        return make

    if example.ndim != 4:
        return []
    return [
        Source("the example, mirrored", rows(-1)),
        Source("the example, upside down", rows(-2)),
    ]
