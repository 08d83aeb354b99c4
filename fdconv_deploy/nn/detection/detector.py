"""A two-stage detector: the network that is exported."""

from __future__ import annotations

from torch import Tensor, nn

from fdconv_deploy.config import DetectorConfig
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.backbones import build_backbone
from fdconv_deploy.nn.detection.fpn import FPN
from fdconv_deploy.nn.detection.heads import RoIHead, RPNHead
from fdconv_deploy.nn.spectrum import FrequencyOrder


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
