"""Multiply-adds of a network, counted from its layers and its architecture.

Convolutions only, one per multiplication and addition together, as the paper's tables
count: transforms and element-wise products are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fdconv_deploy.checkpoints.infer_layers import Layer
from fdconv_deploy.config import (
    RESNET_BLOCKS,
    ASPPHeadConfig,
    BackboneConfig,
    DepthwiseSeparableASPPHeadConfig,
    FCNHeadConfig,
    HeadConfig,
)

Size = tuple[int, int]


def backbone_sizes(config: BackboneConfig, size: Size) -> dict[str, tuple[Size, Size]]:
    """Input and output size, (height, width), of every convolution of a ResNet.

    Args:
        config: the backbone.
        size: of the image, in pixels.
    """
    sizes: dict[str, tuple[Size, Size]] = {}
    half = _strided(size, 2)
    if config.deep_stem:
        sizes |= {"stem.0": (size, half), "stem.3": (half, half), "stem.6": (half, half)}
    else:
        sizes["conv1"] = (size, half)
    here = _strided(half, 2)
    kind, depths = RESNET_BLOCKS[config.depth]
    strides = ("conv2" if kind == "bottleneck" and config.style == "pytorch" else "conv1",)
    for stage in range(config.num_stages):
        for block in range(depths[stage]):
            stride = config.strides[stage] if block == 0 else 1
            there = _strided(here, stride)
            at = here
            for conv in ("conv1", "conv2", "conv3"):
                after = there if conv in strides else at
                sizes[f"layer{stage + 1}.{block}.{conv}"] = (at, after)
                at = after
            for place in (0, 1):
                into = there if config.avg_down else here
                sizes[f"layer{stage + 1}.{block}.downsample.{place}"] = (into, there)
            here = there
    return sizes


def stage_sizes(config: BackboneConfig, size: Size) -> list[Size]:
    """Size of each of the backbone's outputs."""
    sizes = backbone_sizes(config, size)
    return [sizes[f"layer{i + 1}.0.conv2"][1] for i in sorted(config.out_indices)]


def head_sizes(head: HeadConfig, features: Sequence[Size]) -> Iterator[tuple[str, Size]]:
    """Output size of every convolution of a head.

    Args:
        head: which head.
        features: sizes of the backbone's outputs.
    """
    inputs = [features[i] for i in head.in_index]
    out = inputs[0]
    if isinstance(head, FCNHeadConfig):
        for i in range(head.num_convs):
            yield f"convs.{i}.conv", out
        yield "conv_cat.conv", out
    elif isinstance(head, ASPPHeadConfig | DepthwiseSeparableASPPHeadConfig):
        yield "image_pool.1.conv", (1, 1)
        for i in range(len(head.dilations)):
            yield from _either(f"aspp_modules.{i}", out)
        yield "bottleneck.conv", out
        if isinstance(head, DepthwiseSeparableASPPHeadConfig) and head.c1_in_channels:
            out = features[0]
            yield "c1_bottleneck.conv", out
        yield from _either("sep_bottleneck.0", out)
        yield from _either("sep_bottleneck.1", out)
    else:
        for i, scale in enumerate(head.pool_scales):
            yield f"psp_modules.{i}.1.conv", (scale, scale)
        pyramid = head.type == "UPerHead"
        yield "bottleneck.conv", inputs[-1] if pyramid else out
        for i, size in enumerate(inputs[:-1] if pyramid else ()):
            yield f"lateral_convs.{i}.conv", size
            yield f"fpn_convs.{i}.conv", size
        yield "fpn_bottleneck.conv", out
    yield "conv_seg", out


def _either(name: str, size: Size) -> Iterator[tuple[str, Size]]:
    """Of a convolution that may be depthwise separable; names no network has do no harm."""
    for inner in ("conv", "depthwise_conv.conv", "pointwise_conv.conv"):
        yield f"{name}.{inner}", size


def main_macs(layer: Layer, out: Size) -> int:
    """Of the convolution itself, whoever made its kernel."""
    return out[0] * out[1] * _weights(layer)


def attention_macs(layer: Layer, local_kernel: int) -> dict[str, int]:
    """Of a dynamic layer's kernel modulation: once per image, whatever its size.

    Args:
        layer: a dynamic layer.
        local_kernel: width of KSM_Local's 1-d convolution, 0 without one.
    """
    taps = layer.kernel[0] * layer.kernel[1]
    heads = layer.attentions if layer.attentions > 1 else 0
    if not layer.only_kernel:
        heads += layer.in_channels + layer.out_channels + (taps if layer.kernel[0] > 1 else 0)
    return {
        "KSM_Global": layer.hidden * (layer.in_channels + heads),
        "KSM_Local": layer.in_channels * layer.out_channels * taps * local_kernel,
    }


def band_macs(layer: Layer, into: Size) -> int:
    """Of a dynamic layer's band convolutions, which run at its input's size."""
    per_pixel = layer.in_channels * layer.spatial_kernel**2
    return layer.bands * into[0] * into[1] * per_pixel


def _weights(layer: Layer) -> int:
    return layer.in_channels * layer.out_channels * layer.kernel[0] * layer.kernel[1]


def _strided(size: Size, stride: int) -> Size:
    """Of a convolution or pooling that keeps the size at stride 1."""
    return (size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1
