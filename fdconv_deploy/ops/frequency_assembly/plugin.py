"""The two assembly kernels as TensorRT plugins, each with an ONNX function body of equal meaning.

Plugins are registered under each form's own name, since TensorRT finds plugins, as it finds
functions, by a node's operator. All that a kernel is specialised to is in the node's attribute
``sizes``: `AssemblySizes.numbers`, then the batch size.

A graph that asks for the plugins carries the function bodies, so that it means the same to any
runtime. They read what the kernels read, laid out as the kernels want it, and invert by dense
products with matrices made on the spot: exact, short, and slow. A runtime without the plugins is
better served by the portable graph, see `function.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnx import FunctionProto, TensorProto

from fdconv_deploy.ops.frequency_assembly.launch import (
    AssemblySizes,
    column_launch,
    half_shape,
    row_launch,
)
from fdconv_deploy.ops.function_body import FunctionBody
from fdconv_deploy.ops.launch import KernelLaunch, Plugin, Sizes

# Of TensorRT's float16 layout with channels last, HWC8.
CHANNELS_TOGETHER = 8
ROWS, COLUMNS = "FrequencyAssemblyRows", "FrequencyAssemblyColumns"
ROW_INPUTS = ["gates", "values", "groups", "table"]
COLUMN_INPUTS = [
    "half", "gates", "table", "average", "local_weight", "output_scale",
]  # fmt: skip


def rows_name(wide_groups: bool) -> str:
    """Name of the row plugin. wide_groups: groups are int32, not four bytes to an int32."""
    return f"{ROWS}_Wide" if wide_groups else ROWS


@dataclass(frozen=True)
class ColumnForm:
    """Which modulations the column plugin applies. taps: of the local attention, 0 without."""

    taps: int
    filter: bool
    spatial: bool
    channel: bool
    scaled: bool
    half: bool

    @property
    def name(self) -> str:
        """Name of the plugin and its function."""
        parts = [
            (f"Local{self.taps}", self.taps > 0),
            ("Filter", self.filter),
            ("Spatial", self.spatial),
            ("Channel", self.channel),
            ("Scaled", self.scaled),
            ("Half", self.half),
        ]
        return "_".join([COLUMNS, *(part for part, there in parts if there)])


def _turns(f: FunctionBody, left: str, right: str, length: str) -> tuple[str, str]:
    """The cos and sin of 2π · left · right / length, ``(len(left), len(right))`` float32."""
    axes0, axes1 = f.constant([1]), f.constant([0])
    product = f("Mul", f("Unsqueeze", left, axes0), f("Unsqueeze", right, axes1))
    # Reduced in integers, to within half a turn either way: float32 angles stay exact.
    turn = f("Mod", product, length)
    further = f("Greater", f("Add", turn, turn), length)
    turn = f("Sub", turn, f("Mul", f("Cast", further, to=TensorProto.INT64), length))
    share = f("Div", f("Cast", turn, to=1), f("Cast", length, to=1))
    angle = f("Mul", share, f("Constant", value_float=2 * math.pi))
    return f("Cos", angle), f("Sin", angle)


def _count(f: FunctionBody, length: str) -> str:
    """0 … length - 1, int64."""
    axis = f.constant([0])
    zero, one = (f("Constant", value_int=i) for i in (0, 1))
    return f("Range", zero, f("Squeeze", length, axis), one)


def rows_function(wide_groups: bool) -> FunctionProto:
    """Gates and the constant spectrum -> `half`, as the row kernel writes it."""
    f = FunctionBody(rows_name(wide_groups), ROW_INPUTS)
    groups = "groups"
    if not wide_groups:
        # Bytes, little end first; floor division keeps each remainder positive.
        base, rest, parts = f("Cast", f.constant([256]), to=TensorProto.INT32), groups, []
        for place in range(4):
            byte = f("Mod", rest, base)
            parts.append(f("Unsqueeze", byte, f.constant([1])))
            if place < 3:
                rest = f("Div", f("Sub", rest, byte), base)
        flat = f("Reshape", f("Concat", *parts, axis=1), f.constant([-1]))
        groups = f("Slice", flat, f.constant([0]), f.attribute("bins"), f.constant([0]))
    weights = f.reshape(f("Gather", "gates", groups, axis=1), "weights_shape")
    x = f("ReduceSum", f("Mul", weights, "values"), f.constant([2]), keepdims=0)
    # (B, tiles, 2, R, width) -> (B, 2·R, columns)
    x = f.reshape(f("Transpose", x, perm=[0, 2, 3, 1, 4]), "matrix_shape")

    length, odd, power = (f.attribute(name) for name in ("rows", "odd", "power"))
    frequency = _count(f, length)
    stored = f("Add", f("Mul", f("Mod", frequency, power), odd), f("Div", frequency, power))
    cosine, sine = _turns(f, stored, frequency, length)
    top = f("Concat", cosine, f("Neg", sine), axis=1)
    bottom = f("Concat", sine, cosine, axis=1)
    x = f("MatMul", f("Concat", top, bottom, axis=0), x)
    x = f("Pad", f.reshape(x, "parts_shape"), f.attribute("pads"))
    x = f("Transpose", f.reshape(x, "blocks_shape"), perm=[0, 2, 1, 4, 3])
    return f.finish(x, "First half of a frequency assembly, in its GPU kernel's layout.")


def columns_function(form: ColumnForm) -> FunctionProto:
    """`half`, gates and small constants -> the weight of a convolution of B groups."""
    f = FunctionBody(form.name, COLUMN_INPUTS)
    x = f("Transpose", "half", perm=[0, 1, 4, 2, 3])
    x = f.reshape(x, "rows_shape")  # (B, stored rows, 2, stored columns)
    starts, axes = f.constant([0, 0]), f.constant([1, 3])
    x = f.reshape(f("Slice", x, starts, f.attribute("used"), axes), "pairs_shape")

    length = f.attribute("columns")
    cosine, sine = _turns(f, _count(f, f.attribute("frequencies")), _count(f, length), length)
    # A frequency stands for its mirror image too, but for 0 and the middle one.
    single = f("Equal", f("Mod", f("Mul", _count(f, f.attribute("frequencies")), f.constant([2])),
                          length), f.constant([0]))  # fmt: skip
    weight = f("Sub", f("Constant", value_float=2.0), f("Cast", single, to=1))
    weight = f("Unsqueeze", weight, f.constant([1]))
    matrix = [f("Mul", part, weight) for part in (cosine, f("Neg", sine))]
    x = f("MatMul", x, f("Concat", *matrix, axis=0))
    # Position k·power + c holds row odd·c + k.
    x = f("Transpose", f.reshape(x, "order_shape"), perm=[0, 2, 1, 3])
    x = f.reshape(x, "interleaved_shape")  # (B, O, kh, I, kw)

    if form.taps:
        # Windows of the average: (B, taps, I), by the local weights.
        padded = f("Pad", "average", f.constant([0, form.taps // 2, 0, (form.taps - 1) // 2]))
        windows = []
        for tap in range(form.taps):
            ends = f.attribute(f"window{tap}_end")
            part = f("Slice", padded, f.constant([tap]), ends, f.constant([1]))
            windows.append(f("Unsqueeze", part, f.constant([1])))
        stacked = f("Concat", *windows, axis=1) if form.taps > 1 else windows[0]
        logits = f("MatMul", f.reshape("local_weight", "taps_shape"), stacked)
        logits = f("Transpose", f.reshape(logits, "logits_shape"), perm=[0, 1, 2, 4, 3])
        x = f("Mul", x, f("Sigmoid", logits))
    for there, name in (
        (form.filter, "filter"),
        (form.spatial, "spatial"),
        (form.channel, "channel"),
    ):
        if there:
            first, last = f.attribute(f"{name}_start"), f.attribute(f"{name}_end")
            gate = f("Slice", "gates", first, last, f.constant([1]))
            x = f("Mul", x, f.reshape(gate, f"{name}_shape"))
    if form.scaled:
        x = f("Mul", x, f("Reshape", "output_scale", f.attribute("scale_shape")))
    x = f.reshape(f("Transpose", x, perm=[0, 1, 3, 2, 4]), "weight_shape")
    if form.half:
        x = f("Cast", x, to=TensorProto.FLOAT16)
    return f.finish(x, "Second half of a frequency assembly, from its GPU kernel's layout.")


def _layer(sizes: Sizes) -> AssemblySizes:
    return AssemblySizes.of([int(n) for n in sizes[:-1]])


def rows_plugin(_name: str) -> Plugin:
    """The first kernel: gates and constant spectrum -> half-inverted spectra."""
    return Plugin(
        tuple(ROW_INPUTS),
        ("float32", "float32", "int32", "float32", "float32"),
        lambda sizes: (int(sizes[-1]), *half_shape(_layer(sizes))),
        lambda sizes: row_launch(_layer(sizes)),
    )


def columns_plugin(name: str) -> Plugin:
    """The second kernel: half-inverted spectra -> modulated kernels, float32 or float16."""
    kind = "float16" if name.endswith("_Half") else "float32"

    def shape(sizes: Sizes) -> tuple[int, ...]:
        layer = _layer(sizes)
        return int(sizes[-1]) * layer.out_channels, layer.in_channels, *layer.kernel_size

    def launch(sizes: Sizes) -> KernelLaunch:
        return column_launch(_layer(sizes), dtype=kind)

    def channels_last(sizes: Sizes) -> KernelLaunch | None:
        layer = _layer(sizes)
        fits = kind == "float32" or layer.in_channels % CHANNELS_TOGETHER == 0
        return column_launch(layer, channels_last=True, dtype=kind) if fits else None

    kinds = (*["float32"] * len(COLUMN_INPUTS), kind)
    return Plugin(tuple(COLUMN_INPUTS), kinds, shape, launch, channels_last)


PLUGINS = {ROWS: rows_plugin, COLUMNS: columns_plugin}
