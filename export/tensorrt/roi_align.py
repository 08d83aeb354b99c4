"""RoiAlign in standard operators, for parsers of NVIDIA's that find no plugin for it.

TensorRT imports ONNX's RoiAlign as a plugin of its own, out of a library that may be missing; the
plugin asks for a GPU already when a graph is parsed. Without it a detector's RoiAlign nodes become
`fdconv::RoiAlignProducts`, whose function body is products of matrices. The mean over a grid of
bilinear samples is separable: each bin is a weighted sum over rows of a weighted sum over columns,
and a sample's weights are a hat function around it.

It means the same, in more memory: between the two products lies a tensor of
(regions, bins, channels, width) float32, 2.4 GB for 1,000 regions on a 200×336 map of 256 channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import FunctionProto, ModelProto, shape_inference

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.layers import Nodes, take_over
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.ops.function_body import FunctionBody

# NVIDIA's parser looks operators up by name alone, its own before a model's functions.
NAME = "RoiAlignProducts"
INPUTS = "features boxes scale bins fixed rows row_samples columns column_samples".split()


def _weights(f: FunctionBody, start: str, end: str, positions: str, samples: str) -> str:
    """How much each position of an axis counts in each bin of a region: ``(R, bins, length)``."""
    zero, one = (f("Constant", value_float=float(n)) for n in (0, 1))
    count = f("Add", f("ReduceMax", "bins", keepdims=0), one)
    size = f("Div", f("Sub", end, start), count)  # (R, 1)
    # As many samples as fit where the number is not fixed: 0 of an empty region.
    grid = f("Where", f("Greater", "fixed", zero), f("Add", f("Mul", size, zero), "fixed"),
             f("Ceil", size))  # fmt: skip
    divisor = f("Max", grid, one)
    begin = f("Add", start, f("Mul", size, "bins"))  # (R, bins)
    share = f("Div", f("Add", samples, f("Constant", value_float=0.5)), divisor)  # (R, samples)
    at = f("Add", f("Unsqueeze", begin, f.constant([2])),
           f("Unsqueeze", f("Mul", share, size), f.constant([1])))  # fmt: skip
    last = f("ReduceMax", positions, keepdims=0)
    # A sample more than one position outside the map is 0, a nearer one is the border's.
    inside = f("And", f("GreaterOrEqual", at, f("Neg", one)),
               f("LessOrEqual", at, f("Add", last, one)))  # fmt: skip
    taken = f("Unsqueeze", f("Less", samples, grid), f.constant([1]))
    counts = f("Cast", f("And", inside, taken), to=1)
    at = f("Min", f("Max", at, zero), last)
    distance = f("Abs", f("Sub", f("Unsqueeze", at, f.constant([3])), positions))
    hat = f("Max", f("Sub", one, distance), zero)  # (R, bins, samples, length)
    weighted = f("Mul", hat, f("Unsqueeze", counts, f.constant([3])))
    total = f("ReduceSum", weighted, f.constant([2]), keepdims=0)
    return f("Div", total, f("Unsqueeze", divisor, f.constant([2])))


def roi_align_function() -> FunctionProto:
    """Regions ``(R, C, bins, bins)`` of ``features (B, C, H, W)``, R/B of each image in turn.

    Beside ``boxes (R, 4)``: scale ``(1,)``; bins, rows, columns and the samples of either axis:
    ``0, 1, 2, …`` float32, as many as there are at most; fixed ``(1,)``: how many samples a bin has
    in each direction, or 0 for as many as its size rounded up.
    """
    f = FunctionBody(NAME, INPUTS)
    edges = f("Sub", f("Mul", "boxes", "scale"), f("Constant", value_float=0.5))
    left, top, right, bottom = (
        f("Slice", edges, f.constant([n]), f.constant([n + 1]), f.constant([1])) for n in range(4)
    )
    vertical = f.reshape(_weights(f, top, bottom, "rows", "row_samples"), "rows_shape")
    lines = f.reshape(f("Transpose", "features", perm=[0, 2, 1, 3]), "lines_shape")
    sums = f.reshape(f("MatMul", vertical, lines), "sums_shape")  # (R, bins·C, W)
    horizontal = _weights(f, left, right, "columns", "column_samples")
    regions = f("MatMul", sums, f("Transpose", horizontal, perm=[0, 2, 1]))
    regions = f("Transpose", f.reshape(regions, "regions_shape"), perm=[0, 2, 1, 3])
    return f.finish(regions, "RoiAlign of half pixels and averages, as products of matrices.")


def without_roi_align(model: ModelProto) -> ModelProto:
    """The model with `fdconv::RoiAlignProducts` for ONNX's RoiAlign; ``model`` is not changed.

    Raises:
        ExportError: a RoiAlign is of a kind that no export of this package holds.
    """
    # A plugin variant says no shapes of its values.
    graph = gs.import_onnx(shape_inference.infer_shapes(model))
    nodes = Nodes(graph, graph.inputs[0].shape[0])
    for node in [n for n in graph.nodes if n.op == "RoiAlign" and not n.domain]:
        nodes.begin(node.name)
        _replace(nodes, node)
    return nodes.model(model.functions)


def _replace(nodes: Nodes, node: gs.Node) -> None:
    features, boxes, images = node.inputs
    given: dict[str, Any] = {"mode": "avg", "sampling_ratio": 0, **node.attrs}
    (output,) = node.outputs
    bins = int(given["output_height"])
    batch, channels, height, width = features.shape or (0,) * 4
    order = np.zeros(0)
    if batch and isinstance(images, gs.Constant):
        regions = len(images.values)
        order = np.repeat(np.arange(batch), regions // batch)
    if (
        given.get("coordinate_transformation_mode", "half_pixel") != "half_pixel"
        or given["mode"] != "avg"
        or given["output_width"] != bins
        or not len(order)
        or not np.array_equal(images.values, order)
    ):
        raise ExportError(
            f"the graph's RoiAlign {node.name!r} is not as this package writes it. Export the "
            "bundle again."
        )
    ratio = int(given["sampling_ratio"])

    def upto(name: str, count: int) -> gs.Constant:
        return nodes.constant(f"{name}{count}", np.arange(count, dtype=np.float32))

    def number(name: str, value: float) -> gs.Constant:
        return nodes.constant(name, np.array([value], np.float32))

    # No region is larger than the map; a box's edge lies half a position outside it at most.
    samples = [ratio or -(-(length + 1) // bins) for length in (height, width)]
    nodes.functions[NAME] = roi_align_function()
    result = nodes(
        NAME, "regions", features, boxes,
        number("scale", float(given.get("spatial_scale", 1.0))), upto("bins", bins),
        number("samples", ratio),
        upto("positions", height), upto("samples", samples[0]),
        upto("positions", width), upto("samples", samples[1]),
        domain=DOMAIN,
        rows_shape=[batch, regions // batch * bins, height],
        lines_shape=[batch, height, channels * width],
        sums_shape=[regions, bins * channels, width],
        regions_shape=[regions, bins, channels, bins],
    )  # fmt: skip
    take_over(output, result)
