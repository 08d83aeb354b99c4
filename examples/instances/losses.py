"""Mask R-CNN's five losses, as mmdetection has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.instances.data import Truth
from examples.instances.regions import cut_out
from examples.instances.targets import assign, box_iou, encode, sample
from fdconv_deploy.config import BoxCoderConfig


def proposal_losses(
    scores: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    truths: Sequence[Truth],
    coder: BoxCoderConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Whether an anchor is on a thing, and how to shift it there: cross-entropy and L1.

    Args:
        scores: logits of all anchors, ``(B, A)``.
        deltas: their shifts, ``(B, A, 4)``.
        anchors: ``(A, 4)``.
        truths: what is in each image.
        coder: the head's.
        generator: which anchors count is drawn by it.
    """
    kinds, logits, moves, goals = [], [], [], []
    for image, truth in enumerate(truths):
        assigned = assign(box_iou(anchors, truth.boxes), 0.7, 0.3, 0.3)
        positive, negative = sample(assigned, 256, 0.5, generator)
        chosen = torch.cat([positive, negative])
        kinds.append((assigned[chosen] >= 0).float())
        logits.append(scores[image, chosen])
        moves.append(deltas[image, positive])
        goals.append(encode(anchors[positive], truth.boxes[assigned[positive]], coder))
    count = sum(len(kind) for kind in kinds)
    return (
        F.binary_cross_entropy_with_logits(torch.cat(logits), torch.cat(kinds)),
        (torch.cat(moves) - torch.cat(goals)).abs().sum() / count,
    )


class Regions:
    """The regions that the second stage learns from: some of one image's proposals.

    Attributes:
        boxes: ``(R, 4)``, those on things first.
        positive: how many are.
        things: which thing each of these is for, ``(positive,)``.
        labels: classes, ``(R,)``; the background's number is that of the classes.
    """

    def __init__(
        self, proposals: Tensor, truth: Truth, classes: int, number: int, rng: torch.Generator
    ) -> None:
        # The things' own boxes are among them, or the masks would have little to learn at first.
        boxes = torch.cat([truth.boxes, proposals])
        assigned = assign(box_iou(boxes, truth.boxes), 0.5, 0.5, 0.5)
        positive, negative = sample(assigned, number, 0.25, rng)
        self.boxes = boxes[torch.cat([positive, negative])]
        self.positive = len(positive)
        self.things = assigned[positive]
        background = torch.full((len(negative),), classes)
        self.labels = torch.cat([truth.labels[self.things], background])
        self.truth = truth

    def goals(self, coder: BoxCoderConfig) -> Tensor:
        """Deltas ``(positive, 4)`` to the things' boxes."""
        return encode(self.boxes[: self.positive], self.truth.boxes[self.things], coder)

    def masks(self, size: int) -> Tensor:
        """The things' masks within their regions, ``(positive, size, size)`` 0 or 1."""
        if not self.positive:
            return torch.zeros(0, size, size)
        own = self.truth.masks[self.things, None]
        cut = cut_out(own, self.boxes[: self.positive], size, 1, 1)
        return (cut[:, 0] >= 0.5).float()


def box_losses(
    logits: Tensor, deltas: Tensor, regions: Sequence[Regions], coder: BoxCoderConfig
) -> tuple[Tensor, Tensor]:
    """A region's class and its better box: cross-entropy and L1.

    Args:
        logits: ``(R, classes + 1)`` of all images' regions, one after the other.
        deltas: ``(R, classes, 4)``.
        regions: those of each image.
        coder: the head's.
    """
    labels = torch.cat([region.labels for region in regions])
    positive = (labels < logits.shape[1] - 1).nonzero()[:, 0]
    moves = deltas[positive, labels[positive]]
    goals = torch.cat([region.goals(coder) for region in regions])
    return F.cross_entropy(logits, labels), (moves - goals).abs().sum() / len(labels)


def mask_loss(logits: Tensor, regions: Sequence[Regions]) -> Tensor:
    """Each thing's mask in its own class's map: cross-entropy.

    Args:
        logits: ``(P, classes, S, S)`` of all images' regions on things.
        regions: those of each image.
    """
    labels = torch.cat([region.labels[: region.positive] for region in regions])
    goals = torch.cat([region.masks(logits.shape[-1]) for region in regions])
    own = logits[torch.arange(len(labels)), labels]
    # A sum and its count, for a batch without a thing has no mean.
    return F.binary_cross_entropy_with_logits(own, goals, reduction="sum") / max(goals.numel(), 1)
