"""The frequency order a network is built with, and who told it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fdconv_deploy.checkpoints.evidence import ConfigT, Inference
from fdconv_deploy.checkpoints.frequency_order.from_weights import (
    CANDIDATES,
    NamedOrder,
    WeightEvidence,
    order_of_weights,
)
from fdconv_deploy.checkpoints.infer_layers import Layer, conv_layers
from fdconv_deploy.errors import CheckpointError, UnsupportedLayerError
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.nn.spectrum import FrequencyOrder, frequency_indices, group_map


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


@dataclass(frozen=True)
class ChosenOrder:
    """The order a network is built with.

    ``used``: of the layers whose indices the file does not save; ``saved``: of the others.
    ``evidence``: what its weights say, None if not asked.
    """

    used: FrequencyOrder
    evidence: WeightEvidence | None = None
    saved: SavedOrder | None = field(default=None)

    @property
    def name(self) -> str:
        """``torch``, ``stable``, ``saved`` or, for indices, ``given``."""
        if self.saved is not None:
            return self.saved.name or "saved"
        return self.used if isinstance(self.used, str) else "given"

    @property
    def assumed(self) -> bool:
        """Whether nobody told it."""
        return self.saved is None and self.evidence is not None and self.evidence.order is None

    def noted(self, inference: Inference[ConfigT]) -> Inference[ConfigT]:
        """What was told of a network, and a note if its order is not the published one."""
        found = self.evidence
        notes: list[str] = []
        if self.saved is not None:
            notes.append(f"{self.saved.reason} They are used.")
        told = self.name if self.saved is not None else "torch"
        if found is not None and (found.none_of_them or found.order not in (None, told)):
            notes.append(found.reason)
        return inference.model_copy(update={"notes": (*inference.notes, *notes)})

    def apply(self, network: nn.Module) -> None:
        """Give a network that was built in the order ``used`` the saved indices.

        Raises:
            CheckpointError: a layer's saved indices are not those of such a layer.
        """
        if self.saved is None:
            return
        layers = dynamic_layers(network)
        for name, indices in self.saved.indices.items():
            if name in layers:
                layer = layers[name]
                layer.indices = _checked(
                    name,
                    indices,
                    (layer.rows, layer.columns),
                    layer.kernel_num,
                    layer.param_ratio,
                    layer.param_reduction,
                )


def choose_order(
    state: Mapping[str, Tensor], wanted: FrequencyOrder | Literal["auto"]
) -> ChosenOrder:
    """The order to build a checkpoint's network with.

    Args:
        state: its tensors.
        wanted: an order, or ``"auto"`` for the indices in the file, else for what the weights
            tell, ``"torch"`` if they do not.

    Raises:
        CheckpointError: the file's indices cannot be read, or ``wanted`` contradicts them.
    """
    saved = saved_order(state)
    if not isinstance(wanted, str) or wanted != "auto":
        if saved is not None and saved.name != wanted:
            raise CheckpointError(
                f"frequency_order is {wanted!r}, but the file says otherwise. {saved.reason} The "
                "file decides: leave frequency_order out."
                if isinstance(wanted, str)
                else "frequency_order gives indices, and the file has its own. "
                f"{saved.reason} Leave frequency_order out."
            )
        return ChosenOrder(wanted, saved=saved)
    evidence = order_of_weights(state)
    told = saved.name if saved is not None else None
    return ChosenOrder(told or evidence.order or "torch", evidence, saved)


def saved_order(state: Mapping[str, Tensor]) -> SavedOrder | None:
    """The ``indices`` that a file saves, checked; None if it saves none.

    Raises:
        CheckpointError: they do not name each frequency bin of their layer once.
    """
    layers = [layer for layer in conv_layers(state) if layer.indices is not None]
    if not layers:
        return None
    indices, named = {}, list(CANDIDATES)
    for layer in layers:
        assert layer.indices is not None
        indices[layer.name] = read = _read(layer, layer.indices)
        named = [order for order in named if _same(layer, read, order)]
    return SavedOrder(indices, named[0] if named else None)


def _read(layer: Layer, buffer: Tensor) -> Tensor:
    """Indices of any number type, as int64, if they can be the layer's."""
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
            "for this layer; remove them from the file to have the order told by its weights."
        )
    rows = layer.out_channels * layer.kernel[0]
    share = 1.0 if layer.kept_bins == layer.bins else (layer.kept_bins + 0.5) / layer.bins
    groups = layer.attentions // ratio
    return _checked(layer.name, found.long(), (rows, layer.columns), groups, ratio, share)


def _checked(
    name: str, indices: Tensor, size: tuple[int, int], groups: int, ratio: int, reduction: float
) -> Tensor:
    try:
        return frequency_indices(*size, groups, ratio=ratio, reduction=reduction, order=indices)
    except UnsupportedLayerError as error:
        raise CheckpointError(
            f"{name}.indices in the file: {str(error).replace('frequency_order', 'They')} Remove "
            "them from the file to have the order told by its weights."
        ) from None


def _same(layer: Layer, indices: Tensor, order: NamedOrder) -> bool:
    """Whether they are this order's: group by group, or bin by bin where bins are stored so."""
    rows = layer.out_channels * layer.kernel[0]
    ratio, _, groups, _ = indices.shape
    cut = layer.kept_bins < layer.bins
    share = (layer.kept_bins + 0.5) / layer.bins if cut else 1.0
    named = frequency_indices(
        rows, layer.columns, groups, ratio=ratio, reduction=share, order=order
    )
    if cut:
        return torch.equal(named, indices)
    return torch.equal(
        group_map(named, rows, layer.columns), group_map(indices, rows, layer.columns)
    )
