"""Networks to measure, with random weights that behave as trained ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.rivals.omni_dimensional import OmniDimensionalConv2d
from fdconv_deploy.config import FDConvConfig, ResNetConfig, SegmentorConfig, UPerHeadConfig
from fdconv_deploy.nn import FDConv2d, Segmentor
from fdconv_deploy.nn.backbones.resnet import Block
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.detection.detector import FPN


def backbone(depth: int = 50, kernel_num: int | None = 64, width: int = 64) -> ResNetConfig:
    """ResNet with FDConv layers; ``kernel_num=None`` is the baseline."""
    conv = None if kernel_num is None else FDConvConfig(kernel_num=kernel_num)
    return ResNetConfig(depth=depth, base_channels=width, conv=conv)


def upernet(
    depth: int = 50, kernel_num: int | None = 64, classes: int = 150, width: int = 64
) -> SegmentorConfig:
    """The published UPerNet over such a backbone."""
    expansion = 4 if depth >= 50 else 1
    channels = tuple(width * expansion * 2**stage for stage in range(4))
    return SegmentorConfig(
        backbone=backbone(depth, kernel_num, width),
        decode_head=UPerHeadConfig(
            in_channels=channels,
            in_index=(0, 1, 2, 3),
            channels=8 * width,
            num_classes=classes,
        ),
    )


@torch.no_grad()
def trained_like(
    network: nn.Module, seed: int = 0, size: int = 128, images: Tensor | None = None
) -> nn.Module:
    """Wake every branch up and let BatchNorm settle on what it sees. In place, eval mode.

    It sees ``images`` ``(B, 3, H, W)``, or packaged pictures of ``size`` pixels each way.

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
        if isinstance(module, Block):
            module.get_parameter(f"bn{module.depth}.weight").fill_(0.2)
    if images is None:
        from fdconv_deploy.export.validation.sample_inputs import sample_tensor

        images = sample_tensor(6, (size, size))
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    pooled = [m for n, m in norms.items() if "KSM_Global" in n or "psp_modules" in n]
    pooled += [m.norm for m in network.modules() if isinstance(m, OmniDimensionalConv2d)]
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


def build(architecture: SegmentorConfig, seed: int = 0) -> Segmentor:
    """A segmentor with trained-like weights."""
    torch.manual_seed(seed)
    network = Segmentor(architecture)
    trained_like(network, seed)
    return network


@torch.no_grad()
def lively_heads(network: Detector, images: Tensor) -> Detector:
    """Scale what follows a detector's backbone until it finds objects, as trained; in place.

    On ``images`` ``(B, 3, H, W)`` every layer's outputs then have mean 0 and a spread of 1, so
    that none drowns the differences it gets in what all places have in common. Those of the last
    layers are spread until some anchors are likely, some regions of one class, boxes move and
    masks have edges.
    """
    network.eval()
    rpn, roi = network.rpn_head, network.roi_head
    _spread_neck(network.neck, network.backbone(images))
    features = network.features(images)
    _spread_maps(rpn.rpn_conv, features)
    hidden = [torch.relu(rpn.rpn_conv(x)) for x in features]
    _spread_maps(rpn.rpn_cls, hidden, 2.0)
    _spread_maps(rpn.rpn_reg, hidden, 0.1)
    sizes = images.new_tensor(images.shape[-2:]).expand(len(images), 2)
    proposals, valid = rpn.propose(features, sizes)
    x = roi.bbox_roi_extractor(features, proposals)[valid.reshape(-1)].flatten(1)
    for layer in roi.bbox_head.shared_fcs:
        _spread(layer, layer(x).T)
        x = torch.relu(layer(x))
    _spread(roi.bbox_head.fc_cls, roi.bbox_head.fc_cls(x).T, 3.0)
    # The box coder takes a tenth or a fifth of it: boxes move by a few percent of their size.
    _spread(roi.bbox_head.fc_reg, roi.bbox_head.fc_reg(x).T, 0.3)
    if roi.mask_head is not None and roi.mask_roi_extractor is not None:
        x = roi.mask_roi_extractor(features, proposals[:, :100])
        for layer in [*(conv.conv for conv in roi.mask_head.convs), roi.mask_head.upsample]:
            _spread_maps(layer, [x])
            x = torch.relu(layer(x))
        _spread_maps(roi.mask_head.conv_logits, [x], 2.0)
    return network


def _spread_neck(neck: FPN, features: Sequence[Tensor]) -> None:
    for lateral, x in zip(neck.lateral_convs, features, strict=True):
        _spread_maps(lateral.conv, [x])
    seen: list[Tensor] = []
    hooks = [
        conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for conv in neck.fpn_convs
    ]
    neck(features)
    for hook in hooks:
        hook.remove()
    for conv, x in zip(neck.fpn_convs, seen, strict=True):
        _spread_maps(conv.conv, [x])


def _spread_maps(layer: nn.Module, maps: Sequence[Tensor], deviation: float = 1.0) -> None:
    """`_spread` of what a convolution makes of ``(B, C, h, w)`` maps."""
    found = [layer(x).transpose(0, 1).flatten(1) for x in maps]
    _spread(layer, torch.cat(found, dim=1), deviation)


def _spread(layer: nn.Module, outputs: Tensor, deviation: float = 1.0) -> None:
    """Let a layer's outputs, ``(O, samples)`` so far, have mean 0 and this deviation each."""
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    assert layer.bias is not None
    gain = deviation / outputs.std(dim=1).clamp_min(1e-6)
    across = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    shape = [-1 if axis == across else 1 for axis in range(layer.weight.ndim)]
    layer.weight.mul_(gain.reshape(shape))
    layer.bias.copy_((layer.bias - outputs.mean(dim=1)) * gain)
