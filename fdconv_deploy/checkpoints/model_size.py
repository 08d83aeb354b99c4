"""How much there is in a checkpoint: parameters, bytes and multiply-adds, by part and by layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fdconv_deploy.checkpoints import multiply_adds as costs
from fdconv_deploy.checkpoints.infer_layers import (
    Layer,
    Shapes,
    backbone_prefix,
    kind_of,
    parameters,
)
from fdconv_deploy.config import BackboneConfig, SegmentorConfig

FDCONV_PARTS = ("dft_weight", "KSM_Global", "KSM_Local", "FBM")

Sizes = dict[str, tuple[costs.Size, costs.Size]]


def layer_sizes(
    state: Shapes,
    architecture: SegmentorConfig | None,
    backbone: BackboneConfig | None,
    size: costs.Size,
) -> Sizes:
    """Input and output size of every layer that runs at inference and is understood."""
    if backbone is None:
        return {}
    prefix = backbone_prefix(state)
    sizes = {f"{prefix}{k}": v for k, v in costs.backbone_sizes(backbone, size).items()}
    if architecture is not None:
        features = costs.stage_sizes(backbone, size)
        for name, out in costs.head_sizes(architecture.decode_head, features):
            sizes[f"decode_head.{name}"] = (out, out)
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
    """A layer's multiply-adds by what they are for; its size is known."""
    into, out = sizes[layer.name]
    macs = {"main": costs.main_macs(layer, out)}
    if layer.dynamic:
        local = state.get(f"{layer.name}.KSM_Local.conv.weight")
        macs |= costs.attention_macs(layer, 0 if local is None else local.shape[-1])
        macs["FBM"] = costs.band_macs(layer, into)
    return macs


def spectrum_bytes(layer: Layer, ratio: int) -> int:
    """Of a layer's spectra, float32; 0 of a plain one.

    :param ratio: param_ratio where the layer does not tell its own.
    """
    return (layer.ratio or ratio) * layer.kept_bins * 2 * 4 if layer.dynamic else 0


def _index_bytes(layer: Layer, ratio: int) -> int:
    """Row and column of every bin, int64 each, as the published layer keeps them."""
    return (layer.ratio or ratio) * layer.kept_bins * 2 * 8 if layer.dynamic else 0


def published_buffer_bytes(
    layers: Sequence[Layer], backbone: BackboneConfig | None, ratio: int
) -> int:
    """What the published code holds beside the weights: the order of bins, and band masks."""
    return _mask_bytes(layers, backbone) + sum(_index_bytes(layer, ratio) for layer in layers)


def _mask_bytes(layers: Sequence[Layer], backbone: BackboneConfig | None) -> int:
    """One boolean half-spectrum mask per band, in every layer that modulates bands."""
    if backbone is None or backbone.conv is None:
        return 0
    bands = backbone.conv.fbm_cfg
    height, width = bands.max_size
    mask = len(bands.k_list) * height * (width // 2 + 1)
    return mask * sum(1 for layer in layers if layer.bands)
