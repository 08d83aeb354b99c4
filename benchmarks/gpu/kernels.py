"""Each assembly kernel on its own: right against float64, and its time beside the floor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.arithmetic import MEMORY, costs
from benchmarks.gpu.shapes import RESNET50, LayerShape
from benchmarks.gpu.timing import kernel_seconds
from fdconv_deploy.folding.cuda import FusedConv2d
from fdconv_deploy.folding.layer import fold_layer
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.ops.frequency_assembly import kernels
from fdconv_deploy.ops.frequency_assembly.launch import (
    AssemblySizes,
    column_launch,
    half_shape,
    row_launch,
)
from fdconv_deploy.ops.launch import run_kernel

DRY = [LayerShape(32, 32, 1, 6, 1, 1), LayerShape(20, 18, 1, 6, 1, 1)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3}


def lively(shape: LayerShape) -> FDConv2d:
    """A layer whose every attention differs from image to image."""
    torch.manual_seed(0)
    groups = 64 if min(shape.in_channels, shape.out_channels) >= 64 else 2
    layer = FDConv2d(
        shape.in_channels, shape.out_channels, shape.kernel, shape.stride, shape.kernel // 2,
        kernel_num=groups,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("KSM") and parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return layer.eval()


@torch.no_grad()
def measure_layer(
    shape: LayerShape, batch: int, dtype: torch.dtype, channels_last: bool, device: str
) -> dict[str, Any]:
    """Error against float64 and seconds of both kernels."""
    layer = lively(shape)
    folded = fold_layer(layer, (shape.feature, shape.feature), name=str(shape))
    # Every modulation on the kernel, whatever is cheaper in a network.
    folded = replace(folded, bands=None, channel_side="kernel", filter_side="kernel")
    fused = FusedConv2d(folded, dtype, channels_last).to(device)
    average = torch.randn(batch, shape.in_channels, device=device)
    gates = fused.gates(average)
    made = fused.kernels(average, gates)
    double = layer.to(device).double()
    seen = average.double()
    assert double.KSM_Local is not None
    expected = double.kernels(double.KSM_Global(seen), double.KSM_Local(seen), full=True)
    expected = expected.reshape(made.shape)
    error = float((made.double() - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE[dtype]:
        raise AssertionError(f"error {error:.2e} is above {TOLERANCE[dtype]:.1e}")

    sizes = AssemblySizes.of(fused.sizes)
    half = torch.empty((batch, *half_shape(sizes)), device=device)
    weight = torch.empty_like(made)
    name = str(dtype).split(".")[1]
    first = row_launch(sizes)
    second = column_launch(sizes, channels_last=channels_last, dtype=name)

    def buffer(key: str) -> Tensor:
        return fused.get_buffer(key)

    def rows() -> None:
        constants = buffer("values"), buffer("groups"), buffer("row_table")
        run_kernel(kernels, first, batch, gates, *constants, half)

    def columns() -> None:
        constants = buffer("column_table"), average, buffer("local_weight"), gates
        run_kernel(kernels, second, batch, half, gates, *constants, weight)

    us = {"rows": kernel_seconds(rows) * 1e6, "columns": kernel_seconds(columns) * 1e6}
    read, written = costs(shape, made.element_size())
    floor = (read.memory + batch * written.memory) / MEMORY * 1e6
    return {
        "layer": str(shape),
        "batch": batch,
        "dtype": name,
        "channels_last": channels_last,
        "error": error,
        "us": us,
        "floor_us": floor,
        "share": floor / sum(us.values()),
    }


def measure_kernels(record: Any, dry: bool) -> None:
    """Into ``record``: every layer at batch 1 in half precision, the largest in all forms."""
    device = "cpu" if dry else "cuda"
    shapes = DRY if dry else [s for s in RESNET50 if s.stride == 1]
    half = (torch.float16, True)
    cases = [(shape, 1, *half) for shape in shapes]
    cases += [(shapes[-1], 1, torch.float32, last) for last in (False, True)]
    if not dry:
        cases += [(shapes[-1], batch, *half) for batch in (8, 32)]
    for case in cases:
        shape, batch, dtype, _ = case

        def run(case: Any = case) -> None:
            record.content["kernels"].append(measure_layer(*case, device))

        record.attempt(f"kernels of {shape}, batch {batch}, {dtype}", run)
