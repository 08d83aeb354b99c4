"""The frequency order a network is built with, and who told it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fdconv_deploy.checkpoints.facts import Inference, Told
from fdconv_deploy.checkpoints.order_weights import WeightEvidence, order_of_weights
from fdconv_deploy.nn.spectrum import FrequencyOrder


@dataclass(frozen=True)
class ChosenOrder:
    """``used`` it is built with; ``evidence``: what its weights say, None if not asked."""

    used: FrequencyOrder
    evidence: WeightEvidence | None = None

    @property
    def name(self) -> str:
        """``torch``, ``stable`` or, for indices, ``given``."""
        return self.used if isinstance(self.used, str) else "given"

    @property
    def assumed(self) -> bool:
        """Whether nobody told it."""
        return self.evidence is not None and self.evidence.order is None

    def noted(self, inference: Inference[Told]) -> Inference[Told]:
        """What was told of a network, and a note if its order is not the published one."""
        found = self.evidence
        if found is None or not (found.none_of_them or found.order not in (None, "torch")):
            return inference
        return inference.model_copy(update={"notes": (*inference.notes, found.reason)})


def choose_order(
    state: Mapping[str, Tensor], wanted: FrequencyOrder | Literal["auto"]
) -> ChosenOrder:
    """The order to build a checkpoint's network with.

    Args:
        state: its tensors.
        wanted: an order, or ``"auto"`` for what the weights tell, ``"torch"`` if they do not.
    """
    if not isinstance(wanted, str) or wanted != "auto":
        return ChosenOrder(wanted)
    evidence = order_of_weights(state)
    return ChosenOrder(evidence.order or "torch", evidence)
