"""The second stage: regions to boxes, classes and masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import DetectorConfig
from fdconv_deploy.nn.detection.bbox_head import BoxHead
from fdconv_deploy.nn.detection.boxes import clip, decode
from fdconv_deploy.nn.detection.mask_head import MaskHead
from fdconv_deploy.nn.detection.roi_extractor import RoIExtractor
from fdconv_deploy.nn.detection.selection import EXCLUDED, BestScores, rows
from fdconv_deploy.nn.detection.suppression import NonMaxSuppression, set_apart


class RoIHead(nn.Module):
    """mmdetection's StandardRoIHead as it is tested.

    mmdetection 2.28 suppresses boxes after dividing them by the image's scale, 3.x before:
    an IoU is the same either way, but for rounding. Here it is before.
    """

    def __init__(self, architecture: DetectorConfig) -> None:
        super().__init__()
        channels = architecture.neck.out_channels
        self.test = architecture.test.rcnn
        self.bbox_roi_extractor = RoIExtractor(architecture.bbox_head.roi)
        self.bbox_head = BoxHead(channels, architecture.bbox_head)
        self.mask_roi_extractor: RoIExtractor | None = None
        self.mask_head: MaskHead | None = None
        if architecture.mask_head is not None:
            self.mask_roi_extractor = RoIExtractor(architecture.mask_head.roi)
            self.mask_head = MaskHead(channels, architecture.mask_head)
        self.suppression = NonMaxSuppression(self.test.nms_iou_threshold, self.test.max_per_img)
        self.best = BestScores(self.test.max_per_img)

    def detect(
        self, features: Sequence[Tensor], proposals: Tensor, valid: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Classified boxes, as `Detector.forward` gives them: boxes, scores, labels, count.

        Args:
            features: pyramid levels, each ``(B, C, h, w)`` float32.
            proposals: ``(B, P, 4)`` float32.
            valid: ``(B, P)`` bool, which of them there are.
            sizes: ``(B, 2)`` float32, height and width of each image.
        """
        batch, count = valid.shape
        classes = self.bbox_head.config.num_classes
        logits, deltas = self.bbox_head(self.bbox_roi_extractor(features, proposals))
        probabilities = logits.softmax(-1)[:, :-1].reshape(batch, count, classes)
        deltas = deltas.reshape(batch, count, -1, 4)
        boxes = decode(proposals[:, :, None], deltas, self.bbox_head.config.bbox_coder)
        boxes = clip(boxes.expand(-1, -1, classes, -1).reshape(batch, -1, 4), sizes)
        counts = (probabilities > self.test.score_thr) & valid[..., None]
        scores = torch.where(counts, probabilities, EXCLUDED).reshape(batch, -1)
        label = torch.arange(classes, device=scores.device).repeat(count)
        keep = self.suppression(set_apart(boxes, label, scores), scores)
        best, indices = self.best(torch.where(keep, scores, EXCLUDED))
        there = best > EXCLUDED
        # Fewer candidates than places, in a small image: the rest stays empty.
        missing = self.test.max_per_img - best.shape[1]
        return (
            F.pad(torch.where(there[..., None], rows(boxes, indices), 0), (0, 0, 0, missing)),
            F.pad(torch.where(there, best, 0), (0, missing)),
            F.pad(torch.where(there, indices % classes, 0), (0, missing)),
            there.sum(1),
        )

    def masks(
        self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor, count: Tensor
    ) -> Tensor:
        """The probability of each pixel of each box: ``(B, D, 2s, 2s)`` float32.

        Args:
            features: pyramid levels, each ``(B, C, h, w)`` float32.
            boxes: ``(B, D, 4)`` float32.
            labels: ``(B, D)`` int64.
            count: ``(B,)`` int64; masks at and after it are 0.
        """
        assert self.mask_head is not None
        assert self.mask_roi_extractor is not None
        logits = self.mask_head(self.mask_roi_extractor(features, boxes))
        places = boxes.shape[1]
        if logits.shape[1] > 1:
            index = labels.reshape(-1, 1, 1, 1).expand(-1, 1, *logits.shape[-2:])
            logits = logits.gather(1, index)
        masks = logits.sigmoid().reshape(len(boxes), places, *logits.shape[-2:])
        there = torch.arange(places, device=count.device) < count[:, None]
        return torch.where(there[..., None, None], masks, 0)
