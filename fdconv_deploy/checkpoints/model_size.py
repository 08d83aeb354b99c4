"""How much there is in a network: parameters, bytes and multiply-adds, by part and by layer.

Multiply-adds are of convolutions only, one per multiplication and addition together, as the
paper's tables count: transforms and element-wise products are not in them.
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
def attention_macs(
    architecture: SegmentorConfig | None, backbone: BackboneConfig | None, size: tuple[int, int]
) -> dict[str, int]:
    """Multiply-adds of a network with attention, by part, of matrix products too.

    Arguments are `layer_macs`'; empty for networks that it counts, and where it would be.
    """
    queries = architecture is not None and isinstance(architecture.decode_head, QueryHeadConfig)
    if backbone is None or (isinstance(backbone, ResNetConfig) and not queries):
        return {}
    try:
        with torch.device("meta"):
            changes = {"auxiliary_head": None}
            network: nn.Module = (
                build_backbone(backbone)
                if architecture is None
                else Segmentor(architecture.model_copy(update=changes))
            )
            image = torch.empty(1, backbone.in_channels, *size)
        with FlopCounterMode(display=False) as counter:
            network.requires_grad_(False).eval()(image)
    except (UnsupportedLayerError, ImageError):  # MaskDINO of few tokens
        return {}
    kind = type(network).__name__
    names = {f"{kind}.backbone": "backbone", f"{kind}.decode_head": "decode_head", kind: "total"}
    counts = counter.get_flop_counts()
    macs = {part: sum(counts[name].values()) // 2 for name, part in names.items() if name in counts}
    return macs if architecture is not None else {"backbone": macs["total"], **macs}


@torch.no_grad()
def layer_macs(
    state: Shapes,
    layers: Sequence[Layer],
    architecture: SegmentorConfig | None,
    backbone: BackboneConfig | None,
    size: tuple[int, int],
) -> Macs:
    """Multiply-adds of every layer that runs at inference, counted in a run without data.

    Args:
        state: the network's tensors.
        layers: those to count.
        architecture: of a segmentor; None for another network, of which the backbone is counted.
        backbone: None if it is not understood; then nothing is counted, nor of one that cannot
            be built, nor of networks with attention, of which convolutions are the smaller part.
        size: (height, width) of the image, in pixels.
    """
    queries = architecture is not None and isinstance(architecture.decode_head, QueryHeadConfig)
    if not isinstance(backbone, ResNetConfig) or queries:
        return {}
    network: nn.Module
    try:
        with torch.device("meta"):
            if architecture is None:
                network, prefix = build_backbone(backbone), backbone_prefix(state)
            else:
                changes = {"auxiliary_head": None}
                network, prefix = Segmentor(architecture.model_copy(update=changes)), ""
            image = torch.empty(1, backbone.in_channels, *size)
    except UnsupportedLayerError:
        return {}
    with FlopCounterMode(display=False) as counter:
        network.eval()(image)
    counts = {
        name.partition(".")[2]: flops[torch.ops.aten.convolution] // 2
        for name, flops in counter.get_flop_counts().items()
        if torch.ops.aten.convolution in flops
    }
    macs: Macs = {}
    for layer in layers:
        name = layer.name.removeprefix(prefix)
        if name in counts:
            added = {part: counts.get(f"{name}.{part}", 0) for part in FDCONV_PARTS[1:]}
            main = counts[name] - sum(added.values())
            macs[layer.name] = {"main": main} | (added if layer.dynamic else {})
    return macs


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


def macs_by_part(macs: Macs) -> dict[str, int]:
    """Multiply-adds of an image: of plain convolutions, of what FDConv adds, of the head."""
    totals = dict.fromkeys(("main", *FDCONV_PARTS[1:]), 0)
    for layer, counts in macs.items():
        for part, count in counts.items():
            place = "decode_head" if layer.startswith("decode_head.") else part
            totals[place] = totals.get(place, 0) + count
    return totals | {"total": sum(totals.values())}


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
