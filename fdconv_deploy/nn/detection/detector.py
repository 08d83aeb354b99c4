"""A two-stage detector, the network that is exported: backbone, neck, proposals, boxes, masks.

``features`` are pyramid levels, each ``(B, C, h, w)`` float32; ``sizes`` ``(B, 2)`` float32 the
height and width of each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import (
    BoxHeadConfig,
    DetectorConfig,
    FPNConfig,
    MaskHeadConfig,
    RPNHeadConfig,
    RPNTestConfig,
)
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.backbones import build_backbone
from fdconv_deploy.nn.detection.box_ops import (
    EXCLUDED,
    BestScores,
    NonMaxSuppression,
    RoIExtractor,
    anchors_at,
    clip,
    decode,
    rows,
    set_apart,
)
from fdconv_deploy.nn.heads.decode_heads import ConvModule
from fdconv_deploy.nn.spectrum import FrequencyOrder


class FPN(nn.Module):
    """mmdetection's feature pyramid: maps -> ``num_outs`` maps of ``out_channels``, finest first.

    Levels past the backbone's take every other pixel of the one before, as
    ``add_extra_convs=False`` does.
    """

    def __init__(self, config: FPNConfig) -> None:
        super().__init__()
        if config.num_outs < len(config.in_channels):
            raise UnsupportedLayerError(
                f"the pyramid's num_outs ({config.num_outs}) is below the {len(config.in_channels)}"
                " maps it takes. Expected a level for each map, or more."
            )
        self.config = config
        channels = config.out_channels
        conv = partial(ConvModule, norm=False, relu=False)
        self.lateral_convs = nn.ModuleList(conv(width, channels, 1) for width in config.in_channels)
        self.fpn_convs = nn.ModuleList(conv(channels, channels, 3) for _ in config.in_channels)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``features``: the backbone's outputs, each ``(B, C, h, w)`` float32, finest first."""
        maps = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            finer = maps[i - 1]
            maps[i - 1] = finer + F.interpolate(maps[i], size=finer.shape[-2:], mode="nearest")
        levels = [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=True)]
        while len(levels) < self.config.num_outs:
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return tuple(levels)


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
        """Level by level, scores before the sigmoid ``(B, h·w·A)`` and deltas ``(B, h·w·A, 4)``.

        float32, in the order of `anchors_at`.
        """
        scores, deltas = [], []
        for x in features:
            hidden = F.relu(self.rpn_conv(x))
            batch = x.shape[0]
            scores.append(self.rpn_cls(hidden).permute(0, 2, 3, 1).reshape(batch, -1))
            deltas.append(self.rpn_reg(hidden).permute(0, 2, 3, 1).reshape(batch, -1, 4))
        return scores, deltas

    def propose(self, features: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The regions to look at closer.

        Returns:
            Boxes ``(B, P, 4)`` float32, best first, and which of them there are, ``(B, P)``
            bool; the others are zeros. P is ``max_per_img``, or all candidates if fewer.
        """
        scores, boxes, groups = [], [], []
        for level, (logits, deltas) in enumerate(zip(*self(features), strict=True)):
            # A sigmoid, written out: near 1 ONNX Runtime's own operator is not monotone, and
            # the order of the likeliest anchors would be another.
            probabilities = 1 / (1 + (-logits).exp())
            best, indices = self.best_of_level(probabilities)
            own = anchors_at(indices, self.config, level, features[level].shape[-1])
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


class BoxHead(nn.Module):
    """mmdetection's Shared2FCBBoxHead."""

    def __init__(self, in_channels: int, config: BoxHeadConfig) -> None:
        super().__init__()
        self.config = config
        width = in_channels * config.roi.output_size**2
        self.shared_fcs = nn.ModuleList()
        for _ in range(config.num_shared_fcs):
            self.shared_fcs.append(nn.Linear(width, config.fc_out_channels))
            width = config.fc_out_channels
        boxes = 1 if config.reg_class_agnostic else config.num_classes
        self.fc_cls = nn.Linear(width, config.num_classes + 1)
        self.fc_reg = nn.Linear(width, 4 * boxes)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and deltas of regions ``(R, C, s, s)`` float32.

        Returns:
            Scores before the softmax, ``(R, classes + 1)``, background last; deltas
            ``(R, classes, 4)``, or ``(R, 1, 4)`` if they are the same for all classes.
        """
        x = regions.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x), self.fc_reg(x).unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """mmdetection's FCNMaskHead with its deconvolution."""

    def __init__(self, in_channels: int, config: MaskHeadConfig) -> None:
        super().__init__()
        self.config = config
        channels, width = config.conv_out_channels, in_channels
        self.convs = nn.Sequential()
        for _ in range(config.num_convs):
            self.convs.append(ConvModule(width, channels, config.conv_kernel_size, norm=False))
            width = channels
        self.upsample = nn.ConvTranspose2d(width, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(
            channels, 1 if config.class_agnostic else config.num_classes, 1
        )

    def forward(self, regions: Tensor) -> Tensor:
        """``(R, C, s, s)`` float32 -> logits ``(R, classes or 1, 2s, 2s)``."""
        return self.conv_logits(F.relu(self.upsample(self.convs(regions))))


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

        ``proposals`` ``(B, P, 4)`` float32; ``valid`` ``(B, P)`` bool, which of them there are.
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
        label = torch.arange(classes, device=scores.device)
        keep = self.suppression(set_apart(boxes, label, scores), scores)
        best, indices = self.best(torch.where(keep, scores, EXCLUDED))
        there = best > EXCLUDED
        # Fewer candidates than places, in a small image: the rest stays empty.
        missing = self.test.max_per_img - best.shape[1]
        return (
            _filled(torch.where(there[..., None], rows(boxes, indices), 0), missing),
            _filled(torch.where(there, best, 0), missing),
            _filled(torch.where(there, indices % classes, 0), missing),
            there.sum(1),
        )

    def masks(
        self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor, count: Tensor
    ) -> Tensor:
        """The probability of each pixel of each box: ``(B, D, 2s, 2s)`` float32.

        ``boxes`` ``(B, D, 4)`` float32; ``labels`` ``(B, D)`` int64; ``count`` ``(B,)`` int64:
        masks at and after it are 0.
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


def _filled(found: Tensor, missing: int) -> Tensor:
    """``(B, D, …)`` with so many zeros behind its D, by Concat: CUDA has no Pad of int64."""
    if missing == 0:
        return found
    return torch.cat([found, found.new_zeros(len(found), missing, *found.shape[2:])], dim=1)


class Detector(nn.Module):
    """mmdetection's FasterRCNN or MaskRCNN, for inference.

    Images come padded at the right and at the bottom to one size; a box is cut at its
    image's own border. All outputs have static shapes, D = ``test.rcnn.max_per_img``.
    """

    def __init__(
        self, architecture: DetectorConfig, frequency_order: FrequencyOrder = "torch"
    ) -> None:
        super().__init__()
        _check(architecture)
        self.architecture = architecture
        self.backbone = build_backbone(architecture.backbone, frequency_order)
        self.neck = FPN(architecture.neck)
        channels = architecture.neck.out_channels
        self.rpn_head = RPNHead(channels, architecture.rpn_head, architecture.test.rpn)
        self.roi_head = RoIHead(architecture)

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """The pyramid's levels, each ``(B, C, h, w)``, of ``images`` ``(B, 3, H, W)`` float32."""
        return self.neck(self.backbone(images))

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Find objects.

        Args:
            images: ``(B, 3, H, W)`` float32, normalised, zero past each image's own size.
            sizes: ``(B, 2)`` float32, height and width of each image, mmdetection's
                ``img_shape``.

        Returns:
            ``boxes`` ``(B, D, 4)`` float32, x1 y1 x2 y2 in pixels of the network's input, best
            score first; ``scores`` ``(B, D)`` float32; ``labels`` ``(B, D)`` int64, from 0;
            ``count`` ``(B,)`` int64: rows at and after it are 0; and of Mask R-CNN ``masks``
            ``(B, D, 28, 28)`` float32, probabilities for the box's own class.
        """
        features = self.features(images)
        proposals, valid = self.rpn_head.propose(features, sizes)
        boxes, scores, labels, count = self.roi_head.detect(features, proposals, valid, sizes)
        if self.roi_head.mask_head is None:
            return boxes, scores, labels, count
        masks = self.roi_head.masks(features, boxes, labels, count)
        return boxes, scores, labels, count, masks

    @property
    def output_names(self) -> list[str]:
        """What `forward` gives, by name."""
        names = ["boxes", "scores", "labels", "count"]
        return names if self.roi_head.mask_head is None else [*names, "masks"]


def _check(architecture: DetectorConfig) -> None:
    levels, strides = architecture.neck.num_outs, architecture.rpn_head.strides
    if levels != len(strides):
        raise UnsupportedLayerError(
            f"the feature pyramid has {levels} levels (neck.num_outs) and the anchors "
            f"{len(strides)} strides (rpn_head.strides). Expected as many of the one as of the "
            "other."
        )
    heads = [architecture.bbox_head] + ([architecture.mask_head] if architecture.mask_head else [])
    for head in heads:
        if len(head.roi.featmap_strides) > levels:
            raise UnsupportedLayerError(
                f"regions are cut out of {len(head.roi.featmap_strides)} levels "
                f"(roi.featmap_strides) and the feature pyramid has {levels}."
            )
        if head.num_classes != architecture.bbox_head.num_classes:
            raise UnsupportedLayerError(
                f"the box head has {architecture.bbox_head.num_classes} classes and the mask head "
                f"{head.num_classes}. Expected the same."
            )
