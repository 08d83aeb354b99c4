"""How much there is in a network: parameters, bytes and multiply-adds, by part and by layer.

Multiply-adds are one per multiplication and addition together, as the paper's tables count:
transforms and element-wise products are not in them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fdconv_deploy.checkpoints.infer_layers import (
    Layer,
    Shapes,
    backbone_prefix,
    kind_of,
    parameters,
)
from fdconv_deploy.config import (
    BackboneConfig,
    QueryHeadConfig,
    ResNetConfig,
    SegmentorConfig,
)
from fdconv_deploy.errors import ImageError, UnsupportedLayerError
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.nn.backbones import build_backbone

FDCONV_PARTS = ("dft_weight", "KSM_Global", "KSM_Local", "FBM")

# Multiply-adds of each layer by what they are for: its own convolution, ``main``, whatever makes
# the kernel, and the modulations of an FDConv layer.
Macs = dict[str, dict[str, int]]


@torch.no_grad()
def count_macs(
    state: Shapes,
    layers: Sequence[Layer],
    architecture: SegmentorConfig | None,
    backbone: BackboneConfig | None,
    size: tuple[int, int],
) -> tuple[Macs, dict[str, int]]:
    """Multiply-adds of all that runs at inference, counted in a run without data.

    Args:
        state: the network's tensors.
        layers: its convolutions.
        architecture: of a segmentor; None for another network, of which the backbone is counted.
        backbone: None if it is not understood.
        size: (height, width) of the image, in pixels.

    Returns:
        Of each layer, and by part with a total. Of a ResNet with a convolutional head those of
        convolutions; of networks with attention, of which these are the smaller part, those of
        matrix products, too, and none of layers. Both empty where nothing can be built.
    """
    if backbone is None:
        return {}, {}
    network: nn.Module
    try:
        with torch.device("meta"):
            if architecture is None:
                network, prefix = build_backbone(backbone), backbone_prefix(state)
            else:
                changes = {"auxiliary_head": None}
                network, prefix = Segmentor(architecture.model_copy(update=changes)), ""
            image = torch.empty(1, backbone.in_channels, *size)
        with FlopCounterMode(display=False) as counter:
            network.requires_grad_(False).eval()(image)
    except (UnsupportedLayerError, ImageError):  # ImageError: MaskDINO of few tokens
        return {}, {}
    flops, kind = counter.get_flop_counts(), type(network).__name__
    queries = architecture is not None and isinstance(architecture.decode_head, QueryHeadConfig)
    if queries or not isinstance(backbone, ResNetConfig):
        names = {f"{kind}.backbone": "backbone", f"{kind}.decode_head": "decode_head"}
        parts = {
            part: sum(flops[name].values()) // 2 for name, part in names.items() if name in flops
        }
        total = sum(flops[kind].values()) // 2
        return {}, (parts or {"backbone": total}) | {"total": total}
    counts = {
        name.partition(".")[2]: found[torch.ops.aten.convolution] // 2
        for name, found in flops.items()
        if torch.ops.aten.convolution in found
    }
    macs: Macs = {}
    totals = dict.fromkeys(("main", *FDCONV_PARTS[1:]), 0)
    for layer in layers:
        name = layer.name.removeprefix(prefix)
        if name not in counts:
            continue
        added = {part: counts.get(f"{name}.{part}", 0) for part in FDCONV_PARTS[1:]}
        main = counts[name] - sum(added.values())
        macs[layer.name] = {"main": main} | (added if layer.dynamic else {})
        for part, count in macs[layer.name].items():
            place = "decode_head" if layer.name.startswith("decode_head.") else part
            totals[place] = totals.get(place, 0) + count
    return macs, totals | {"total": sum(totals.values())} if macs else {}


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


def spectrum_bytes(layer: Layer, ratio: int) -> int:
    """Bytes of a layer's spectra in float32; 0 of a plain layer.

    Args:
        layer: any convolution.
        ratio: ``param_ratio`` where the layer's tensors do not show it.
    """
    return (layer.param_ratio or ratio) * layer.kept_bins * 2 * 4 if layer.dynamic else 0


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
