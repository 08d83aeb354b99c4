"""``fdconv::ConvolutionByRows`` as a function of standard ONNX operators.

The sum of one convolution per kernel row, each seeing the rows of the input that are its own. That
takes kernels in the order in which they are made, (o, u, i, v); to bring them into (o, i, u, v) for
a single convolution costs more than the convolution of small feature maps.

Inputs, in order:

    x        (1, B·I, H, W), or one image of any batch
    kernels  (B, O, kh, I·kw): `fdconv_deploy.ops.frequency_assembly`'s by rows
    bias     (B·O,), if any

Output: ``(1, B·O, H', W')``. Attributes, beside those that the body reads for each row: ``layer``,
the layer's name, and strides, pads, dilations and group of the whole convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import FunctionProto

from fdconv_deploy.ops.function_body import FunctionBody

ATTRIBUTES = "layer strides pads dilations group".split()
# What a kernel row sees of the input. NOTHING: but padding.
WHOLE, CUT, NOTHING = "wcn"


@dataclass(frozen=True)
class RowsForm:
    """What each kernel row sees, and whether there is a bias."""

    rows: str
    bias: bool

    @property
    def name(self) -> str:
        """Name of the function; that of three padded rows is the operator's alone."""
        name = "ConvolutionByRows"
        if self.rows != CUT + WHOLE + CUT:
            name += f"_{self.rows}"
        return name + ("_Bias" if self.bias else "")


def row_attributes(
    strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int], height: int,
    input_rows: int, output_rows: int,
) -> tuple[str, dict[str, list[int]]]:  # fmt: skip
    """`RowsForm.rows` of a convolution with kernels of a height, and what its body reads."""
    top, left, _, right = pads
    kinds, attributes = "", {}
    for row in range(height):
        # The first and the last row of the input that it meets, padding counted below zero.
        first = row * dilations[0] - top
        last = first + strides[0] * (output_rows - 1)
        begin, end = max(first, 0), min(last + 1, input_rows)
        if begin >= end:
            kinds += NOTHING
            continue
        attributes[f"row{row}_pads"] = [max(-first, 0), left, max(last + 1 - input_rows, 0), right]
        if (begin, end) == (0, input_rows):
            kinds += WHOLE
            continue
        kinds += CUT
        attributes |= {f"row{row}_begin": [begin], f"row{row}_end": [end]}
    return kinds, attributes


def rows_function(form: RowsForm) -> FunctionProto:
    """The ONNX function body for one form."""
    bias = ["bias"] * form.bias
    f = FunctionBody(form.name, ["x", "kernels", *bias], ATTRIBUTES)
    count = len(form.rows)
    kernels = f.add("Split", "kernels", f.constant([1] * count), outputs=count, axis=2)
    total = ""
    for row, (kind, kernel) in enumerate(zip(form.rows, kernels, strict=True)):
        if kind == NOTHING:
            continue
        seen = "x"
        if kind == CUT:
            span = f.attribute(f"row{row}_begin"), f.attribute(f"row{row}_end")
            seen = f("Slice", "x", *span, f.constant([2]))
        part = f.passed(
            "Conv", seen, f.reshape(kernel, "row_shape"), *(bias if not total else ()),
            group="group", strides="strides", dilations="dilations", pads=f"row{row}_pads",
            kernel_shape="row_size",
        )  # fmt: skip
        total = f("Add", total, part) if total else part
    return f.finish(total, "The sum of a convolution for each row of the kernels.")
