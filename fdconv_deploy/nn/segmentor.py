"""A backbone and its heads: the network that is exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdconv_deploy.config import SegmentorConfig, TestMode
from fdconv_deploy.nn.backbones import build_backbone
from fdconv_deploy.nn.heads import QueryHead, build_head, resize
from fdconv_deploy.nn.heads.maskdino_head import MaskDINOHead
from fdconv_deploy.nn.spectrum import FrequencyOrder


class Segmentor(nn.Module):
    """mmsegmentation's EncoderDecoder, for inference.

    ``forward``: normalised ``(B, C, H, W)`` float32 -> logits ``(B, classes, h, w)`` at the
    head's own size, or ``(B, 1, h, w)`` of a head with one output; of a head with queries, scores
    at the input's size. `predict` adds the published test modes.
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

    @torch.no_grad()
    def predict(self, x: Tensor, mode: TestMode | None = None) -> Tensor:
        """Logits at the input's size, ``(B, classes, H, W)``, by ``whole`` or ``slide``.

        Args:
            x: ``(B, C, H, W)`` float32, normalised.
            mode: the network's own test mode if not given.
        """
        mode = mode or self.architecture.test
        if mode.mode == "whole":
            return self._whole(x)
        if mode.crop_size is None or mode.stride is None:
            raise ValueError(
                "slide mode needs crop_size and stride, (height, width) each; "
                f"got crop_size={mode.crop_size} and stride={mode.stride}."
            )
        return self._slide(x, mode.crop_size, mode.stride)

    def _whole(self, x: Tensor) -> Tensor:
        answer = self(x)
        if isinstance(self.decode_head, QueryHead) and isinstance(answer, tuple):
            classes, masks = answer[:2]
            return self.decode_head.semantic_scores(classes, masks, x.shape[-2:])
        return resize(answer, x.shape[-2:], self.architecture.decode_head.align_corners)

    def _slide(self, x: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        height, width = x.shape[-2:]
        classes = self.architecture.decode_head.outputs
        total = x.new_zeros((x.shape[0], classes, height, width))
        count = x.new_zeros((1, 1, height, width))
        for top in window_starts(height, crop[0], stride[0]):
            for left in window_starts(width, crop[1], stride[1]):
                window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
                total[window] += self._whole(x[window])
                count[window] += 1
        return total / count


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where the windows of ``slide`` mode begin: the last one is moved back to fit."""
    windows = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - crop), 0) for i in range(windows)]
