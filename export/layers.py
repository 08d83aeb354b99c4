"""Folded layers, written straight into the graph: no exporter ever sees their inside.

Frequency assembly and band modulation become single nodes of the ``fdconv`` domain, whose
function bodies go into the model; the rest is a handful of standard nodes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import FunctionProto, ModelProto, helper

from fdconv_deploy.folding.bands import FoldedBands
from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.folding.modulation import HiddenNorm
from fdconv_deploy.ops import DOMAIN, DOMAIN_VERSION
from fdconv_deploy.ops.frequency_assembly.function import (
    AssemblyForm,
    assembly_function,
    group_blocks,
)
from fdconv_deploy.ops.frequency_assembly.launch import gate_offsets
from fdconv_deploy.ops.frequency_band_modulation.function import BandForm, band_function
from fdconv_deploy.ops.function_body import functions_checked
from fdconv_deploy.version import __version__

Attention = dict[str, gs.Variable]
# The end of a slice that keeps everything: runtimes know it and drop the slice.
EVERYTHING = np.iinfo(np.int64).max
# Of the ONNX file format: 8 brought functions, 10 is what torch's exporter writes.
IR_VERSION = 10


class Nodes:
    """Adds nodes under a layer's name; equal constants are shared by all layers.

    ``batch``: the graph's batch size. ``images``: how many the layer sees, each of which gets
    kernels of its own. ``functions``: the ONNX function bodies that the nodes written so far call,
    by name. ``splits``: the reshapes that part a batch's images behind a convolution of all.
    ``layer``: the prefix of the names of what is added.
    """

    def __init__(self, graph: gs.Graph, batch: int) -> None:
        self.graph, self.batch, self.images = graph, batch, batch
        self.functions: dict[str, FunctionProto] = {}
        self.splits: list[gs.Node] = []
        self._constants: dict[str, gs.Constant] = {}
        self._uses: Counter[str] = Counter()
        self.layer = ""

    def begin(self, layer: str, images: int | None = None) -> None:
        """Name what follows after a layer, which may be used more than once."""
        self.images = self.batch if images is None else images
        # A network may be nothing but a layer.
        self.layer = layer or "layer"
        self._uses[self.layer] += 1
        if self._uses[self.layer] > 1:
            self.layer += f".use{self._uses[self.layer]}"

    def constant(self, name: str, values: NDArray[Any]) -> gs.Constant:
        """A constant; layers with equal values share the first one's."""
        values = np.ascontiguousarray(values)
        content = hashlib.sha256(values.tobytes())
        content.update(repr((values.shape, values.dtype.str)).encode())
        key = content.hexdigest()
        if key not in self._constants:
            self._constants[key] = gs.Constant(f"{self.layer}.{name}", values)
        return self._constants[key]

    def shape(self, *sizes: int) -> gs.Constant:
        """A list of integers."""
        return self.constant("shape_" + "x".join(map(str, sizes)), np.array(sizes, np.int64))

    def add(
        self, op: str, name: str, *inputs: gs.Tensor, outputs: int = 1, **attributes: Any
    ) -> list[gs.Variable]:
        """A node; its outputs."""
        domain = attributes.pop("domain", None)
        names = [f"{self.layer}.{name}" + (f".{i}" if i else "") for i in range(outputs)]
        results = [gs.Variable(n, dtype=np.float32) for n in names]
        node = gs.Node(op, f"{self.layer}.{name}", attributes, list(inputs), results, domain=domain)
        self.graph.nodes.append(node)
        return results

    def __call__(self, op: str, name: str, *inputs: gs.Tensor, **attributes: Any) -> gs.Variable:
        """A node of one output; the output."""
        return self.add(op, name, *inputs, **attributes)[0]

    def reshape(self, name: str, x: gs.Tensor, *sizes: int) -> gs.Variable:
        """``x`` in another shape."""
        return self("Reshape", name, x, self.shape(*sizes))

    def model(self, functions: Iterable[FunctionProto] = ()) -> ModelProto:
        """The graph as a model, without what nothing reads; ``functions`` are kept beside ours."""
        self.graph.functions.clear()
        self.graph.cleanup().toposort()
        model = gs.export_onnx(self.graph)
        model.functions.extend([*functions, *functions_checked(list(self.functions.values()))])
        del model.opset_import[:]
        model.opset_import.append(helper.make_opsetid("", self.graph.opset))
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
        model.ir_version = IR_VERSION
        model.producer_name, model.producer_version = "fdconv-deploy", __version__
        return model


def take_over(old: gs.Variable, new: gs.Variable) -> None:
    """Let ``new``'s producer produce ``old``, with its name, shape and readers."""
    for node in list(old.inputs):
        node.outputs.clear()
        node.inputs.clear()
    producer = new.inputs[0]
    producer.outputs[producer.outputs.index(new)] = old


def producer_of(tensor: gs.Tensor) -> gs.Node | None:
    """The node that gives a tensor, if one does."""
    return tensor.inputs[0] if tensor.inputs else None


def _geometry(layer: FoldedConv) -> dict[str, Any]:
    return {
        "kernel_shape": list(layer.kernel_size),
        "strides": list(layer.stride),
        "pads": list(layer.padding),
        "dilations": list(layer.dilation),
    }


def write_layer(nodes: Nodes, layer: FoldedConv, x: gs.Tensor) -> gs.Variable:
    """Append a folded layer's nodes to a graph.

    Args:
        nodes: the graph's; layers written through one share equal constants.
        x: ``(images, I, H, W)`` float32, of a layer over tokens ``(images, L, I)``. Mostly there
            are as many as the graph's batch.

    Returns:
        ``(images, O, H', W')`` float32, or ``(images, L, O)``.
    """
    nodes.begin(layer.name, None if x.shape is None else int(x.shape[0]))
    # ONNX Runtime takes twice as long for GlobalAveragePool (benchmarks/primitives.py).
    positions = nodes.shape(1) if layer.tokens else nodes.shape(2, 3)
    average = nodes("ReduceMean", "average", x, positions, keepdims=0)
    if layer.bands is not None:
        x = _write_bands(nodes, layer.bands, x)
    if layer.constant_weight is not None:
        return _write_constant(nodes, layer, x)
    attention = _write_attention(nodes, layer, average)
    kernel = _write_assembly(nodes, layer, average, attention)
    if layer.modulation.channel and layer.channel_side == "feature":
        shape = (1, layer.in_channels) if layer.tokens else (layer.in_channels, 1, 1)
        scale = nodes.reshape("channel.map", attention["channel"], nodes.images, *shape)
        x = nodes("Mul", "channel.scaled", x, scale)
    write = _write_product if layer.tokens else _write_convolution
    return write(nodes, layer, x, kernel, attention)


def _write_attention(nodes: Nodes, layer: FoldedConv, average: gs.Tensor) -> Attention:
    """``(B, I)`` averages -> kernel, filter, spatial and channel attention, ``(B, n)`` each."""
    folded = layer.modulation

    def gemm(name: str, x: gs.Tensor, weight: NDArray[Any], bias: NDArray[Any]) -> gs.Variable:
        constants = nodes.constant(f"{name}.weight", weight), nodes.constant(f"{name}.bias", bias)
        return nodes("Gemm", name, x, *constants, transB=1)

    hidden = gemm("hidden", average, folded.hidden, folded.hidden_bias)
    if folded.norm is not None:
        hidden = _write_norm(nodes, hidden, folded.norm)
    hidden = nodes("Relu", "hidden.relu", hidden)
    if folded.squared:
        hidden = nodes("Mul", "hidden.squared", hidden, hidden)
    logits = gemm("heads", hidden, folded.heads, folded.head_bias)
    heads = "kernel", "filter", "spatial", "channel"
    present = {name: size for name in heads if (size := getattr(folded, name))}
    if len(present) == 1:
        how: dict[str, Any] = {"axis": 1} if folded.softmax else {}
        operator = "Softmax" if folded.softmax else "Sigmoid"
        attention = nodes(operator, "kernel.attention", logits, **how)
        attention.shape = [nodes.images, folded.kernel]
        return {"kernel": attention}
    lengths = nodes.constant("heads.sizes", np.array(list(present.values()), np.int64))

    def split(name: str, x: gs.Tensor) -> list[gs.Variable]:
        return nodes.add("Split", name, x, lengths, outputs=len(present), axis=1)

    if folded.softmax:
        # Side by side again: who assembles kernels by itself reads the matrix of all gates.
        parts = zip(present, split("logits", logits), strict=True)
        softened = [nodes("Softmax", f"{name}.gate", x, axis=1) for name, x in parts]
        gates = nodes("Concat", "gates", *softened, axis=1)
    else:
        gates = nodes("Sigmoid", "gates", logits)
    gates.shape = [nodes.images, len(folded.heads)]
    return dict(zip(present, split("attention", gates), strict=True))


def _layer_norm(
    nodes: Nodes, name: str, x: gs.Tensor, stem: str, weight: Any, bias: Any, epsilon: float
) -> gs.Variable:
    constants = nodes.constant(f"{stem}.weight", weight), nodes.constant(f"{stem}.bias", bias)
    return nodes("LayerNormalization", name, x, *constants, axis=-1, epsilon=float(epsilon))


def _write_norm(nodes: Nodes, x: gs.Tensor, norm: HiddenNorm) -> gs.Variable:
    """Features over their deviation; without bias over the root of their mean square."""
    stem, name = "hidden.norm", "hidden.normalised"
    if norm.bias is not None:
        return _layer_norm(nodes, name, x, stem, norm.weight, norm.bias, norm.epsilon)
    # In operators that opset 18 has.
    squared = nodes("Mul", "hidden.power", x, x)
    mean = nodes("ReduceMean", "hidden.mean_square", squared, nodes.shape(1), keepdims=1)
    epsilon = nodes.constant(f"{stem}.epsilon", np.array([norm.epsilon], np.float32))
    root = nodes("Sqrt", "hidden.root", nodes("Add", "hidden.mean", mean, epsilon))
    weight = nodes.constant(f"{stem}.weight", norm.weight)
    return nodes("Mul", name, nodes("Div", "hidden.scaled", x, root), weight)


def _write_row_scale(nodes: Nodes, layer: FoldedConv, attention: Attention) -> gs.Tensor | None:
    """Filter attention times a following BatchNorm's scale, ``(B or 1, O, 1, 1)``."""
    scale = layer.output_scale
    constant = None
    if scale is not None:
        constant = nodes.constant("output_scale", scale.reshape(1, -1, 1, 1))
    if not layer.modulation.filter:
        return constant
    gate = nodes.reshape("filter.map", attention["filter"], nodes.images, layer.out_channels, 1, 1)
    return gate if constant is None else nodes("Mul", "filter.scaled", gate, constant)


def _write_column_scale(nodes: Nodes, layer: FoldedConv, attention: Attention) -> gs.Tensor | None:
    """Spatial and channel attention along the kernel matrix, ``(B, 1, kh or 1, C)``."""
    height, width = layer.kernel_size
    batch, channels, rows = nodes.images, layer.in_channels, 1
    if not (layer.modulation.channel and layer.channel_side == "kernel"):
        # Without channel attention there is no spatial one either.
        assert not layer.modulation.spatial
        return None
    gate = nodes.reshape("channel.column", attention["channel"], batch, 1, channels, 1)
    if layer.modulation.spatial:
        spatial = nodes.reshape("spatial.column", attention["spatial"], batch, height, 1, width)
        gate, rows = nodes("Mul", "columns.gate", gate, spatial), height
    elif width > 1:  # the same for every kernel column of a channel
        ones = nodes.constant("columns.ones", np.ones((1, 1, 1, width), np.float32))
        gate = nodes("Mul", "columns.gate", gate, ones)
    return nodes.reshape("columns.scale", gate, batch, 1, rows, channels * width)


def _write_assembly(
    nodes: Nodes, layer: FoldedConv, average: gs.Tensor, attention: Attention
) -> gs.Variable:
    """The layer's kernels, ``(B·O, I, kh, kw)``, or ``(B, O, kh, I·kw)`` if used by rows.

    Args:
        average: ``(B, I)``, of the layer's input.
    """
    spectrum, local = layer.spectrum, layer.local
    assert spectrum is not None
    columns, rows = spectrum.column_transform, spectrum.row_transform
    classes, slots = rows.classes, rows.slots.size
    (height, width), length = layer.kernel_size, spectrum.columns
    planes = spectrum.values.shape[0]
    scales = (
        _write_column_scale(nodes, layer, attention),
        _write_row_scale(nodes, layer, attention) if layer.filter_side == "kernel" else None,
    )
    form = AssemblyForm(
        stages=(len(columns.stages), len(rows.stages) + 1),
        planes=planes > 1,
        local=local is not None,
        column_scale=scales[0] is not None,
        row_scale=scales[1] is not None,
        spatial_kernel=height > 1,
        by_rows=layer.by_rows,
    )
    lead = (planes,) if planes > 1 else ()
    blocks = group_blocks(spectrum.groups)
    last = columns.factors[-1] * slots  # bins that lie side by side
    inputs: list[gs.Tensor] = [
        attention["kernel"],
        nodes.constant("spectrum", spectrum.values.reshape(*lead, columns.leading, 2, last)),
        nodes.constant("group.patterns", blocks.patterns),
        nodes.constant("group.blocks", blocks.blocks),
    ]
    attributes: dict[str, Any] = {
        "layer": nodes.layer,
        "out_channels": layer.out_channels,
        "in_channels": layer.in_channels,
        "kernel_size": list(layer.kernel_size),
        "by_rows": int(layer.by_rows),
        "taps": 0 if local is None else local.taps,
        "row_frequencies": rows.slots.reshape(-1).tolist(),
        "column_frequencies": columns.frequencies.tolist(),
        **gate_offsets(layer),
        "weights_shape": [0, *lead, columns.leading, 1, last],
        "columns_shape": [0, 2 * length, slots],
        "row_outer_shape": [0, 2 * classes, spectrum.rows // rows.factors[0] * length],
        "matrix_shape": [0, spectrum.rows, length],
        "kernel_shape": [-1, layer.in_channels, height, width],
    }
    stages = [("column", length, i, stage) for i, stage in enumerate(columns.stages)]
    stages += [("row", spectrum.rows, i, stage) for i, stage in enumerate(rows.stages)]
    for axis, size, i, stage in stages:
        # A plain matrix where there is one: runtimes take the longest of all products for it.
        plain = axis == "column" and len(stage) == 1
        matrix = (stage[0] if plain else stage).astype(np.float32)
        inputs.append(nodes.constant(f"{axis}s{size}.stage{i}", matrix))
        rest = 2 * length * slots // (len(stage) * stage.shape[2])
        batch = [] if plain else [len(stage)]
        attributes[f"{axis}_stage{i}_shape"] = [0, *batch, stage.shape[2], rest]
    inputs.append(nodes.constant(f"rows{spectrum.rows}.outer", rows.outer.astype(np.float32)))
    if local is not None:
        inputs += _local_inputs(nodes, layer, average)
        # How far windows of the spread average start before a channel's first column.
        before = width - 1 + width * (local.taps // 2)
        attributes |= {
            "local_spread": [0, 0, 0, 0, 0, width - 1],
            "local_shape": [0, 1, length],
            "local_pads": [0, 0, before, 0, 0, width * local.taps - 1 - before],
        }
    inputs += [scale for scale in scales if scale is not None]
    if form.column_scale or form.row_scale:
        attributes["scaled_shape"] = [0, layer.out_channels, height, length]
    if form.by_rows:
        attributes |= _geometry(layer) | {"input_size": list(layer.input_size)}
        attributes["kernel_shape"] = [0, layer.out_channels, height, length]
    elif form.spatial_kernel:
        shape = [0, layer.out_channels, height, layer.in_channels, width]
        attributes["interleaved_shape"] = shape
    nodes.functions.setdefault(form.name, assembly_function(form))
    return nodes(form.name, "assembly", *inputs, domain=DOMAIN, **attributes)


def _local_inputs(nodes: Nodes, layer: FoldedConv, average: gs.Tensor) -> list[gs.Tensor]:
    local = layer.local
    assert local is not None
    width = layer.kernel_size[1]
    window = width * local.taps
    # In the windows' order the taps come first and the kernel's columns, reversed, second.
    order = [(width - 1 - place % width) * local.taps + place // width for place in range(window)]
    normalised = _layer_norm(
        nodes, "local.input", average, "local.norm", local.norm_weight, local.norm_bias,
        local.epsilon,
    )  # fmt: skip
    return [
        normalised,
        nodes.constant(f"window{window}", np.eye(window, dtype=np.float32)[:, None]),
        nodes.constant("local.weight", local.weight[:, order]),
    ]


def _write_bands(nodes: Nodes, bands: FoldedBands, x: gs.Tensor) -> gs.Variable:
    """``(B, I, H, W)`` -> the same shape."""
    channels = int(bands.conv_weight.shape[1]) * bands.groups
    height, width, groups = bands.height, bands.width, bands.groups
    # A softmax runs over the groups, be it one.
    grouped = groups > 1 or bands.softmax
    form = BandForm(len(bands.bands), bands.softmax, grouped)
    inputs: list[gs.Tensor] = [
        x,
        nodes.constant("bands.conv.weight", bands.transposed_weight),
        nodes.constant("bands.conv.bias", bands.conv_bias),
        nodes.constant("bands.mix", bands.mix[: bands.terms]),
        nodes.constant("bands.mix.bias", bands.mix_bias[: bands.terms, None]),
        nodes.constant(f"bands{height}x{width}.to_columns", bands.to_columns),
        nodes.constant(f"bands{height}x{width}.to_rows", bands.to_rows),
    ]
    lead = [groups] if grouped else []
    attributes: dict[str, Any] = {
        "layer": nodes.layer,
        "groups": groups,
        "feature_size": [height, width],
        "complex_rows": int(bands.complex_rows),
        "softmax": int(bands.softmax),
        "conv_pads": [bands.conv_weight.shape[-1] // 2] * 4,
        "active_shape": [0, *lead, bands.conv_weight.shape[0] // groups, height * width],
        "factors_shape": [0, *lead, bands.terms, height, width],
        "rows_shape": [0, channels, height * (2 if bands.complex_rows else 1), -1],
    }
    if grouped:
        attributes["grouped_shape"] = [0, groups, channels // groups, height, width]
        attributes["feature_shape"] = [0, channels, height, width]
    all_rows = bands.to_rows.shape[0]
    all_columns = bands.to_columns.shape[1] // (2 if bands.complex_rows else 1)
    for index, band in enumerate(bands.bands):
        name = f"bands{height}x{width}.{index}"
        inputs.append(nodes.constant(f"{name}.from_rows", band.from_rows))
        inputs.append(nodes.constant(f"{name}.from_columns", band.from_columns))
        attributes[f"band{index}_ends"] = [
            EVERYTHING if band.rows == all_rows else band.rows,
            EVERYTHING if band.columns == all_columns else band.columns,
        ]
        attributes[f"band{index}_shape"] = [0, channels, height, -1]
    nodes.functions.setdefault(form.name, band_function(form))
    return nodes(form.name, "bands", *inputs, domain=DOMAIN, **attributes)


def _write_convolution(
    nodes: Nodes, layer: FoldedConv, x: gs.Tensor, kernel: gs.Tensor, attention: Attention
) -> gs.Variable:
    """``(B, I, H, W)`` and `_write_assembly`'s kernels -> ``(B, O, H', W')``."""
    batch = nodes.images
    scale = _write_row_scale(nodes, layer, attention) if layer.filter_side == "feature" else None
    bias = []
    if scale is None and layer.bias is not None:
        bias = [nodes.constant("bias", np.tile(layer.bias, batch))]
    if batch > 1:
        # One kernel per image: a convolution of as many groups as images.
        x = nodes.reshape("input", x, 1, batch * layer.in_channels, *layer.input_size)
    if layer.by_rows:
        y = _by_rows(nodes, layer, x, kernel, bias)
    else:
        y = nodes("Conv", "convolution", x, kernel, *bias, group=batch, **_geometry(layer))
    if batch > 1:
        y = nodes.reshape("output", y, batch, layer.out_channels, *layer.output_size)
        nodes.splits.append(y.inputs[0])
    if scale is not None:
        y = nodes("Mul", "output.scaled", y, scale)
        if layer.bias is not None:
            shift = nodes.constant("bias.map", layer.bias.reshape(1, -1, 1, 1))
            y = nodes("Add", "output.shifted", y, shift)
    return y


def _by_rows(
    nodes: Nodes, layer: FoldedConv, x: gs.Tensor, kernels: gs.Tensor, bias: list[gs.Constant]
) -> gs.Variable:
    """The sum of one convolution per kernel row, each seeing the rows of x that are its own.

    That takes kernels in the order in which they are made, (o, u, i, v); to bring them into
    (o, i, u, v) for a single convolution costs more than the convolution of small feature maps.
    """
    channels, (height, width) = layer.in_channels, layer.kernel_size
    sizes = nodes.shape(*[1] * height)
    parts = [kernels]
    if height > 1:
        parts = nodes.add("Split", "kernel.rows", kernels, sizes, outputs=height, axis=2)
    top, left, _, right = layer.padding
    rows = layer.input_size[0]
    total = None
    for row, kernel in enumerate(parts):
        first, last = rows_met(row, top, layer.stride[0], layer.dilation[0], layer.output_size[0])
        begin, end = max(first, 0), min(last + 1, rows)
        if begin >= end:
            continue  # it meets nothing but padding
        name, seen = f"row{row}", x
        if (begin, end) != (0, rows):
            span = nodes.shape(begin), nodes.shape(end), nodes.shape(2)
            seen = nodes("Slice", f"{name}.input", x, *span)
        part = nodes(
            "Conv", f"{name}.convolution", seen,
            nodes.reshape(f"{name}.kernel", kernel, -1, channels, 1, width),
            *(bias if total is None else ()), group=nodes.images, kernel_shape=[1, width],
            strides=list(layer.stride), dilations=list(layer.dilation),
            pads=[max(-first, 0), left, max(last + 1 - rows, 0), right],
        )  # fmt: skip
        total = part if total is None else nodes("Add", f"{name}.sum", total, part)
    assert total is not None
    return total


def rows_met(row: int, top: int, stride: int, dilation: int, output_rows: int) -> tuple[int, int]:
    """The first and last row of the input that a kernel row meets, padding counted below zero."""
    first = row * dilation - top
    return first, first + stride * (output_rows - 1)


def _write_product(
    nodes: Nodes, layer: FoldedConv, x: gs.Tensor, kernel: gs.Tensor, attention: Attention
) -> gs.Variable:
    """Tokens ``(B, L, I)`` and `_write_assembly`'s kernels -> ``(B, L, O)``.

    Runtimes take a matrix that is turned just before its product as it lies in memory.
    """
    kernel = nodes.reshape("kernel", kernel, nodes.images, layer.out_channels, layer.in_channels)
    y = nodes("MatMul", "product", x, nodes("Transpose", "kernel.turned", kernel, perm=[0, 2, 1]))
    scale = _write_row_scale(nodes, layer, attention) if layer.filter_side == "feature" else None
    if scale is not None:
        tokens = nodes.reshape("filter.tokens", scale, -1, 1, layer.out_channels)
        y = nodes("Mul", "output.scaled", y, tokens)
    if layer.bias is not None:
        y = nodes("Add", "output.shifted", y, nodes.constant("bias", layer.bias))
    return y


def _write_constant(nodes: Nodes, layer: FoldedConv, x: gs.Tensor) -> gs.Variable:
    """A layer whose kernel does not depend on the image: a plain convolution or linear layer."""
    weight = layer.constant_weight
    assert weight is not None
    bias = [] if layer.bias is None else [nodes.constant("bias", layer.bias)]
    if layer.tokens:
        y = nodes("MatMul", "product", x, nodes.constant("weight", weight[:, :, 0, 0].T))
        return nodes("Add", "output.shifted", y, *bias) if bias else y
    if layer.output_scale is not None:
        weight = weight * layer.output_scale[:, None, None, None]
    kernel = nodes.constant("weight", weight)
    return nodes("Conv", "convolution", x, kernel, *bias, **_geometry(layer))
