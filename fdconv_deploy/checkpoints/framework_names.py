"""Tensors of a framework's network → the same under OpenMMLab's names, which networks here have."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fdconv_deploy.checkpoints.evidence import Framework
from fdconv_deploy.checkpoints.infer_layers import Shapes, as_published, part

_DETECTRON2 = re.compile(r"(?:backbone\.)?(?:stem\.conv1|res2\.0\.conv1|patch_embed\.proj)\.")
_HEAD = "sem_seg_head."
# Of mmdetection 2.x's Mask2Former, whose layers list attentions and feed-forward networks.
_OLDER = (
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
    (r"(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"(\.layers\.\d+)\.ffns\.0\.", r"\1.ffn."),
)


def framework_of(state: Shapes) -> Framework:
    """Whose names these are: detectron2's and its projects', or OpenMMLab's."""
    own = any(key.startswith(_HEAD) or _DETECTRON2.match(key) for key in state)
    return "detectron2" if own else "OpenMMLab"


def in_openmmlab_names(state: Shapes) -> dict[str, Tensor]:
    """A network's tensors under the names of OpenMMLab and of the published FDConv layer.

    Mask2Former's head is ``decode_head`` as in mmsegmentation, where mmdetection has
    ``panoptic_head``.
    """
    if framework_of(state) == "detectron2":
        prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
        backbone = backbone_from_detectron2(
            {k: v for k, v in part(state, prefix).items() if prefix or not k.startswith(_HEAD)}
        )
        head = head_from_detectron2(part(state, _HEAD))
        rest = {k: v for k, v in state.items() if prefix and not k.startswith((prefix, _HEAD))}
        named = (
            {f"{prefix}{k}": v for k, v in backbone.items()}
            | {f"decode_head.{k}": v for k, v in head.items()}
            | rest
        )
    elif any(key.startswith("panoptic_head.") for key in state):
        named = {
            f"decode_head.{key.removeprefix('panoptic_head.')}"
            if key.startswith("panoptic_head.")
            else key: value
            for key, value in state.items()
        }
        for pattern, replacement in _OLDER:
            named = {re.sub(pattern, replacement, key): value for key, value in named.items()}
    else:
        named = dict(state)
    return as_published(named)


_BACKBONE = [
    # ResNet: res2 is layer1, and a convolution holds its norm.
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.conv1\.", "conv1."),
    (r"^res(\d)\.(\d+)\.shortcut\.norm\.", r"layer\1.\2.downsample.1."),
    (r"^res(\d)\.(\d+)\.shortcut\.", r"layer\1.\2.downsample.0."),
    (r"^res(\d)\.(\d+)\.conv(\d)\.norm\.", r"layer\1.\2.bn\3."),
    (r"^res(\d)\.(\d+)\.conv(\d)\.", r"layer\1.\2.conv\3."),
    # Swin.
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^layers\.(\d+)\.(blocks\.\d+)\.attn\.", r"stages.\1.\2.attn.w_msa."),
    (r"^layers\.(\d+)\.(blocks\.\d+)\.mlp\.fc1\.", r"stages.\1.\2.ffn.layers.0.0."),
    (r"^layers\.(\d+)\.(blocks\.\d+)\.mlp\.fc2\.", r"stages.\1.\2.ffn.layers.1."),
    (r"^layers\.(\d+)\.(blocks\.\d+\.norm\d|downsample)\.", r"stages.\1.\2."),
]


def backbone_from_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a backbone's tensors; a frozen BatchNorm gets the counter that others have.

    They compute the same: a frozen BatchNorm is one in evaluation, kept inside its convolution, and
    Swin differs in the order of merged patches, `SwinTransformerConfig.merging`.

    Args:
        state: a ResNet's or a Swin's, names without ``backbone.``, as ``res2.0.conv1.weight`` and
            ``layers.0.blocks.0.mlp.fc1.weight``.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in _BACKBONE:
            name, count = re.subn(pattern, replacement, key)
            if count:
                if key.startswith("res"):
                    name = re.sub(r"^layer(\d)", lambda match: f"layer{int(match[1]) - 1}", name)
                break
        renamed[name] = value
    for name in list(renamed):
        norm, _, what = name.rpartition(".")
        if what == "running_var":
            counter = torch.zeros((), dtype=torch.int64, device=renamed[name].device)
            renamed.setdefault(f"{norm}.num_batches_tracked", counter)
    return renamed


_PIXEL_DECODER = [
    # Files from before the head had a version of its own leave the inner name out, or double it.
    (r"^pixel_decoder\.pixel_decoder\.", "pixel_decoder."),
    (r"^(input_proj|transformer|mask_features|adapter_1|layer_1)\b", r"pixel_decoder.\1"),
    (r"\binput_proj\.(\d+)\.0\.", r"input_convs.\1.conv."),
    (r"\binput_proj\.(\d+)\.1\.", r"input_convs.\1.gn."),
    (r"\btransformer\.level_embed$", "level_encoding.weight"),
    (r"\btransformer\.encoder\.", "encoder."),
    (r"\.norm1\.", ".norms.0."),
    (r"\.norm2\.", ".norms.1."),
    (r"\.linear1\.", ".ffn.layers.0.0."),
    (r"\.linear2\.", ".ffn.layers.1."),
    (r"\bmask_features\.", "mask_feature."),
    (r"\badapter_1\.norm\.", "lateral_convs.0.gn."),
    (r"\badapter_1\.", "lateral_convs.0.conv."),
    (r"\blayer_1\.norm\.", "output_convs.0.gn."),
    (r"\blayer_1\.", "output_convs.0.conv."),
]
_LAYER = r"transformer_decoder.layers.\1."
_MASK2FORMER = [
    (r"^transformer_cross_attention_layers\.(\d+)\.multihead_attn\.", _LAYER + "cross_attn.attn."),
    (r"^transformer_self_attention_layers\.(\d+)\.self_attn\.", _LAYER + "self_attn.attn."),
    (r"^transformer_cross_attention_layers\.(\d+)\.norm\.", _LAYER + "norms.0."),
    (r"^transformer_self_attention_layers\.(\d+)\.norm\.", _LAYER + "norms.1."),
    (r"^transformer_ffn_layers\.(\d+)\.norm\.", _LAYER + "norms.2."),
    (r"^transformer_ffn_layers\.(\d+)\.linear1\.", _LAYER + "ffn.layers.0.0."),
    (r"^transformer_ffn_layers\.(\d+)\.linear2\.", _LAYER + "ffn.layers.1."),
    (r"^decoder_norm\.", "transformer_decoder.post_norm."),
    (r"^class_embed\.", "cls_embed."),
    (r"^mask_embed\.layers\.0\.", "mask_embed.0."),
    (r"^mask_embed\.layers\.1\.", "mask_embed.2."),
    (r"^mask_embed\.layers\.2\.", "mask_embed.4."),
    (r"^static_query\.", "query_feat."),
]
_BOTH = [(r"^input_proj\.", "decoder_input_projs.")]


def head_from_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a head's tensors.

    The pixel decoder and Mask2Former's decoder get mmdetection's names; MaskDINO's decoder keeps
    its own, of which the heads here have all.

    Args:
        state: names without ``sem_seg_head.``, as ``pixel_decoder.input_proj.0.0.weight`` and
            ``predictor.query_feat.weight``; those of the pixel decoder may lack its name.
    """
    is_maskdino = any(key.startswith("predictor.decoder.layers.") for key in state)
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix("predictor.")
        if name == key:
            renames = _PIXEL_DECODER
        else:
            renames = _BOTH if is_maskdino else [*_MASK2FORMER, *_BOTH]
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed
