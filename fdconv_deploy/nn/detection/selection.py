"""The best of many scores, equal ones in the order they come."""

from __future__ import annotations

from torch import Tensor, nn

# The score of what is not to be chosen. Scores proper are probabilities.
EXCLUDED = -1.0


class BestScores(nn.Module):
    """``(B, N)`` float32 -> the ``count`` highest, descending, and where they were.

    Of equal scores the one with the lower index comes first, as ONNX's TopK has it;
    ``torch.topk`` leaves that open.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(B, K)`` float32 and indices ``(B, K)`` int64, K = min(count, N)."""
        values, indices = scores.sort(dim=1, descending=True, stable=True)
        return values[:, : self.count], indices[:, : self.count]


def rows(values: Tensor, indices: Tensor) -> Tensor:
    """``values`` ``(B, N, C)`` at ``indices`` ``(B, K)`` int64: ``(B, K, C)``."""
    return values.gather(1, indices[..., None].expand(-1, -1, values.shape[-1]))
