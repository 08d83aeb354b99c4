"""The small detector: what it is made of, and how it is before its training."""

from __future__ import annotations

from torch import nn

from examples.streets.instances import CLASSES, COLOURS
from examples.training.scenes import SIZE
from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.config import (
    BoxHeadConfig,
    DetectorConfig,
    DetectorTestConfig,
    FPNConfig,
    MaskHeadConfig,
    Preprocessing,
    RCNNTestConfig,
    ResNetConfig,
    RoIConfig,
    RPNHeadConfig,
    RPNTestConfig,
)
from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.nn.detection import Detector


def architecture(backbone: ResNetConfig) -> DetectorConfig:
    """A slim Mask R-CNN whose anchors and levels suit things of 8 to 80 pixels."""
    channels, levels = 48, (4, 8, 16)
    widths = tuple(backbone.base_channels * 4 * 2**stage for stage in range(3))
    cut = RoIConfig(featmap_strides=levels, finest_scale=14, sampling_ratio=2)
    return DetectorConfig(
        backbone=backbone,
        neck=FPNConfig(in_channels=widths, out_channels=channels, num_outs=4),
        rpn_head=RPNHeadConfig(
            feat_channels=channels, scales=(3.0,), ratios=(0.8, 1.5, 2.6), strides=(*levels, 32)
        ),
        bbox_head=BoxHeadConfig(num_classes=len(CLASSES), fc_out_channels=128, roi=cut),
        mask_head=MaskHeadConfig(
            num_classes=len(CLASSES),
            conv_out_channels=channels,
            roi=cut.model_copy(update={"output_size": 14}),
        ),
        test=DetectorTestConfig(
            rpn=RPNTestConfig(nms_pre=300, max_per_img=200), rcnn=RCNNTestConfig(max_per_img=50)
        ),
        preprocessing=Preprocessing(scale=SIZE[::-1]),
        classes=CLASSES,
        palette=COLOURS,
    )


def start() -> Detector:
    """The network before its training: the packaged segmentor's backbone, heads that know nothing.

    What a head says at first is near nothing, as in mmdetection. In eval mode, where it stays:
    BatchNorm keeps its statistics, as norm_eval=True has it.
    """
    streets = load_checkpoint(packaged_checkpoint())
    network = Detector(architecture(streets.architecture.backbone))
    network.backbone.load_state_dict(streets.backbone.state_dict())
    box = network.roi_head.bbox_head
    for last in (network.rpn_head.rpn_cls, network.rpn_head.rpn_reg, box.fc_cls, box.fc_reg):
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
    return network.eval()
