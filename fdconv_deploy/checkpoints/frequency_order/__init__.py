"""Which frequency order a checkpoint was trained with: as saved in it, or by evidence.

The order decides which spectrum bins share a kernel attention (docs/frequency-order.md). Few files
save it; for others it is detected in the weights (:mod:`.from_weights`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fdconv_deploy.checkpoints.evidence import ConfigT, Inference
from fdconv_deploy.checkpoints.frequency_order.from_weights import (
    CANDIDATES,
    NamedOrder,
    WeightEvidence,
    order_of_weights,
)
from fdconv_deploy.checkpoints.infer_layers import Layer, Shapes, conv_layers
from fdconv_deploy.errors import CheckpointError, UnsupportedLayerError
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.nn.spectrum import FrequencyOrder, frequency_indices, group_map

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


def saved_order(state: Mapping[str, Tensor]) -> SavedOrder | None:
    """The ``indices`` that a file saves, checked; None if it saves none.

    Raises:
        CheckpointError: they do not name each frequency bin of their layer once.
    """
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
    size = (layer.out_channels * layer.kernel[0], layer.columns)
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
        notes: list[str] = []
        if self.saved is not None:
            notes.append(f"{self.saved.reason} They are used.")
        expected = "torch" if self.saved is None else self.name
        if found is not None and (found.none_of_them or found.order not in (None, expected)):
            notes.append(found.reason)
        return inference.model_copy(update={"notes": (*inference.notes, *notes)})

    def apply(self, network: nn.Module) -> None:
        """Give a network that was built in the order ``used`` the saved indices.

        Raises:
            CheckpointError: a layer's saved indices are not those of such a layer.
        """
        layers = dynamic_layers(network)
        for name, indices in (self.saved.indices if self.saved else {}).items():
            if name in layers:
                own = layers[name]
                size, reduction = (own.rows, own.columns), own.param_reduction
                own.indices = _checked(
                    name, indices, size, own.kernel_num, own.param_ratio, reduction
                )


def choose_order(
    state: Mapping[str, Tensor], wanted: FrequencyOrder | Literal["auto"]
) -> ChosenOrder:
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


# The evidence for an order


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
    """The order that a checkpoint's tensors save, or that training left in its weights.

    Raises:
        CheckpointError: the file saves indices that are none.
    """
    weights, saved = order_of_weights(state), saved_order(state)
    if saved is not None:
        return OrderReport(order=saved.name, weights=weights, saved=saved.reason)
    return OrderReport(order=weights.order, weights=weights)
