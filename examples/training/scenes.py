"""Drawn streets, and which of them are for training."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import cv2
import torch
from torch import Tensor

from fdconv_deploy.config import Preprocessing

TRAINING_SEEDS = range(1_000_000, 9_000_000)
# Height and width that networks are trained and scored at.
SIZE = (192, 256)

T = TypeVar("T")


def draw_many(draw: Callable[[int], T], seeds: range, processes: int | None = None) -> list[T]:
    """``draw`` of every seed, by so many processes, or one per core."""
    # Fresh processes: a fork of one that has run torch's threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, cv2.setNumThreads, (1,)) as pool:
        return list(pool.map(draw, seeds, chunksize=16))


def normalise(preprocessing: Preprocessing, rgb: Tensor) -> Tensor:
    """RGB 0..255 ``(..., 3, H, W)`` to a network's input, as its preprocessing says."""
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    return (rgb - mean[:, None, None]) / std[:, None, None]
