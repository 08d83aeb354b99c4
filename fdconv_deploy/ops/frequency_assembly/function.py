"""``fdconv::FrequencyAssembly`` as a function of standard ONNX operators."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import FunctionProto

from fdconv_deploy.ops.body import FunctionBody


@dataclass(frozen=True)
class AssemblyForm:
    """Which parts a layer's assembly has.

    planes: more than one spectrum is summed. spatial_kernel: the kernel is higher than 1,
    so that its rows and the input channels must change places.
    """

    planes: bool
    local: bool
    column_scale: bool
    row_scale: bool
    spatial_kernel: bool

    @property
    def name(self) -> str:
        """Of the function; the published 3×3 layer's is plain ``FrequencyAssembly``."""
        departures = [
            ("Pointwise", not self.spatial_kernel),
            ("Planes", self.planes),
            ("NoLocal", not self.local),
            ("NoColumnScale", not self.column_scale),
            ("NoRowScale", not self.row_scale),
        ]
        suffixes = [name for name, departs in departures if departs]
        return "".join(["FrequencyAssembly", *(f"_{s}" for s in suffixes)])

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        names = ["attention", "spectrum", "groups"]
        names += ["column_inner", "column_outer", "row_inner", "row_outer"]
        if self.local:
            names += ["local_input", "local_window", "local_weight"]
        if self.column_scale:
            names += ["column_scale"]
        if self.row_scale:
            names += ["row_scale"]
        return names


def assembly_function(form: AssemblyForm) -> FunctionProto:
    """The body for one form. Its attributes are the shapes named in `reshape` calls."""
    f = FunctionBody(form.name, form.inputs)
    planes_axis = 1 if form.planes else 0
    index = f("Cast", "groups", to=6)  # int32
    weights = f("Gather", "attention", index, axis=1)
    weights = f("Unsqueeze", weights, f.constant([2 + planes_axis]))
    spectrum = f("Mul", weights, "spectrum")
    if form.planes:
        spectrum = f("ReduceSum", spectrum, f.constant([1]), keepdims=0)

    x = f("MatMul", "column_inner", f.reshape(spectrum, "column_inner_shape"))
    x = f("MatMul", "column_outer", f.reshape(x, "column_outer_shape"))
    x = f("Transpose", f.reshape(x, "columns_shape"), perm=[0, 2, 1])
    x = f("MatMul", "row_inner", f.reshape(x, "row_inner_shape"))
    x = f("MatMul", "row_outer", f.reshape(x, "row_outer_shape"))
    kernel = f.reshape(x, "matrix_shape")

    if form.local:
        # The average, spread to the kernel matrix's columns with zeros between, and every
        # window of it: one small matrix that the local weights multiply.
        spread = f("Unsqueeze", "local_input", f.constant([2]))
        spread = f("Pad", spread, f.attribute("local_spread"))
        spread = f.reshape(spread, "local_shape")
        spread = f("Pad", spread, f.attribute("local_pads"))
        windows = f("Conv", spread, "local_window")
        logits = f("MatMul", "local_weight", windows)
        kernel = f("Mul", kernel, f("Sigmoid", logits))
    if form.column_scale or form.row_scale:
        kernel = f.reshape(kernel, "scaled_shape")
    if form.column_scale:
        kernel = f("Mul", kernel, "column_scale")
    if form.row_scale:
        kernel = f("Mul", kernel, "row_scale")
    if form.spatial_kernel:
        kernel = f("Transpose", f.reshape(kernel, "interleaved_shape"), perm=[0, 1, 3, 2, 4])
    kernel = f.reshape(kernel, "kernel_shape")
    return f.finish(kernel, "One kernel per image from kernel attention and constant spectra.")
