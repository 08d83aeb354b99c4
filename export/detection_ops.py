"""Modules that are one node or a few of ONNX, and what torch's exporter makes of them.

While a network is captured, each is replaced by a stand-in that calls an opaque operator,
so that the exporter sees neither loops over boxes nor shapes that depend on values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset18
from torch import Tensor, nn

from fdconv_deploy.folding.pooling import FoldedAdaptivePool
from fdconv_deploy.nn.detection.box_ops import EXCLUDED, BestScores, NonMaxSuppression
from fdconv_deploy.nn.detection.roi_pooling import RoIAlign

# onnxscript's own annotations do not know what an exporter's values are.
op: Any = opset18


@torch.library.custom_op("fdconv_deploy::roi_align", mutates_args=())
def _roi_align(
    features: Tensor, boxes: Tensor, images: Tensor, size: int, scale: float, ratio: int
) -> Tensor:
    return features.new_zeros(boxes.shape[0], features.shape[1], size, size)


@_roi_align.register_fake
def _(
    features: Tensor, boxes: Tensor, images: Tensor, size: int, scale: float, ratio: int
) -> Tensor:
    return features.new_empty(boxes.shape[0], features.shape[1], size, size)


@torch.library.custom_op("fdconv_deploy::suppress", mutates_args=())
def _suppress(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool)


@_suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@torch.library.custom_op("fdconv_deploy::best_scores", mutates_args=())
def _best_scores(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], count)
    return scores.new_zeros(shape), torch.zeros(shape, dtype=torch.int64, device=scores.device)


@_best_scores.register_fake
def _(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], count)
    return scores.new_empty(shape), torch.empty(shape, dtype=torch.int64, device=scores.device)


def _translate_roi_align(
    features: Any, boxes: Any, images: Any, size: int, scale: float, ratio: int
) -> Any:
    # half_pixel is what detection libraries call aligned.
    return op.RoiAlign(
        features,
        boxes,
        images,
        coordinate_transformation_mode="half_pixel",
        mode="avg",
        output_height=size,
        output_width=size,
        sampling_ratio=ratio,
        spatial_scale=scale,
    )


def _constant(value: float, data_type: int) -> Any:
    return op.Constant(value=onnx.helper.make_tensor("value", data_type, [1], [value]))


def _translate_suppress(boxes: Any, scores: Any, iou_threshold: float, limit: int) -> Any:
    # How many are kept depends on the values, and their order is the runtime's: marks in a
    # tensor as long as the scores make that a static shape again, and no order matters.
    selected = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, op.Constant(value_ints=[1])),
        _constant(limit, onnx.TensorProto.INT64),
        _constant(iou_threshold, onnx.TensorProto.FLOAT),
        # Scores proper are probabilities, which may be 0.
        _constant(EXCLUDED / 2, onnx.TensorProto.FLOAT),
    )
    places = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)  # (K, 2): image, box
    of_class_zero = op.Equal(
        op.Gather(selected, op.Constant(value_int=1), axis=1), op.Constant(value_int=0)
    )
    marks = op.ScatterND(
        op.Mul(scores, op.Constant(value_float=0.0)),
        places,
        op.Cast(of_class_zero, to=onnx.TensorProto.FLOAT),
    )
    return op.Greater(marks, op.Constant(value_float=0.5))


def _translate_best_scores(scores: Any, count: int) -> Any:
    return op.TopK(scores, _constant(count, onnx.TensorProto.INT64), axis=1, largest=1, sorted=1)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.fdconv_deploy.roi_align.default: _translate_roi_align,
    torch.ops.fdconv_deploy.suppress.default: _translate_suppress,
    torch.ops.fdconv_deploy.best_scores.default: _translate_best_scores,
}


class _RoIAlign(nn.Module):
    def __init__(self, module: RoIAlign) -> None:
        super().__init__()
        self.size, self.scale = module.output_size, module.spatial_scale
        self.ratio = module.sampling_ratio

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        images, count = boxes.shape[:2]
        image = torch.tensor([i for i in range(images) for _ in range(count)])
        flat = boxes.reshape(-1, 4)
        return _roi_align(features, flat, image, self.size, self.scale, self.ratio)


class _NonMaxSuppression(nn.Module):
    def __init__(self, module: NonMaxSuppression) -> None:
        super().__init__()
        self.iou_threshold, self.limit = module.iou_threshold, module.limit

    def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
        return _suppress(boxes, scores, self.iou_threshold, self.limit)


class _BestScores(nn.Module):
    def __init__(self, module: BestScores) -> None:
        super().__init__()
        self.count = module.count

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return _best_scores(scores, min(self.count, scores.shape[1]))


def stand_in(module: nn.Module) -> nn.Module | None:
    """What takes a module's place while its network is captured, or None."""
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return FoldedAdaptivePool(module)
    if isinstance(module, RoIAlign):
        return _RoIAlign(module)
    if isinstance(module, NonMaxSuppression):
        return _NonMaxSuppression(module)
    return _BestScores(module) if isinstance(module, BestScores) else None
