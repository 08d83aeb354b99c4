"""Mask2Former's loss: each class in an image is given to one query, by the cheapest assignment.

Costs, losses, and their weights are those of https://arxiv.org/abs/2112.01527; masks are compared
at random pixels, as there, but drawn evenly.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
NO_OBJECT_WEIGHT = 0.1


def assign(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column of each row so that the sum of costs is the least, no column twice.

    Shortest augmenting paths (Jonker and Volgenant, 1987).

    Args:
        costs: ``(rows, columns)``, finite, no more rows than columns.

    Returns:
        ``(rows,)`` columns.
    """
    rows, columns = costs.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    owner = np.full(columns, -1)
    for new in range(rows):
        distance, before = np.full(columns, np.inf), np.full(columns, -1)
        done = np.zeros(columns, bool)
        row, column, length = new, -1, 0.0
        while row >= 0:  # until a column that nobody owns
            reduced = length + costs[row] - row_price[row] - column_price
            closer = ~done & (reduced < distance)
            distance[closer], before[closer] = reduced[closer], column
            column = int(np.where(done, np.inf, distance).argmin())
            length, done[column] = distance[column], True
            row = int(owner[column])
        visited = done.copy()
        visited[column] = False
        row_price[owner[visited]] += length - distance[visited]
        row_price[new] += length
        column_price[visited] -= length - distance[visited]
        while column >= 0:  # hand columns on along the path
            previous = int(before[column])
            owner[column] = new if previous < 0 else owner[previous]
            column = previous
    found = np.empty(rows, np.int64)
    found[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return found


def set_loss(
    predictions: Iterable[tuple[Tensor, Tensor]],
    labels: Tensor,
    points: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The three losses, weighted, each the sum over predictions.

    Args:
        predictions: class logits ``(B, Q, classes + 1)`` and mask logits ``(B, Q, h, w)`` of each
            decoder layer.
        labels: ``(B, H, W)`` int64.
        points: random pixels of an image at which masks are compared.
    """
    batch, height, width = labels.shape
    chosen = torch.randint(height * width, (batch, points), generator=generator)
    truth = labels.flatten(1).gather(1, chosen)
    y, x = chosen // width, chosen % width
    places = torch.stack([(x + 0.5) / width, (y + 0.5) / height], -1) * 2 - 1
    total: dict[str, Tensor] = {}
    for classes, masks in predictions:
        sampled = F.grid_sample(masks, places[:, None], align_corners=False)[:, :, 0]
        for name, loss in _losses(classes, sampled, truth).items():
            total[name] = total.get(name, torch.zeros(())) + loss
    return total


def _losses(classes: Tensor, masks: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """``classes (B, Q, K + 1)``, ``masks (B, Q, P)`` logits, ``truth (B, P)`` class indices."""
    nothing = classes.shape[-1] - 1
    wanted = torch.full(classes.shape[:2], nothing)
    chosen, targets = [], []
    for image, (scores, logits, pixels) in enumerate(zip(classes, masks, truth, strict=True)):
        present = pixels.unique()
        target = (pixels == present[:, None]).float()
        with torch.no_grad():
            costs = matching_costs(scores, logits, present, target)
        queries = torch.from_numpy(assign(costs.double().numpy()))
        wanted[image, queries] = present
        chosen.append(logits[queries])
        targets.append(target)
    weights = torch.ones(nothing + 1)
    weights[nothing] = NO_OBJECT_WEIGHT
    logits, target = torch.cat(chosen), torch.cat(targets)
    return {
        "class": CLASS_WEIGHT * F.cross_entropy(classes.transpose(1, 2), wanted, weights),
        "mask": MASK_WEIGHT * F.binary_cross_entropy_with_logits(logits, target),
        "dice": DICE_WEIGHT * dice(logits.sigmoid(), target).mean(),
    }


def matching_costs(scores: Tensor, logits: Tensor, present: Tensor, target: Tensor) -> Tensor:
    """What it costs to give each class to each query, ``(T, Q)``.

    Args:
        scores: class logits ``(Q, K + 1)``.
        logits: of masks, ``(Q, P)``.
        present: classes ``(T,)``.
        target: their masks ``(T, P)``, 0 or 1.
    """
    of_class = -scores.softmax(-1)[:, present].T
    inside, outside = F.softplus(-logits), F.softplus(logits)
    of_mask = (target @ inside.T + (1 - target) @ outside.T) / target.shape[1]
    guess = logits.sigmoid()
    shared, both = target @ guess.T, target.sum(-1)[:, None] + guess.sum(-1)
    of_dice = 1 - (2 * shared + 1) / (both + 1)
    return CLASS_WEIGHT * of_class + MASK_WEIGHT * of_mask + DICE_WEIGHT * of_dice


def dice(guess: Tensor, target: Tensor) -> Tensor:
    """One minus the smoothed Dice coefficient of each row, ``(N, P)`` -> ``(N,)``."""
    shared, both = (guess * target).sum(-1), guess.sum(-1) + target.sum(-1)
    return 1 - (2 * shared + 1) / (both + 1)
