"""PyTorch network -> ONNX graph in which each FDConv layer is one placeholder node.

torch's exporter never sees a layer's inside: its time grows with every node, and the folded
layers are written directly (`fdconv_deploy.export.layers`) instead. Nor does it see loops over
boxes or shapes that depend on values: such modules of detectors become opaque operators as well,
and are translated to a few nodes of ONNX here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxscript
import torch
from numpy.typing import NDArray
from onnxscript import opset18
from torch import Tensor, nn

from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.network import (
    Example,
    StandIn,
    layer_stand_in,
    opaque,
    replace_layers,
    tensors_of,
)
from fdconv_deploy.nn.detection.box_ops import EXCLUDED, BestScores, NonMaxSuppression, RoIAlign
from fdconv_deploy.ops import OPSET

PLACEHOLDER_DOMAIN = "fdconv.export"
PLACEHOLDER = "FoldedLayer"
# onnxscript's own annotations do not know what an exporter's values are.
op: Any = opset18
_placeholders = onnxscript.values.Opset(PLACEHOLDER_DOMAIN, 1)


@opaque
def _roi_align(
    features: Tensor, boxes: Tensor, images: Tensor, size: int, scale: float, ratio: int
) -> Tensor:
    return features.new_zeros(boxes.shape[0], features.shape[1], size, size)


@opaque
def _suppress(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool)


@opaque
def _best_scores(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], count)
    return scores.new_zeros(shape), torch.zeros(shape, dtype=torch.int64, device=scores.device)


def _translate_folded_layer(x: Any, layer: str, shape: Sequence[int]) -> Any:
    return _placeholders.FoldedLayer(x, layer=layer, shape=list(shape))


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
    torch.ops.fdconv_deploy.folded_layer.default: _translate_folded_layer,
    torch.ops.fdconv_deploy.roi_align.default: _translate_roi_align,
    torch.ops.fdconv_deploy.suppress.default: _translate_suppress,
    torch.ops.fdconv_deploy.best_scores.default: _translate_best_scores,
}


def _stand_in(module: nn.Module) -> nn.Module | None:
    """For a module that torch's exporter should not see the inside of, else None."""
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return FoldedAdaptivePool(module)
    if isinstance(module, RoIAlign):
        settings = module.output_size, module.spatial_scale, module.sampling_ratio

        def align(features: Tensor, boxes: Tensor) -> Tensor:
            images, count = boxes.shape[:2]
            image = torch.tensor([i for i in range(images) for _ in range(count)])
            return _roi_align(features, boxes.reshape(-1, 4), image, *settings)

        return StandIn(align)
    if isinstance(module, NonMaxSuppression):
        threshold, limit = module.iou_threshold, module.limit
        return StandIn(lambda boxes, scores: _suppress(boxes, scores, threshold, limit))
    if isinstance(module, BestScores):
        count = module.count
        return StandIn(lambda scores: _best_scores(scores, min(count, scores.shape[1])))
    return None


def _register_schema() -> None:
    if onnx.defs.has(PLACEHOLDER, PLACEHOLDER_DOMAIN):
        return
    schema = onnx.defs.OpSchema
    onnx.defs.register_schema(
        schema(
            PLACEHOLDER,
            PLACEHOLDER_DOMAIN,
            1,
            inputs=[schema.FormalParameter("x", "T")],
            outputs=[schema.FormalParameter("y", "T")],
            type_constraints=[("T", ["tensor(float)"], "features")],
            attributes=[
                schema.Attribute("layer", schema.AttrType.STRING, "name of the layer"),
                schema.Attribute("shape", schema.AttrType.INTS, "of the output, batch excluded"),
            ],
        )
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's chatter; its errors still reach the caller."""
    levels = {log: log.level for log in map(logging.getLogger, ("torch.onnx", "onnxscript"))}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in levels:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def capture(
    network: nn.Module,
    example: Example,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> onnx.ModelProto:
    """Export a network with a placeholder for each of its dynamic layers.

    Args:
        network: in eval mode; not changed.
        example: one input or several; their shapes, batch size included, are the graph's.

    Raises:
        ExportError: torch's exporter does not take the rest of the network.
    """
    stripped = replace_layers(network, layer_stand_in)
    for name, module in list(stripped.named_modules()):
        replacement = _stand_in(module)
        if replacement is not None:
            parent, _, child = name.rpartition(".")
            setattr(stripped.get_submodule(parent), child, replacement)
    stripped.eval()
    _register_schema()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                stripped,
                tensors_of(example),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(input_names),
                output_names=list(output_names),
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except Exception as error:
        # The exporter wraps what went wrong; the innermost error says it best.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().splitlines()
        raise ExportError(
            "torch's ONNX exporter does not take this network (the FDConv layers were left out "
            f"of it, so the reason lies elsewhere): {reason[0] if reason else type(cause).__name__}"
        ) from error
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:  # source paths and line numbers of this machine
        del node.metadata_props[:]
    return model


def pooling_matrix(length: int, bins: int) -> NDArray[np.float64]:
    """Row i averages the inputs from floor(i·length/bins) to ceil((i+1)·length/bins).

    Returns:
        ``(bins, length)`` float64, each row's sum 1.
    """
    matrix = np.zeros((bins, length))
    for i in range(bins):
        start, stop = i * length // bins, -(-(i + 1) * length // bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


class FoldedAdaptivePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` for inputs of whatever size it is traced at."""

    def __init__(self, pool: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        size = pool.output_size
        self.output_size = (size, size) if isinstance(size, int) or size is None else size

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` float -> ``(B, C, h, w)``."""
        height, width = x.shape[-2:]
        rows, columns = self.output_size
        rows, columns = rows or height, columns or width
        if width % columns == 0:
            x = x.unflatten(-1, (columns, width // columns)).mean(-1)
        else:
            x = x @ torch.from_numpy(pooling_matrix(width, columns).T).to(x)
        if height % rows == 0:
            return x.unflatten(-2, (rows, height // rows)).mean(-2)
        return torch.from_numpy(pooling_matrix(height, rows)).to(x) @ x
