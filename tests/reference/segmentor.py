"""mmsegmentation's test modes in PyTorch: logits at the size of the input."""

from __future__ import annotations

import torch
from torch import Tensor

from fdconv_deploy.config import TestMode
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.nn.heads import QueryHead, resize


@torch.no_grad()
def predict(network: Segmentor, x: Tensor, mode: TestMode | None = None) -> Tensor:
    """Logits ``(B, classes, H, W)`` by ``whole`` or ``slide``, the network's own mode if not given.

    Args:
        x: ``(B, C, H, W)`` float32, normalised.
    """
    mode = mode or network.architecture.test
    if mode.mode == "whole":
        return _whole(network, x)
    assert mode.crop_size is not None
    assert mode.stride is not None
    height, width = x.shape[-2:]
    crop, stride = mode.crop_size, mode.stride
    classes = network.architecture.decode_head.outputs
    total = x.new_zeros((x.shape[0], classes, height, width))
    count = x.new_zeros((1, 1, height, width))
    for top in _starts(height, crop[0], stride[0]):
        for left in _starts(width, crop[1], stride[1]):
            window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
            total[window] += _whole(network, x[window])
            count[window] += 1
    return total / count


def _whole(network: Segmentor, x: Tensor) -> Tensor:
    answer, head = network(x), network.decode_head
    if isinstance(head, QueryHead) and isinstance(answer, tuple):
        return head.semantic_scores(*answer[:2], x.shape[-2:])
    return resize(answer, x.shape[-2:], network.architecture.decode_head.align_corners)


def _starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin: the last one is moved back to fit."""
    windows = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - crop), 0) for i in range(windows)]
