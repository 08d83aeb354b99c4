"""The convolution itself, with kernels made at run time."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from fdconv_deploy.export.layers.nodes import Nodes, geometry
from fdconv_deploy.export.layers.operators import Attention, write_row_scale
from fdconv_deploy.folding.layer import FoldedConv


def write_convolution(
    nodes: Nodes, layer: FoldedConv, x: gs.Tensor, kernel: gs.Tensor, attention: Attention
) -> gs.Variable:
    """``(B, I, H, W)`` and `write_assembly`'s kernels -> ``(B, O, H', W')``."""
    batch = nodes.images
    scale = write_row_scale(nodes, layer, attention) if layer.filter_side == "feature" else None
    bias = None
    if scale is None and layer.bias is not None:
        bias = nodes.constant("bias", np.tile(layer.bias, batch))
    if batch > 1:
        # One kernel per image: a convolution of as many groups as images.
        x = nodes.reshape("input", x, 1, batch * layer.in_channels, *layer.input_size)
    if layer.by_rows:
        y = _by_rows(nodes, layer, x, kernel, bias)
    else:
        inputs = [x, kernel] if bias is None else [x, kernel, bias]
        y = nodes("Conv", "convolution", *inputs, group=batch, **geometry(layer))
    if batch > 1:
        y = nodes.reshape("output", y, batch, layer.out_channels, *layer.output_size)
    if scale is not None:
        y = nodes("Mul", "output.scaled", y, scale)
        if layer.bias is not None:
            shift = nodes.constant("bias.map", layer.bias.reshape(1, -1, 1, 1))
            y = nodes("Add", "output.shifted", y, shift)
    return y


def _by_rows(
    nodes: Nodes, layer: FoldedConv, x: gs.Tensor, kernels: gs.Tensor, bias: gs.Tensor | None
) -> gs.Variable:
    """The sum of one convolution per kernel row, each seeing the rows of x that are its own.

    That takes kernels in the order in which they are made, (o, u, i, v); to bring them into
    (o, i, u, v) for a single convolution costs more than the convolution of small feature maps.
    """
    channels, (height, width) = layer.in_channels, layer.kernel_size
    parts = [kernels]
    if height > 1:
        sizes = nodes.shape(*[1] * height)
        parts = nodes.add("Split", "kernel.rows", kernels, sizes, outputs=height, axis=2)
    _, left, _, right = layer.padding
    total = None
    for row, kernel in enumerate(parts):
        first, last = rows_met(
            row, layer.padding[0], layer.stride[0], layer.dilation[0], layer.output_size[0]
        )
        begin, end = max(first, 0), min(last + 1, layer.input_size[0])
        if begin >= end:
            continue  # it meets nothing but padding
        name = f"row{row}"
        seen = x
        if (begin, end) != (0, layer.input_size[0]):
            seen = nodes(
                "Slice", f"{name}.input", x, nodes.shape(begin), nodes.shape(end), nodes.shape(2)
            )
        inputs = [
            seen,
            nodes.reshape(f"{name}.kernel", kernel, -1, channels, 1, width),
        ]
        if bias is not None and total is None:
            inputs.append(bias)
        part = nodes(
            "Conv",
            f"{name}.convolution",
            *inputs,
            group=nodes.images,
            kernel_shape=[1, width],
            strides=list(layer.stride),
            dilations=list(layer.dilation),
            pads=[max(-first, 0), left, max(last + 1 - layer.input_size[0], 0), right],
        )
        total = part if total is None else nodes("Add", f"{name}.sum", total, part)
    assert total is not None
    return total


def rows_met(row: int, top: int, stride: int, dilation: int, output_rows: int) -> tuple[int, int]:
    """The first and last row of the input that a kernel row meets, padding counted below zero."""
    first = row * dilation - top
    return first, first + stride * (output_rows - 1)


def write_product(
    nodes: Nodes, layer: FoldedConv, x: gs.Tensor, kernel: gs.Tensor, attention: Attention
) -> gs.Variable:
    """Tokens ``(B, L, I)`` and `write_assembly`'s kernels -> ``(B, L, O)``.

    Runtimes take a matrix that is turned just before its product as it lies in memory.
    """
    kernel = nodes.reshape("kernel", kernel, nodes.images, layer.out_channels, layer.in_channels)
    y = nodes("MatMul", "product", x, nodes("Transpose", "kernel.turned", kernel, perm=[0, 2, 1]))
    scale = write_row_scale(nodes, layer, attention) if layer.filter_side == "feature" else None
    if scale is not None:
        tokens = nodes.reshape("filter.tokens", scale, -1, 1, layer.out_channels)
        y = nodes("Mul", "output.scaled", y, tokens)
    if layer.bias is not None:
        y = nodes("Add", "output.shifted", y, nodes.constant("bias", layer.bias))
    return y


def write_constant_product(nodes: Nodes, layer: FoldedConv, x: gs.Tensor) -> gs.Variable:
    """A layer over tokens whose kernel does not depend on the image: a linear layer."""
    weight = layer.constant_weight
    assert weight is not None
    y = nodes("MatMul", "product", x, nodes.constant("weight", weight[:, :, 0, 0].T))
    if layer.bias is not None:
        y = nodes("Add", "output.shifted", y, nodes.constant("bias", layer.bias))
    return y


def write_constant_convolution(nodes: Nodes, layer: FoldedConv, x: gs.Tensor) -> gs.Variable:
    """A layer whose kernel does not depend on the image: a plain convolution."""
    weight = layer.constant_weight
    assert weight is not None
    if layer.output_scale is not None:
        weight = weight * layer.output_scale[:, None, None, None]
    inputs = [x, nodes.constant("weight", weight)]
    if layer.bias is not None:
        inputs.append(nodes.constant("bias", layer.bias))
    return nodes("Conv", "convolution", *inputs, **geometry(layer))
