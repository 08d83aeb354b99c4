"""Which frequency order a checkpoint was trained with, by its weights alone.

The spectrum of a real kernel is mirrored in its first column and in its Nyquist column: bins r
and R − r are complex conjugates. A layer starts from such a spectrum. In those two columns the
inverse transform drops imaginary parts, so the gradients of r and R − r are conjugates too,
each times its own group's attention. Two mirror bins of one group therefore stay mirrored
through all of training, with SGD, Adam and their like; two bins of different groups part.
Mirror bins have equal radii, so which of them lie in one group is just what orders differ in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fdconv_deploy.checkpoints.infer_layers import Layer, Shapes, conv_layers
from fdconv_deploy.nn.spectrum import bin_order

NamedOrder = Literal["torch", "stable"]
CANDIDATES: tuple[NamedOrder, ...] = ("torch", "stable")

# A pair has parted if its bins differ by more than this, relative to their size; by 200 times what
# most pairs of one group differ by; and by more than the file's own precision. Those of one group
# differ by rounding: after 3900 steps of AdamW most by 2e-7 and all by less than 1.2e-5, where
# those of two groups differ by 1e-2 and more. If most differ by MIRRORED, none ever were mirrored.
PARTED, MIRRORED = 2e-5, 1e-4
# An order is ruled out by this many parted pairs in its groups: one could be a damaged number.
LEAD = 3
# Pairs that have not parted speak against an order only where pairs of two groups do part: of
# those that all orders put in two, at least this share.
CONTROL = 0.5


class WeightEvidence(BaseModel):
    """What the weights say about their frequency order.

    Attributes:
        order: the order they were trained with, or None: they do not show it.
        reason: in a sentence.
        pairs: mirror pairs looked at, of all FDConv layers.
        telling: those that lie in one group by one candidate and in two by another.
        parted: those whose bins are mirrored no longer.
        none_of_them: whether it was another order than the candidates.
        parted_in_one_group: of each candidate: pairs that could not have parted.
        mirrored_in_two_groups: of each candidate: pairs that should have, in a long training.
    """

    model_config = ConfigDict(frozen=True)

    order: NamedOrder | None
    reason: str
    none_of_them: bool = False
    pairs: int = 0
    telling: int = 0
    parted: int = 0
    parted_in_one_group: dict[str, int] = dict.fromkeys(CANDIDATES, 0)
    mirrored_in_two_groups: dict[str, int] = dict.fromkeys(CANDIDATES, 0)


class _Pairs(NamedTuple):
    """Mirror pairs of layers under one candidate: how far apart, and whether in two groups."""

    distance: NDArray[np.float64]
    split: NDArray[np.bool_]


def order_of_weights(state: Shapes, layers: Sequence[Layer] | None = None) -> WeightEvidence:
    """Detect the frequency order by which mirror bins of the spectra have parted.

    Args:
        state: a checkpoint's tensors, of any network with FDConv layers.
        layers: its convolutions, if they are known.
    """
    dynamic = [layer for layer in layers or conv_layers(state) if layer.dynamic]
    stored = [layer for layer in dynamic if layer.convert_param]
    if not stored:
        what = "they store kernels, not spectra" if dynamic else "there is no FDConv layer"
        return WeightEvidence(order=None, reason=f"The weights do not show the order: {what}.")
    found = {name: _pairs(state, stored, name) for name in CANDIDATES}
    types = {state[f"{layer.name}.dft_weight"].dtype for layer in stored}
    return _judge(
        found,
        whole=all(len(layer.spectrum) == 4 for layer in stored),
        precision=max(torch.finfo(kind).eps for kind in types),
    )


def _judge(found: Mapping[NamedOrder, _Pairs], *, whole: bool, precision: float) -> WeightEvidence:
    together = {name: pairs.distance[~pairs.split] for name, pairs in found.items()}
    usual = min((float(np.median(d)) for d in together.values() if len(d)), default=np.inf)
    limit = max(PARTED, 200 * usual, 4 * precision)
    parted = {name: pairs.distance > limit for name, pairs in found.items()}
    impossible: dict[str, int] = {
        n: int((parted[n] & ~pairs.split).sum()) for n, pairs in found.items()
    }
    missing: dict[str, int] = {
        n: int((pairs.split & ~parted[n]).sum()) for n, pairs in found.items()
    }
    best = min(found, key=lambda name: impossible[name] + missing[name])
    splits = np.stack([pairs.split for pairs in found.values()])
    differs = splits.any(0) & ~splits.all(0)
    if not whole:  # where a bin is stored depends on the order, too
        differs |= parted[best] != np.stack(list(parted.values())).any(0)

    evidence = partial(
        WeightEvidence,
        pairs=splits.shape[1],
        telling=int(differs.sum()),
        parted=int(parted[best].sum()),
        parted_in_one_group=dict(impossible),
        mirrored_in_two_groups=dict(missing),
    )

    def unknown(reason: str) -> WeightEvidence:
        return evidence(order=None, reason=f"The weights do not show the order: {reason}")

    if usual > max(MIRRORED, precision):
        return unknown("their spectra are not mirrored, so they did not start from kernels.")
    left = [name for name in found if impossible[name] < LEAD]
    counts = f"of {splits.shape[1]} pairs of mirror bins, {int(parted[best].sum())} have parted"
    against = ", ".join(f"{n} by {name!r}" for name, n in impossible.items())
    if not left:
        return evidence(
            order=None,
            none_of_them=True,
            reason=f"The weights were trained with none of the orders {', '.join(found)}, or with "
            f"several in turn: {counts}, and some lie in one group by each ({against}), where they "
            "could not. Give the indices of the machine that trained them.",
        )
    if len(left) == 1:
        return evidence(
            order=left[0],
            reason=f"The weights were trained with the order {left[0]!r}: {counts} that lie in one "
            f"group, where they could not part: {against}.",
        )
    if not differs.any():
        return unknown("all orders put these layers' mirror bins alike.")
    control = splits.all(0)
    seen = int((parted[best] & control).sum())
    rest = min(missing[name] for name in left if name != best) - missing[best]
    parts = seen > 0 and seen >= CONTROL * control.sum()
    if parts and rest >= LEAD and missing[best] <= 0.1 * rest and not impossible[best]:
        unparted = ", ".join(f"{n} by {name!r}" for name, n in missing.items())
        return evidence(
            order=best,
            reason=f"The weights were trained with the order {best!r}: {counts}. Pairs that have "
            f"not, and that lie in two groups, where they would: {unparted}.",
        )
    if not parted[best].any():
        return unknown(
            "no mirror bins have parted, as in a network that was not trained since its "
            "conversion or whose kernel attention never differed."
        )
    return unknown(
        f"{counts}, and {int(differs.sum())} could distinguish orders, too few or too little "
        "trained."
    )


def _pairs(state: Mapping[str, Tensor], layers: Sequence[Layer], order: NamedOrder) -> _Pairs:
    found = [pairs for layer in layers for pairs in _pairs_of(state, layer, order)]
    distances, splits = zip(*found, strict=True)
    return _Pairs(np.concatenate(distances), np.concatenate(splits))


def _pairs_of(state: Mapping[str, Tensor], layer: Layer, order: NamedOrder) -> list[_Pairs]:
    """Of each plane: relative distances of mirror pairs, and whether they are in two groups."""
    stored = state[f"{layer.name}.dft_weight"]
    rows, columns = layer.out_channels * layer.kernel[0], layer.columns
    half = columns // 2 + 1
    kept = layer.kept_bins
    ranking = bin_order(rows, columns, order)[:kept]
    rank = torch.full((rows * half,), -1, dtype=torch.int64)
    rank[ranking] = torch.arange(kept)
    upper = torch.arange(1, (rows + 1) // 2)
    # Column 0 and, of an even number of columns, the Nyquist column.
    mirrored = (0,) if columns % 2 else (0, half - 1)
    bins = torch.cat([upper * half + column for column in mirrored])
    mirrors = torch.cat([(rows - upper) * half + column for column in mirrored])
    both = (rank[bins] >= 0) & (rank[mirrors] >= 0)
    ratio = layer.param_ratio or 1
    size = kept // (layer.attentions // ratio)
    split = (both & (rank[bins] // size != rank[mirrors] // size)).numpy()
    # A cut spectrum is stored by rank, a whole one by place.
    cut = stored.ndim == 3
    flat = stored.detach().double().reshape(ratio, -1, 2)
    result = []
    for plane in torch.view_as_complex(flat.contiguous()):
        one = plane[rank[bins] if cut else bins]
        other = plane[rank[mirrors] if cut else mirrors].conj()
        sizes = (one.abs() + other.abs()) / 2
        # A bin that happens to be tiny is measured by what is usual.
        usual = float(plane.abs().median())
        distance = (one - other).abs() / sizes.clamp_min(0.1 * usual + 1e-30)
        # A pair that is not stored says nothing: it counts as mirrored and in one group.
        result.append(_Pairs(torch.where(both, distance, 0.0).numpy(), split))
    return result
