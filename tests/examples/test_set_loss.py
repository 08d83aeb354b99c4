"""Mask2Former's training loss: the assignment against brute force, the loss at known answers."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from examples.segformer_mask2former.set_loss import assign, set_loss


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 3), (4, 6), (5, 5)])
def test_assignment_is_the_cheapest(shape: tuple[int, int]) -> None:
    rows, columns = shape
    for seed in range(30):
        rng = np.random.default_rng(seed)
        # Whole numbers too, where several assignments cost the same; and negative ones.
        costs = rng.integers(-3, 4, shape).astype(float) if seed % 2 else rng.normal(size=shape)
        found = assign(costs)
        assert len(set(found.tolist())) == rows
        cheapest = min(
            costs[range(rows), list(p)].sum() for p in permutations(range(columns), rows)
        )
        assert costs[range(rows), found].sum() == pytest.approx(cheapest, abs=1e-12)


def logits_of(labels: torch.Tensor, order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sure predictions of one query for each of three classes, in this order."""
    classes = torch.full((1, 3, 4), -20.0)
    for query, index in enumerate(order):
        classes[0, query, index] = 20.0
    masks = torch.stack([(labels[0] == index).float() * 40 - 20 for index in order])[None]
    return classes, masks


def test_loss_does_not_depend_on_which_query_finds_which_class() -> None:
    labels = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]]])
    for order in permutations(range(3)):
        losses = set_loss([logits_of(labels, list(order))], labels, 400, torch.Generator())
        assert losses.keys() == {"class", "mask", "dice"}
        assert float(losses["class"]) < 1e-3
        # The four pixels' borders are interpolated, so that masks are not quite sure there.
        assert float(losses["mask"]) + float(losses["dice"]) < 0.05


def test_loss_sums_over_layers_and_has_gradients() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (2, 8, 8))
    classes = torch.randn(2, 5, 4, requires_grad=True)
    masks = torch.randn(2, 5, 4, 4, requires_grad=True)
    once, twice = (
        set_loss([(classes, masks)] * layers, labels, 50, torch.Generator().manual_seed(0))
        for layers in (1, 2)
    )
    for name in once:
        assert float(twice[name].detach()) == pytest.approx(2 * float(once[name].detach()))
    torch.stack(list(once.values())).sum().backward()
    assert classes.grad is not None
    assert masks.grad is not None
    assert float(classes.grad.abs().min()) > 0
    assert float(masks.grad.abs().max()) > 0
