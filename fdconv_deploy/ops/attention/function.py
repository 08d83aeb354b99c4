"""``fdconv::KernelAttention`` as a function of standard ONNX operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnx import FunctionProto

from fdconv_deploy.ops.function_body import FunctionBody

# Attributes of a node that other readers than its body need, see the folder's ``__init__``.
ATTRIBUTES = "layer head_sizes norm squared softmax local".split()
Norm = Literal["", "LayerNorm", "RMSNorm"]
NORMS: tuple[Norm, ...] = ("", "LayerNorm", "RMSNorm")  # in the order of the attribute's values


@dataclass(frozen=True)
class AttentionForm:
    """Which parts a layer's attention has.

    axes: how many are averaged over, two for each that is cut into pieces. softmax: how many
    softmaxes there are side by side; 0 for sigmoids.
    """

    tokens: bool
    axes: int
    norm: Norm
    squared: bool
    softmax: int
    local: bool

    @property
    def in_pieces(self) -> bool:
        """Whether an axis is cut into pieces."""
        return self.axes > (1 if self.tokens else 2)

    @property
    def name(self) -> str:
        """Name of the function; the published layer's is the operator's alone."""
        departures = [
            ("Tokens", self.tokens),
            (f"{self.axes}Axes", self.in_pieces),
            (self.norm, self.norm),
            ("NotSquared", not self.squared),
            (f"{self.softmax}Softmax", self.softmax),
            ("NoLocal", not self.local),
        ]
        return "_".join(["KernelAttention", *(name for name, departs in departures if departs)])

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        names = ["x", "hidden_weight", "hidden_bias"]
        names += ["norm_weight", "norm_bias"][: {"": 0, "LayerNorm": 2, "RMSNorm": 1}[self.norm]]
        names += ["heads_weight", "heads_bias"]
        return names + ["local_weight", "local_bias"] * self.local


def attention_function(form: AttentionForm) -> FunctionProto:
    """The ONNX function body for one form."""
    f = FunctionBody(form.name, form.inputs, ATTRIBUTES)
    # One short axis after the other, the last first: its numbers lie side by side. ONNX Runtime
    # takes twice as long for GlobalAveragePool (benchmarks/primitives.py), and adds all that it
    # sees up in one running sum, see `fdconv_deploy.export.passes.split_means`.
    average = f.reshape("x", "pieces_shape") if form.in_pieces else "x"
    first = 1 if form.tokens else 2
    for axis in reversed(range(first, first + form.axes)):
        average = f("ReduceMean", average, f.constant([axis]), keepdims=0)

    def layer_norm(x: str, of: str) -> str:
        constants = f"{of}_weight", f"{of}_bias"
        return f.passed("LayerNormalization", x, *constants, epsilon=f"{of}_epsilon")

    hidden = f("Gemm", average, "hidden_weight", "hidden_bias", transB=1)
    if form.norm == "LayerNorm":
        hidden = layer_norm(hidden, "norm")
    elif form.norm == "RMSNorm":  # in operators that opset 18 has
        mean = f("ReduceMean", f("Mul", hidden, hidden), f.constant([1]))
        epsilon = f.passed("Constant", value_float="norm_epsilon")
        scaled = f("Div", hidden, f("Sqrt", f("Add", mean, epsilon)))
        hidden = f("Mul", scaled, "norm_weight")
    hidden = f("Relu", hidden)
    if form.squared:
        hidden = f("Mul", hidden, hidden)
    gates = f("Gemm", hidden, "heads_weight", "heads_bias", transB=1)
    if form.softmax > 1:
        heads = f.add("Split", gates, f.attribute("head_sizes"), outputs=form.softmax, axis=1)
        gates = f("Concat", *(f("Softmax", head, axis=1) for head in heads), axis=1)
    else:
        gates = f("Softmax", gates, axis=1) if form.softmax else f("Sigmoid", gates)
    more = {"local_input": layer_norm(average, "local")} if form.local else {}
    return f.finish(gates, "All attentions of a layer from its input, side by side.", **more)
