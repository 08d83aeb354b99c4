"""Heads of Mask2Former's and MaskDINO's own repositories, under the names that heads have here.

The pixel decoder and Mask2Former's decoder get mmdetection's names; MaskDINO's decoder keeps its
own, of which the heads here have all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

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
