"""The region proposal head: where objects may be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import RPNHeadConfig, RPNTestConfig
from fdconv_deploy.nn.detection.anchors import grid_anchors
from fdconv_deploy.nn.detection.boxes import clip, decode
from fdconv_deploy.nn.detection.selection import EXCLUDED, BestScores, rows
from fdconv_deploy.nn.detection.suppression import NonMaxSuppression, set_apart


class RPNHead(nn.Module):
    """mmdetection's RPNHead with sigmoid scores.

    ``forward`` gives raw scores and deltas of all anchors, `propose` the chosen boxes.
    """

    def __init__(self, in_channels: int, config: RPNHeadConfig, test: RPNTestConfig) -> None:
        super().__init__()
        self.config, self.test = config, test
        self.rpn_conv = nn.Conv2d(in_channels, config.feat_channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(config.feat_channels, config.num_anchors, 1)
        self.rpn_reg = nn.Conv2d(config.feat_channels, config.num_anchors * 4, 1)
        self.best_of_level = BestScores(test.nms_pre)
        self.suppression = NonMaxSuppression(test.nms_iou_threshold, test.max_per_img)
        self.best = BestScores(test.max_per_img)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores and deltas, level by level.

        Args:
            features: pyramid levels, each ``(B, C, h, w)`` float32.

        Returns:
            Scores before the sigmoid, each ``(B, h·w·A)``, and deltas, each ``(B, h·w·A, 4)``,
            float32, in the order of `grid_anchors`.
        """
        scores, deltas = [], []
        for x in features:
            hidden = F.relu(self.rpn_conv(x))
            batch = x.shape[0]
            scores.append(self.rpn_cls(hidden).permute(0, 2, 3, 1).reshape(batch, -1))
            deltas.append(self.rpn_reg(hidden).permute(0, 2, 3, 1).reshape(batch, -1, 4))
        return scores, deltas

    def anchors(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The anchors of each level, ``(h·w·A, 4)`` float32."""
        return [
            torch.from_numpy(grid_anchors(self.config, level, *x.shape[-2:])).to(x.device)
            for level, x in enumerate(features)
        ]

    def propose(self, features: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The regions to look at closer.

        Args:
            features: pyramid levels, each ``(B, C, h, w)`` float32.
            sizes: ``(B, 2)`` float32, height and width of each image.

        Returns:
            Boxes ``(B, P, 4)`` float32, best first, and which of them there are, ``(B, P)``
            bool; the others are zeros. P is ``max_per_img``, or all candidates if fewer.
        """
        scores, boxes, groups = [], [], []
        anchors = self.anchors(features)
        for level, (logits, deltas) in enumerate(zip(*self(features), strict=True)):
            # A sigmoid, written out: near 1 ONNX Runtime's own operator is not monotone, and
            # the order of the likeliest anchors would be another.
            probabilities = 1 / (1 + (-logits).exp())
            best, indices = self.best_of_level(probabilities)
            own = anchors[level][indices]
            boxes.append(decode(own, rows(deltas, indices), self.config.bbox_coder))
            scores.append(best)
            groups += [level] * best.shape[1]
        every = clip(torch.cat(boxes, dim=1), sizes)
        score = torch.cat(scores, dim=1)
        if self.test.min_bbox_size >= 0:
            extent = every[..., 2:] - every[..., :2]
            score = torch.where((extent > self.test.min_bbox_size).all(-1), score, EXCLUDED)
        group = torch.tensor(groups, device=score.device)
        keep = self.suppression(set_apart(every, group, score), score)
        chosen, indices = self.best(torch.where(keep, score, EXCLUDED))
        valid = chosen > EXCLUDED
        return torch.where(valid[..., None], rows(every, indices), 0), valid
