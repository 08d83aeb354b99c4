"""``fdconv::FrequencyBandModulation`` as a function of standard ONNX operators."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import FunctionProto

from fdconv_deploy.ops.body import FunctionBody


@dataclass(frozen=True)
class BandForm:
    """Which parts a layer's band modulation has: how many bands, and the activation."""

    bands: int
    softmax: bool

    @property
    def name(self) -> str:
        """Of the function; the published one (bands 2, 4, 8) is ``FrequencyBandModulation``."""
        name = "FrequencyBandModulation"
        if self.bands != 3:
            name += f"_{self.bands}Bands"
        return name + ("_Softmax" if self.softmax else "")

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        names = ["x", "conv_weight", "conv_bias", "mix", "mix_bias", "to_columns", "to_rows"]
        for band in range(self.bands):
            names += [f"from_rows{band}", f"from_columns{band}"]
        return names


def band_function(form: BandForm) -> FunctionProto:
    """The body for one form.

    Attributes: ``groups``, ``pads`` of the band convolution (four ints), and the shapes and
    slice ends named below.
    """
    f = FunctionBody(form.name, form.inputs)
    logits = f.passed("Conv", "x", "conv_weight", "conv_bias", group="groups", pads="conv_pads")
    if form.softmax:
        active = f("Softmax", f.reshape(logits, "bands_shape"), axis=1)
        active = f.reshape(active, "flat_shape")
    else:
        active = f("Sigmoid", logits)
    factors = f.passed("Conv", active, "mix", "mix_bias", group="groups")
    factors = f.reshape(factors, "factors_shape")  # (B, g, terms, H, W)
    split = f.add("Split", factors, outputs=form.bands + 1, axis=2, num_outputs=form.bands + 1)

    projected = f.reshape(f("MatMul", "x", "to_columns"), "rows_shape")
    coefficients = f("MatMul", "to_rows", projected)
    total = f("Mul", split[0], f.reshape("x", "grouped_shape"))
    starts, axes = f.constant([0, 0]), f.constant([2, 3])
    for band in range(form.bands):
        kept = f("Slice", coefficients, starts, f.attribute(f"band{band}_ends"), axes)
        back = f.reshape(f("MatMul", f"from_rows{band}", kept), f"band{band}_shape")
        low = f.reshape(f("MatMul", back, f"from_columns{band}"), "grouped_shape")
        total = f("Add", total, f("Mul", split[band + 1], low))
    return f.finish(
        f.reshape(total, "feature_shape"), "Each band of the input weighted by its own map."
    )
