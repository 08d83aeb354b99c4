"""Where a network decides: modules whose answer is a step, so that rounding can change it.

What comes behind such a step may be far off though nothing is wrong. An export is therefore judged
between them, on the network's own decisions.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn


class Decision(nn.Module):
    """A step function of one tensor, which one node of a graph computes.

    Attributes:
        operator: ONNX's name of that node, whose first input is the tensor.
    """

    operator: ClassVar[str]

    def constant(self) -> np.float32 | None:
        """The node's second input, by which it is known; None where the operator tells enough."""
        return None


class Below(Decision):
    """Whether values are below a threshold: 1 where they are, else 0, of the input's type."""

    operator = "Less"

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def constant(self) -> np.float32:
        """The threshold."""
        return np.float32(self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return (x < self.threshold).to(x.dtype)


class Best(Decision):
    """The places of the ``count`` highest of axis 1, the highest first."""

    operator = "TopK"

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N)`` -> ``(B, count)`` int64."""
        return torch.topk(x, self.count, dim=1).indices


def decisions(network: nn.Module) -> dict[str, Decision]:
    """A network's decisions by name."""
    return {n: module for n, module in network.named_modules() if isinstance(module, Decision)}
