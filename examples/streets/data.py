"""Drawn streets as batches: images and their labels."""

from __future__ import annotations

from functools import partial

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.streets.scenes import CLASSES, draw_scene
from examples.streets.schedule import Recipe
from examples.training.scenes import SIZE, draw_many

Scenes = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def draw_scenes(seeds: range, size: tuple[int, int] = SIZE) -> Scenes:
    """Images ``(N, H, W, 3)`` and labels ``(N, H, W)`` uint8."""
    drawn = draw_many(partial(draw_scene, height=size[0], width=size[1]), seeds)
    return np.stack([rgb for rgb, _ in drawn]), np.stack([labels for _, labels in drawn])


def batch_of(recipe: Recipe, step: int, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Step number `step`'s batch: a function of (seed, step), so that both networks see the same.

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


def class_weights(scenes: Scenes) -> Tensor:
    """Rare classes weigh more, by the fourth root of how rare; mean weight 1 over pixels."""
    counts = np.bincount(scenes[1].reshape(-1), minlength=len(CLASSES)) + 1.0
    share = counts / counts.sum()
    weights = share**-0.25
    return torch.from_numpy((weights / (weights * share).sum()).astype(np.float32))
