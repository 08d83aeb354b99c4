"""``fdconv::FrequencyBandModulation`` as a function of standard ONNX operators."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import FunctionProto

from fdconv_deploy.ops.function_body import FunctionBody

# Attributes of a node that other readers than its body need, see the folder's ``__init__``.
ATTRIBUTES = ["layer", "groups", "feature_size", "complex_rows", "softmax"]


@dataclass(frozen=True)
class BandForm:
    """Which parts a layer's band modulation has.

    grouped: groups of channels have maps of their own.
    """

    bands: int
    softmax: bool
    grouped: bool

    @property
    def name(self) -> str:
        """Name of the function; that of three bands and sigmoids is the operator's alone."""
        name = "FrequencyBandModulation"
        if self.bands != 3:
            name += f"_{self.bands}Bands"
        name += "_Softmax" if self.softmax else ""
        return name + ("_Grouped" if self.grouped else "")

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        names = ["x", "conv_weight", "conv_bias", "mix", "mix_bias", "to_columns", "to_rows"]
        for band in range(self.bands):
            names += [f"from_rows{band}", f"from_columns{band}"]
        return names


def band_function(form: BandForm) -> FunctionProto:
    """The ONNX function body for one form."""
    f = FunctionBody(form.name, form.inputs, ATTRIBUTES)
    # A convolution onto a few maps, as its transpose: one small product that reads the input
    # once, then overlapping sums of a few maps. Runtimes gather nine copies of the input for
    # the other form.
    logits = f.passed(
        "ConvTranspose", "x", "conv_weight", "conv_bias", group="groups", pads="conv_pads"
    )
    active = f.reshape(logits, "active_shape")  # (B, [g,] weighted, H·W)
    active = f("Softmax", active, axis=1) if form.softmax else f("Sigmoid", active)
    factors = f("Add", f("MatMul", "mix", active), "mix_bias")
    factors = f.reshape(factors, "factors_shape")  # (B, [g,] terms, H, W)
    terms = form.bands + 1
    axis = 2 if form.grouped else 1
    split = f.add("Split", factors, outputs=terms, axis=axis, num_outputs=terms)

    def grouped(feature: str) -> str:
        return f.reshape(feature, "grouped_shape") if form.grouped else feature

    projected = f.reshape(f("MatMul", "x", "to_columns"), "rows_shape")
    coefficients = f("MatMul", "to_rows", projected)
    total = f("Mul", split[0], grouped("x"))
    starts, axes = f.constant([0, 0]), f.constant([2, 3])
    for band in range(form.bands):
        kept = f("Slice", coefficients, starts, f.attribute(f"band{band}_ends"), axes)
        back = f.reshape(f("MatMul", f"from_rows{band}", kept), f"band{band}_shape")
        low = grouped(f("MatMul", back, f"from_columns{band}"))
        total = f("Add", total, f("Mul", split[band + 1], low))
    if form.grouped:
        total = f.reshape(total, "feature_shape")
    return f.finish(total, "Each band of the input weighted by its own map.")
