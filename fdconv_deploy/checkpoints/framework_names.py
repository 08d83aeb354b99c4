"""Tensors of a framework's network → the same under OpenMMLab's names, which networks here have."""

from __future__ import annotations

import re

from torch import Tensor

from fdconv_deploy.checkpoints.evidence import Framework
from fdconv_deploy.checkpoints.infer_layers import Shapes, as_published, part
from fdconv_deploy.nn.backbones.detectron2 import from_detectron2
from fdconv_deploy.nn.heads.detectron2 import head_from_detectron2

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
        backbone = from_detectron2(
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
