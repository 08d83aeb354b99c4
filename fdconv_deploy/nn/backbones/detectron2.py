"""Backbones of detectron2 and its projects, under the names that the backbones here have.

They compute the same: a frozen BatchNorm is one in evaluation, kept inside its convolution, and
Swin differs in the order of merged patches, `SwinTransformerConfig.merging`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_RENAMES = [
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


def from_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a backbone's tensors; a frozen BatchNorm gets the counter that others have.

    Args:
        state: a ResNet's or a Swin's, names without ``backbone.``, as ``res2.0.conv1.weight`` and
            ``layers.0.blocks.0.mlp.fc1.weight``.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in _RENAMES:
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
