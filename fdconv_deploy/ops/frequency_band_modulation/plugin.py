"""The band combination kernel as a TensorRT plugin, with an ONNX function body of equal meaning."""

from __future__ import annotations

from onnx import FunctionProto, TensorProto

from fdconv_deploy.ops.frequency_band_modulation.launch import combination_launch
from fdconv_deploy.ops.function_body import FunctionBody
from fdconv_deploy.ops.launch import KernelLaunch, Plugin, Sizes

COMBINATION = "FrequencyBandCombination"
INPUTS = ["x", "logits", "mix", "mix_bias", "lows"]


def combination_name(sigmoid: bool, half: bool) -> str:
    """sigmoid: the operator applies it; half: features are float16."""
    return "_".join([COMBINATION, *["Activated"][: not sigmoid], *["Half"][:half]])


def combination_function(sigmoid: bool, half: bool) -> FunctionProto:
    """The weighted sum of the input and its low-passes; inputs as the kernel's."""
    f = FunctionBody(combination_name(sigmoid, half), INPUTS)

    def single(name: str) -> str:
        return f("Cast", name, to=1) if half else name

    active = f("Sigmoid", single("logits")) if sigmoid else single("logits")
    active = f.reshape(active, "maps_shape")  # (B, g, weighted, H·W)
    factors = f("MatMul", f.reshape("mix", "mix_shape"), active)
    factors = f("Add", factors, f.reshape("mix_bias", "mix_bias_shape"))
    factors = f.reshape(factors, "factors_shape")  # (B, g, terms, 1, H·W)
    terms = f("Concat", f("Unsqueeze", "x", f.constant([0])), "lows", axis=0)
    terms = f.reshape(single(terms), "terms_shape")  # (terms, B, g, I/g, H·W)
    terms = f("Transpose", terms, perm=[1, 2, 0, 3, 4])
    total = f("ReduceSum", f("Mul", terms, factors), f.constant([2]), keepdims=0)
    total = f.reshape(total, "feature_shape")
    if half:
        total = f("Cast", total, to=TensorProto.FLOAT16)
    return f.finish(total, "Each band of the input weighted by its own map: the weighted sum.")


def combination_plugin(name: str) -> Plugin:
    """Input, logits and low-passes -> modulated input, all of one type.

    A node's ``sizes``: channels, height, width, groups, weighted, terms, batch.
    """
    kind = "float16" if name.endswith("_Half") else "float32"

    def launch(sizes: Sizes) -> KernelLaunch:
        channels, height, width, *others, _batch = map(int, sizes)
        sigmoid = "_Activated" not in name
        return combination_launch(channels, height * width, *others, sigmoid=sigmoid, dtype=kind)

    return Plugin(
        tuple(INPUTS),
        (kind, kind, "float32", "float32", kind, kind),
        lambda sizes: tuple(map(int, (sizes[-1], *sizes[:3]))),
        launch,
    )


PLUGINS = {COMBINATION: combination_plugin}
