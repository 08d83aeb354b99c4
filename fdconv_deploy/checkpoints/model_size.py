"""How much there is in a network: parameters, bytes and multiply-adds, by part and by layer.

Multiply-adds are of convolutions only, one per multiplication and addition together, as the
paper's tables count: transforms and element-wise products are not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fdconv_deploy.checkpoints.infer_layers import (
    Layer,
    Shapes,
    backbone_prefix,
    kind_of,
    parameters,
)
from fdconv_deploy.config import BackboneConfig, SegmentorConfig
from fdconv_deploy.nn import ResNet, Segmentor

FDCONV_PARTS = ("dft_weight", "KSM_Global", "KSM_Local", "FBM")

Size = tuple[int, int]
Sizes = dict[str, tuple[Size, Size]]


@torch.no_grad()
def layer_sizes(
    state: Shapes, architecture: SegmentorConfig | None, backbone: BackboneConfig | None, size: Size
) -> Sizes:
    """Input and output size, (height, width), of every convolution that runs at inference.

    They are seen in a run of the plain network of the same shape, without data.

    Args:
        state: the network's tensors, by which names begin with ``backbone.``.
        architecture: of a segmentor; None for another network, of which the backbone is sized.
        backbone: None if it is not understood; then no size is known.
        size: of the image, in pixels.
    """
    if backbone is None:
        return {}
    plain = backbone.model_copy(update={"conv": None})
    network: nn.Module
    with torch.device("meta"):
        if architecture is None:
            network, prefix = ResNet(plain), backbone_prefix(state)
        else:
            changes = {"backbone": plain, "auxiliary_head": None}
            network, prefix = Segmentor(architecture.model_copy(update=changes)), ""
        image = torch.empty(1, backbone.in_channels, *size)
    sizes: Sizes = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            sizes[name] = (_size(inputs[0]), _size(output))

        return hook

    for name, module in network.eval().named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note(f"{prefix}{name}"))
    network(image)
    return sizes


def parameters_by_part(state: Shapes) -> dict[str, int]:
    """Parameters under each first word of the names; bare backbones as ``backbone``."""
    bare = kind_of(state) in ("backbone", "classifier") and not backbone_prefix(state)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        first = key.split(".")[0]
        name = "backbone" if bare and first not in ("fc", "head", "cls_head") else first
        parts.setdefault(name, {})[key] = value
    return {name: parameters(tensors) for name, tensors in parts.items()} | {
        "total": parameters(state)
    }


def parameters_by_role(state: Shapes) -> dict[str, int]:
    """Parameters of FDConv layers by what they do."""
    return {
        role: parameters({k: v for k, v in state.items() if f".{role}" in f".{k}"})
        for role in FDCONV_PARTS
    }


def macs_by_part(state: Shapes, layers: Sequence[Layer], sizes: Sizes) -> dict[str, int]:
    """Multiply-adds of an image: of plain convolutions, of what FDConv adds, of the head."""
    totals = dict.fromkeys(("main", "KSM_Global", "KSM_Local", "FBM"), 0)
    for layer in layers:
        if layer.name in sizes:
            for name, count in layer_macs(state, layer, sizes).items():
                head = layer.name.startswith("decode_head.")
                place = "decode_head" if head else name
                totals[place] = totals.get(place, 0) + count
    return totals | {"total": sum(totals.values())}


def layer_macs(state: Shapes, layer: Layer, sizes: Sizes) -> dict[str, int]:
    """A layer's multiply-adds by what they are for; its size is known.

    ``main`` is the convolution itself, whatever makes its kernel. Kernel modulation runs once
    per image, and band convolutions at the size of the layer's input.
    """
    (height_in, width_in), (height, width) = sizes[layer.name]
    taps = layer.kernel[0] * layer.kernel[1]
    weights = layer.in_channels * layer.out_channels * taps
    macs = {"main": height * width * weights}
    if layer.dynamic:
        attentions = layer.attentions if layer.attentions > 1 else 0
        if not layer.only_kernel:
            attentions += layer.in_channels + layer.out_channels
            attentions += taps if layer.kernel[0] > 1 else 0
        local = state.get(f"{layer.name}.KSM_Local.conv.weight")
        macs["KSM_Global"] = layer.hidden * (layer.in_channels + attentions)
        macs["KSM_Local"] = 0 if local is None else weights * local.shape[-1]
        per_pixel = layer.in_channels * layer.spatial_kernel**2
        macs["FBM"] = layer.bands * height_in * width_in * per_pixel
    return macs


def spectrum_bytes(layer: Layer, ratio: int) -> int:
    """Bytes of a layer's spectra in float32; 0 of a plain layer.

    Args:
        layer: any convolution.
        ratio: ``param_ratio`` where the layer's tensors do not show it.
    """
    return (layer.ratio or ratio) * layer.kept_bins * 2 * 4 if layer.dynamic else 0


def published_buffer_bytes(
    layers: Sequence[Layer], backbone: BackboneConfig | None, ratio: int
) -> int:
    """Bytes that the published code holds beside the weights.

    They are row and column of every bin, int64 each, and one boolean half-spectrum mask per band
    in every layer that modulates bands.
    """
    indices = 2 * sum(spectrum_bytes(layer, ratio) for layer in layers)
    if backbone is None or backbone.conv is None:
        return indices
    bands = backbone.conv.fbm_cfg
    height, width = bands.max_size
    mask = len(bands.k_list) * height * (width // 2 + 1)
    return indices + mask * sum(1 for layer in layers if layer.bands)


def _size(x: Tensor) -> Size:
    return x.shape[-2], x.shape[-1]
