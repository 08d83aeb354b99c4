"""The two networks: what they are made of, and how they are before their training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from examples.streets.scenes import CLASSES, PALETTE
from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.config import (
    FDConvConfig,
    Mask2FormerHeadConfig,
    MixVisionTransformerConfig,
    SegformerHeadConfig,
    SegmentorConfig,
)
from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.nn.transformer import MultiScaleDeformableAttention

NETWORKS = ("segformer", "mask2former")
FDCONV = FDConvConfig(kernel_num=16)


def architecture(name: str) -> SegmentorConfig:
    """A narrow SegFormer, or a Mask2Former on the packaged segmentor's ResNet and a fourth stage.

    FDConv are both layers of every feed-forward network, and the ResNet's convolutions.
    """
    if name == "segformer":
        # Maps are of twice the usual resolution: people and signs are 10 to 20 pixels wide.
        backbone = MixVisionTransformerConfig(
            num_heads=(1, 2, 3, 4),
            num_layers=(1, 1, 2, 1),
            strides=(2, 2, 2, 2),
            conv=FDCONV,
        )
        return SegmentorConfig(
            backbone=backbone,
            decode_head=SegformerHeadConfig(
                in_channels=backbone.output_widths,
                in_index=(0, 1, 2, 3),
                channels=64,
                num_classes=len(CLASSES),
            ),
            classes=CLASSES,
            palette=PALETTE,
        )
    packaged = load_checkpoint(packaged_checkpoint()).architecture.backbone
    changes = {
        "num_stages": 4,
        "strides": (1, 2, 2, 2),
        "dilations": (1, 1, 1, 1),
        "out_indices": (0, 1, 2, 3),
    }
    resnet = packaged.model_copy(update=changes)
    return SegmentorConfig(
        backbone=resnet,
        decode_head=Mask2FormerHeadConfig(
            in_channels=resnet.output_widths,
            in_index=(0, 1, 2, 3),
            channels=64,
            num_classes=len(CLASSES),
            num_queries=20,
            hidden_channels=64,
            mask_channels=64,
            norm_groups=8,
            encoder_layers=2,
            encoder_heads=4,
            encoder_feedforward=128,
            decoder_layers=3,
            decoder_heads=4,
            decoder_feedforward=128,
            conv=FDCONV,
        ),
        classes=CLASSES,
        palette=PALETTE,
    )


def start(name: str) -> Segmentor:
    """The network before its training, in training mode.

    The Mask2Former's first three stages are the packaged segmentor's, and stay as they are.
    """
    network = Segmentor(architecture(name))
    if name == "mask2former":
        trained = load_checkpoint(packaged_checkpoint()).backbone.state_dict()
        missing, unexpected = network.backbone.load_state_dict(trained, strict=False)
        assert not unexpected, unexpected
        assert all(key.startswith("layer4.") for key in missing), missing
        for parameter_name, parameter in network.backbone.named_parameters():
            parameter.requires_grad_(parameter_name.startswith("layer4."))
    for module in network.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            spread_points(module)
    train_mode(network)
    return network


def train_mode(network: Segmentor) -> None:
    """Training mode of what learns: the statistics of what does not stand still."""
    network.train()
    for part in network.backbone.children():
        parameters = list(part.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            part.eval()


@torch.no_grad()
def spread_points(attention: MultiScaleDeformableAttention) -> None:
    """Deformable attention's first places: a direction for each head, a distance for each point.

    Source: Deformable DETR (https://arxiv.org/abs/2010.04159), appendix A.4.
    """
    heads, levels, points = attention.heads, attention.levels, attention.points
    angle = torch.arange(heads) * (2 * math.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    distance = torch.arange(1, points + 1).reshape(1, 1, -1, 1)
    offsets: Tensor = direction[:, None, None] * distance
    attention.sampling_offsets.bias.copy_(offsets.expand(-1, levels, -1, -1).flatten())
    for parameter in (attention.sampling_offsets.weight, *attention.attention_weights.parameters()):
        nn.init.zeros_(parameter)
