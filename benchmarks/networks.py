"""Networks to measure, with random weights that behave as trained ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.inputs import made_up_images
from fdconv_deploy.architecture import Architecture, BackboneConfig, FDConvConfig, HeadConfig
from fdconv_deploy.nn import FDConv2d, Segmentor, build_segmentor
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.resnet import BasicBlock, Bottleneck


def backbone(depth: int = 50, kernel_num: int | None = 64, width: int = 64) -> BackboneConfig:
    """ResNet with FDConv layers; ``kernel_num=None`` is the plain twin."""
    conv = None if kernel_num is None else FDConvConfig(kernel_num=kernel_num)
    return BackboneConfig(depth=depth, base_channels=width, conv=conv)


def upernet(
    depth: int = 50, kernel_num: int | None = 64, classes: int = 150, width: int = 64
) -> Architecture:
    """The published UPerNet over such a backbone."""
    expansion = 4 if depth >= 50 else 1
    channels = tuple(width * expansion * 2**stage for stage in range(4))
    return Architecture(
        backbone=backbone(depth, kernel_num, width),
        decode_head=HeadConfig(
            type="UPerHead",
            in_channels=channels,
            in_index=(0, 1, 2, 3),
            channels=8 * width,
            num_classes=classes,
        ),
    )


@torch.no_grad()
def trained_like(network: nn.Module, seed: int = 0, size: int = 128) -> nn.Module:
    """Wake every branch up and let BatchNorm settle on what it sees. In place, eval mode.

    Attention heads get weights that make attentions differ by several percent from image to
    image, as in trained checkpoints; running statistics are those of a batch of made-up images.
    """
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, FDConv2d) and module.is_dynamic:
            for name, parameter in module.named_parameters():
                if "_fc." in name:
                    parameter.normal_(0, 0.05)
                elif name.startswith("KSM_Local.conv"):
                    parameter.normal_(0, 0.1)
                elif name.startswith("FBM"):
                    parameter.normal_(0, 0.01)
    for module in network.modules():
        # Training makes residual branches small beside their shortcuts.
        if isinstance(module, BasicBlock | Bottleneck):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            last.weight.fill_(0.2)
    images = made_up_images(6, (size, size))
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    pooled = [m for n, m in norms.items() if "KSM_Global" in n or "psp_modules" in n]
    for module in norms.values():
        module.reset_running_stats()
        module.momentum = None  # running statistics are those of all passes since the reset
    network.train()
    network(images)
    for module in pooled:
        # A few images' averages tell too little of how far those of others can be.
        assert module.running_mean is not None
        assert module.running_var is not None
        mean_square = module.running_mean.square() + module.running_var
        module.running_var.copy_(module.running_var.clamp_min(mean_square.mean()))
        module.eval()
    for module in norms.values():
        if module.training:
            module.reset_running_stats()
    network(images)
    return network.eval()


def build(architecture: Architecture, seed: int = 0) -> Segmentor:
    """A segmentor with trained-like weights."""
    torch.manual_seed(seed)
    network = build_segmentor(architecture)
    trained_like(network, seed)
    return network


@torch.no_grad()
def lively_heads(network: Detector, images: Tensor) -> Detector:
    """Scale a detector's last layers until it finds objects, as a trained one does; in place.

    On ``images`` ``(B, 3, H, W)`` each output of those layers then has mean 0 and a spread that
    makes some anchors likely, some regions one class, boxes that move and masks with edges.
    """
    network.eval()
    features = network.features(images)
    rpn, roi = network.rpn_head, network.roi_head
    hidden = [torch.relu(rpn.rpn_conv(x)) for x in features]
    for layer, spread in ((rpn.rpn_cls, 2.0), (rpn.rpn_reg, 0.2)):
        found = [layer(x).permute(1, 0, 2, 3).flatten(1) for x in hidden]
        _spread(layer, torch.cat(found, dim=1), spread)
    sizes = images.new_tensor(images.shape[-2:]).expand(len(images), 2)
    proposals, valid = rpn.propose(features, sizes)
    regions = roi.bbox_roi_extractor(features, proposals)[valid.reshape(-1)]
    logits, deltas = roi.bbox_head(regions)
    _spread(roi.bbox_head.fc_cls, logits.T, 3.0)
    _spread(roi.bbox_head.fc_reg, deltas.flatten(1).T, 1.0)
    if roi.mask_head is not None and roi.mask_roi_extractor is not None:
        masks = roi.mask_head(roi.mask_roi_extractor(features, proposals[:, :100]))
        _spread(roi.mask_head.conv_logits, masks.transpose(0, 1).flatten(1), 3.0)
    return network


def _spread(layer: nn.Conv2d | nn.Linear, outputs: Tensor, deviation: float) -> None:
    """Let a layer's outputs, ``(O, samples)`` so far, have mean 0 and this deviation each."""
    assert layer.bias is not None
    gain = deviation / outputs.std(dim=1).clamp_min(1e-6)
    layer.weight.mul_(gain.reshape(-1, *(1,) * (layer.weight.ndim - 1)))
    layer.bias.copy_((layer.bias - outputs.mean(dim=1)) * gain)
