"""A backbone and its heads: the network that is exported."""

from __future__ import annotations

from torch import Tensor, nn

from fdconv_deploy.config import SegmentorConfig
from fdconv_deploy.nn.backbones import build_backbone
from fdconv_deploy.nn.heads import QueryHead, build_head
from fdconv_deploy.nn.heads.maskdino_head import MaskDINOHead
from fdconv_deploy.nn.spectrum import FrequencyOrder


class Segmentor(nn.Module):
    """mmsegmentation's EncoderDecoder, for inference.

    ``forward``: normalised ``(B, C, H, W)`` float32 -> logits ``(B, classes, h, w)`` at the
    head's own size, or ``(B, 1, h, w)`` of a head with one output; of a head with queries, scores
    at the input's size.
    """

    def __init__(
        self, architecture: SegmentorConfig, frequency_order: FrequencyOrder = "torch"
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.backbone = build_backbone(architecture.backbone, frequency_order)
        self.decode_head = build_head(architecture.decode_head, frequency_order)
        self.auxiliary_head = None
        if architecture.auxiliary_head is not None:
            self.auxiliary_head = build_head(architecture.auxiliary_head)

    @property
    def output_names(self) -> list[str]:
        """What `forward` gives, by name."""
        rule = self.architecture.panoptic
        if rule is None:
            return ["logits"]
        boxes = rule.instance_on and isinstance(self.decode_head, MaskDINOHead)
        return ["classes", "masks", *(["boxes"] if boxes else [])]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """``x``: ``(B, C, H, W)`` float32, normalised, C bands.

        Returns:
            Logits; of a panoptic network class logits ``(B, Q, class_outputs)`` and mask logits
            ``(B, Q, h, w)`` of its queries, and where it gives instances and MaskDINO has boxes,
            these, see `MaskDINOHead.forward`.
        """
        features = self.backbone(x)
        if isinstance(self.decode_head, QueryHead):
            answer = self.decode_head(features)
            if self.architecture.panoptic is not None:
                return answer[: len(self.output_names)]
            classes, masks = answer[:2]
            return self.decode_head.semantic_scores(classes, masks, x.shape[-2:])
        return self.decode_head(features)
