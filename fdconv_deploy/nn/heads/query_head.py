"""What Mask2Former and MaskDINO have in common: from queries' classes and masks to scores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fdconv_deploy.config import QueryHeadConfig
from fdconv_deploy.nn.heads.decode_heads import resize


class QueryHead(nn.Module):
    """The backbone's outputs -> class logits ``(B, Q, classes)``, mask logits ``(B, Q, h, w)``.

    MaskDINO's gives boxes as well.
    """

    def __init__(self, config: QueryHeadConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``outputs``: the backbone's, each ``(B, C, h, w)``, finest first."""
        raise NotImplementedError

    def class_scores(self, classes: Tensor) -> Tensor:
        """Scores ``(B, Q, num_classes)`` of class logits ``(B, Q, class_outputs)``."""
        return classes.softmax(-1)[..., :-1]

    def semantic_scores(self, classes: Tensor, masks: Tensor, size: Sequence[int]) -> Tensor:
        """Scores ``(B, num_classes, H, W)``: sums over queries, so they may exceed 1.

        Args:
            size: (H, W) of the network's input. Masks are resized before they become
                probabilities.
        """
        probabilities = resize(masks, size, False).sigmoid()
        scores = self.class_scores(classes).transpose(1, 2) @ probabilities.flatten(2)
        return scores.unflatten(2, tuple(size))
