"""Which frequency order a checkpoint was trained with: as saved in it, or by its weights alone.

The order decides which spectrum bins share a kernel attention (docs/frequency-order.md). Few files
save it; for others it is detected in the weights.

The spectrum of a real kernel is mirrored in its first column and in its Nyquist column: bins r
and R − r are complex conjugates. A layer starts from such a spectrum. In those two columns the
inverse transform drops imaginary parts, so the gradients of r and R − r are conjugates too,
each times its own group's attention. Two mirror bins of one group therefore stay mirrored
through all of training, with SGD, Adam and their like; two bins of different groups part.
Mirror bins have equal radii, so which of them lie in one group is just what orders differ in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fdconv_deploy.checkpoints.settings import ConfigT, Inference
from fdconv_deploy.checkpoints.state_dict import Layer, Shapes, conv_layers
from fdconv_deploy.errors import CheckpointError, UnsupportedLayerError
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.nn.spectrum import FrequencyOrder, bin_order, frequency_indices, group_map

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


class OrderReport(BaseModel):
    """Which order the network was trained with, and the evidence.

    Attributes:
        order: None where it cannot be determined.
        weights: the evidence in the weights.
        saved: which indices the file holds, which then decide; empty if it holds none.
    """

    model_config = ConfigDict(frozen=True)

    order: NamedOrder | None
    weights: WeightEvidence
    saved: str = ""

    @property
    def reasons(self) -> tuple[str, ...]:
        """In a sentence each."""
        return tuple(reason for reason in (self.saved, self.weights.reason) if reason)


def detect_order(state: Shapes) -> OrderReport:
    """The order that a checkpoint's tensors save, or that training left in its weights."""
    weights, saved = order_of_weights(state), saved_order(state)
    if saved is not None:
        return OrderReport(order=saved.name, weights=weights, saved=saved.reason)
    return OrderReport(order=weights.order, weights=weights)


# The order that a file saves


@dataclass(frozen=True)
class SavedOrder:
    """The ``indices`` that the file saves, by layer, ``(param_ratio, 2, kernel_num, M)`` int64.

    ``name`` is the order that all of them are in, or None: none of the named ones.
    """

    indices: Mapping[str, Tensor]
    name: NamedOrder | None

    @property
    def reason(self) -> str:
        """In a sentence."""
        order = "none of the named ones" if self.name is None else f"the order {self.name!r}"
        return f"The file holds the indices of {len(self.indices)} layers: {order}."


def saved_order(state: Shapes) -> SavedOrder | None:
    """The ``indices`` that a file saves, checked; None if it saves none."""
    indices: dict[str, Tensor] = {}
    named = list(CANDIDATES)
    for layer in conv_layers(state):
        if layer.indices is not None:
            indices[layer.name], orders = _saved_indices(layer, layer.indices)
            named = [order for order in named if order in orders]
    return SavedOrder(indices, named[0] if named else None) if indices else None


def _saved_indices(layer: Layer, buffer: Tensor) -> tuple[Tensor, list[NamedOrder]]:
    """Indices of any number type, as int64, and the orders that they are in."""
    found = buffer.detach().cpu()
    ratio = found.shape[0] if found.ndim == 4 else 0
    # Nothing is computed with what has not the size of a layer's indices.
    whole = found.numel() == 2 * ratio * layer.kept_bins
    whole = whole and not found.is_complex() and found.dtype != torch.bool
    if whole and found.is_floating_point():
        # A state dict that was cast as a whole: half precision rounds from 2048 on.
        whole = bool((found == found.round()).all())
    if not whole or not ratio or layer.attentions % ratio:
        raise CheckpointError(
            f"{layer.name}.indices, {buffer.dtype} {tuple(buffer.shape)}, are no frequency "
            "indices. Expected whole numbers of shape (param_ratio, 2, kernel_num, bins per group) "
            "for this layer; remove them from the file to have the order detected in its weights."
        )
    size = (layer.rows, layer.columns)
    groups = layer.attentions // ratio
    cut = layer.kept_bins < layer.bins
    share = (layer.kept_bins + 0.5) / layer.bins if cut else 1.0
    read = _checked(layer.name, found.long(), size, groups, ratio, share)

    def is_in(order: NamedOrder) -> bool:
        named = frequency_indices(*size, groups, ratio=ratio, reduction=share, order=order)
        if cut:  # bins are stored in this order, so each counts
            return torch.equal(named, read)
        return torch.equal(group_map(named, *size), group_map(read, *size))

    return read, [order for order in CANDIDATES if is_in(order)]


def _checked(
    name: str, indices: Tensor, size: tuple[int, int], groups: int, ratio: int, reduction: float
) -> Tensor:
    try:
        return frequency_indices(*size, groups, ratio=ratio, reduction=reduction, order=indices)
    except UnsupportedLayerError as error:
        raise CheckpointError(
            f"{name}.indices in the file: {str(error).replace('frequency_order', 'They')} Remove "
            "them from the file to have the order detected in its weights."
        ) from None


# The order that a network is built with


@dataclass(frozen=True)
class ChosenOrder:
    """The order a network is built with.

    Attributes:
        used: that of the layers whose indices the file does not save.
        evidence: that of the weights, None if it was not needed.
        saved: the order of the other layers.
    """

    used: FrequencyOrder
    evidence: WeightEvidence | None = None
    saved: SavedOrder | None = None

    @property
    def name(self) -> str:
        """``torch``, ``stable``, ``saved`` or, for indices, ``given``."""
        if self.saved is not None:
            return self.saved.name or "saved"
        return self.used if isinstance(self.used, str) else "given"

    @property
    def assumed(self) -> bool:
        """Whether there is no evidence for it."""
        return self.saved is None and self.evidence is not None and self.evidence.order is None

    def noted(self, inference: Inference[ConfigT]) -> Inference[ConfigT]:
        """``inference`` with a note if the order is not the published one."""
        found = self.evidence
        notes = [] if self.saved is None else [f"{self.saved.reason} They are used."]
        expected = "torch" if self.saved is None else self.name
        if found is not None and (found.none_of_them or found.order not in (None, expected)):
            notes.append(found.reason)
        return inference.model_copy(update={"notes": (*inference.notes, *notes)})

    def apply(self, network: nn.Module) -> None:
        """Give a network that was built in the order ``used`` the saved indices."""
        layers = dynamic_layers(network)
        for name, indices in (self.saved.indices if self.saved else {}).items():
            if name in layers:
                own = layers[name]
                size, reduction = (own.rows, own.columns), own.param_reduction
                own.indices = _checked(
                    name, indices, size, own.kernel_num, own.param_ratio, reduction
                )


def choose_order(state: Shapes, wanted: FrequencyOrder | Literal["auto"]) -> ChosenOrder:
    """The order to build a checkpoint's network with.

    Args:
        state: its tensors.
        wanted: an order, or ``"auto"`` for the indices in the file, else for the order detected in
            the weights, else ``"torch"``.

    Raises:
        CheckpointError: the file's indices cannot be read, or ``wanted`` contradicts them.
    """
    saved = saved_order(state)
    if isinstance(wanted, str) and wanted == "auto":
        evidence = order_of_weights(state)
        name = saved.name if saved is not None else None
        return ChosenOrder(name or evidence.order or "torch", evidence, saved)
    if saved is not None and saved.name != wanted:
        raise CheckpointError(
            f"frequency_order is {wanted!r}, but the file saves another. {saved.reason} The "
            "file decides: leave frequency_order out."
            if isinstance(wanted, str)
            else "frequency_order gives indices, and the file has its own. "
            f"{saved.reason} Leave frequency_order out."
        )
    return ChosenOrder(wanted, saved=saved)


# The order that weights show


class _Pairs(NamedTuple):
    """Mirror pairs of layers under one candidate: how far apart, and whether in two groups."""

    distance: NDArray[np.float64]
    split: NDArray[np.bool_]


def order_of_weights(state: Shapes) -> WeightEvidence:
    """Detect the frequency order by which mirror bins of the spectra have parted."""
    dynamic = [layer for layer in conv_layers(state) if layer.dynamic]
    stored = [layer for layer in dynamic if layer.convert_param]
    if not stored:
        what = "they store kernels, not spectra" if dynamic else "there is no FDConv layer"
        return WeightEvidence(order=None, reason=f"The weights do not show the order: {what}.")
    found = {
        name: _Pairs(*map(np.concatenate, zip(*_pairs(state, stored, name), strict=True)))
        for name in CANDIDATES
    }
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
        parted_in_one_group=impossible,
        mirrored_in_two_groups=missing,
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


def _pairs(state: Shapes, layers: Sequence[Layer], order: NamedOrder) -> Iterator[_Pairs]:
    """Of each plane: relative distances of mirror pairs, and whether they are in two groups."""
    for layer in layers:
        stored = state[f"{layer.name}.dft_weight"]
        rows, columns, kept = layer.rows, layer.columns, layer.kept_bins
        half = columns // 2 + 1
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
        if stored.ndim == 3:  # a cut spectrum is stored by rank, a whole one by place
            bins, mirrors = rank[bins], rank[mirrors]
        planes = stored.detach().double().reshape(ratio, -1, 2).contiguous()
        for plane in torch.view_as_complex(planes):
            one, other = plane[bins], plane[mirrors].conj()
            sizes = (one.abs() + other.abs()) / 2
            # A bin that happens to be tiny is measured by what is usual.
            usual = float(plane.abs().median())
            distance = (one - other).abs() / sizes.clamp_min(0.1 * usual + 1e-30)
            # A pair that is not stored says nothing: it counts as mirrored and in one group.
            yield _Pairs(torch.where(both, distance, 0.0).numpy(), split)
