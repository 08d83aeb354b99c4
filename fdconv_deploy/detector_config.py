"""What a two-stage detector is made of, as plain data.

Faster R-CNN and Mask R-CNN over a feature pyramid. Names and defaults are those of
mmdetection's FPN, RPNHead, Shared2FCBBoxHead, FCNMaskHead and their published configs.
Nothing here imports torch.
"""

from __future__ import annotations

from pydantic import Field

from fdconv_deploy.config import BackboneConfig, Colour, Frozen, Preprocessing

Four = tuple[float, float, float, float]

# mmdetection's published test pipeline: the long side at most 1333, the short one at most 800.
PUBLISHED_SCALE = (1333, 800)
# The published pipelines pad heights and widths to multiples of this.
SIZE_DIVISOR = 32


class BoxCoderConfig(Frozen):
    """DeltaXYWHBBoxCoder: ``delta * stds + means`` are shifts and log-scales of a box."""

    means: Four = (0.0, 0.0, 0.0, 0.0)
    stds: Four = (1.0, 1.0, 1.0, 1.0)


class FPNConfig(Frozen):
    """The feature pyramid. Levels past the backbone's are the last one, every other pixel."""

    in_channels: tuple[int, ...] = (256, 512, 1024, 2048)
    out_channels: int = 256
    num_outs: int = 5


class RPNHeadConfig(Frozen):
    """The region proposal head, and the anchors it shifts: one set per pyramid level.

    An anchor of level ``i`` is ``strides[i] * scale`` pixels wide and high before ``ratios``,
    which are height / width.
    """

    feat_channels: int = 256
    scales: tuple[float, ...] = (8.0,)
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    bbox_coder: BoxCoderConfig = BoxCoderConfig()

    @property
    def num_anchors(self) -> int:
        """Anchors at each position."""
        return len(self.scales) * len(self.ratios)


class RoIConfig(Frozen):
    """How a head's features are cut out: SingleRoIExtractor with RoIAlign, aligned.

    A region smaller than twice ``finest_scale`` (the square root of its area, in pixels) is
    cut out of the first of ``featmap_strides``' levels, and one level further per doubling.
    ``sampling_ratio=0`` takes as many samples as pixels of the level fall in a bin.
    """

    output_size: int = 7
    featmap_strides: tuple[int, ...] = (4, 8, 16, 32)
    finest_scale: int = 56
    sampling_ratio: int = Field(default=0, ge=0)


class BoxHeadConfig(Frozen):
    """Shared2FCBBoxHead: ``num_shared_fcs`` linear layers, then classes and box deltas."""

    num_classes: int = 80
    fc_out_channels: int = 1024
    num_shared_fcs: int = 2
    reg_class_agnostic: bool = False
    bbox_coder: BoxCoderConfig = BoxCoderConfig(stds=(0.1, 0.1, 0.2, 0.2))
    roi: RoIConfig = RoIConfig()


class MaskHeadConfig(Frozen):
    """FCNMaskHead: ``num_convs`` convolutions, a 2×2 deconvolution, a mask for each class."""

    num_classes: int = 80
    num_convs: int = 4
    conv_kernel_size: int = 3
    conv_out_channels: int = 256
    class_agnostic: bool = False
    roi: RoIConfig = RoIConfig(output_size=14)


class RPNTestConfig(Frozen):
    """mmdetection's ``test_cfg.rpn``: per level the best ``nms_pre``, then NMS per level.

    Boxes no wider or no higher than ``min_bbox_size`` pixels are left out; below 0, none are.
    """

    nms_pre: int = Field(default=1000, ge=1)
    max_per_img: int = Field(default=1000, ge=1)
    nms_iou_threshold: float = Field(default=0.7, ge=0, le=1)
    min_bbox_size: float = 0.0


class RCNNTestConfig(Frozen):
    """mmdetection's ``test_cfg.rcnn``: boxes above ``score_thr``, then NMS per class.

    ``mask_thr_binary`` is the probability from which a pixel is the object's, masks only.
    """

    score_thr: float = Field(default=0.05, ge=0, le=1)
    nms_iou_threshold: float = Field(default=0.5, ge=0, le=1)
    max_per_img: int = Field(default=100, ge=1)
    mask_thr_binary: float = Field(default=0.5, ge=0, le=1)


class DetectorTestConfig(Frozen):
    """How boxes are chosen, in each of the two stages."""

    rpn: RPNTestConfig = RPNTestConfig()
    rcnn: RCNNTestConfig = RCNNTestConfig()


class DetectorArchitecture(Frozen):
    """Faster R-CNN, or with a ``mask_head`` Mask R-CNN. One RGB triple per class in ``palette``."""

    backbone: BackboneConfig
    neck: FPNConfig = FPNConfig()
    rpn_head: RPNHeadConfig = RPNHeadConfig()
    bbox_head: BoxHeadConfig = BoxHeadConfig()
    mask_head: MaskHeadConfig | None = None
    test: DetectorTestConfig = DetectorTestConfig()
    preprocessing: Preprocessing = Preprocessing(scale=PUBLISHED_SCALE)
    classes: tuple[str, ...] = ()
    palette: tuple[Colour, ...] = ()

    @property
    def mask_size(self) -> int:
        """Height and width of a predicted mask; 0 without a mask head."""
        return 0 if self.mask_head is None else 2 * self.mask_head.roi.output_size

    @property
    def published_size(self) -> tuple[int, int]:
        """(height, width) in pixels of a landscape image, resized and padded as published."""
        long, short = self.preprocessing.scale or PUBLISHED_SCALE
        height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in (short, long))
        return height, width
