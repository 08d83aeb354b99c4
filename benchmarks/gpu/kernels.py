"""Each assembly kernel on its own: right against float64, and its time beside the floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.arithmetic import MEMORY, costs
from benchmarks.gpu.shapes import LayerShape
from benchmarks.gpu.timing import rotating_seconds
from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.folding.module import FoldedAttention
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.ops.frequency_assembly.launch import (
    assembly_sizes,
    column_launch,
    column_transform,
    half_shape,
    kernel_spectrum,
    root_table,
    row_launch,
    transform_of,
)
from fdconv_deploy.ops.launch import KernelLaunch, run_kernel

LIMITS = {torch.float32: 2e-6, torch.float16: 1.5e-3}
MOST_SETS = 48


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Assembly:
    """One layer's two kernels with everything they read, every modulation on the kernel.

    Args:
        layer: dynamic, in float32, on the CPU.
        folded: the same, folded.
        batch: images; each has averages of its own.
        device: of the kernels.
    """

    def __init__(self, layer: FDConv2d, folded: FoldedConv, batch: int, device: str) -> None:
        self.batch, self.device = batch, device
        # Whatever is cheaper in a network.
        self.folded = folded = replace(
            folded, bands=None, channel_side="kernel", filter_side="kernel"
        )
        assert folded.spectrum is not None
        spectrum = kernel_spectrum(*folded.spectrum.by_frequency())
        self.sizes = assembly_sizes(folded, spectrum)
        generator = torch.Generator().manual_seed(0)
        average = torch.randn(batch, folded.in_channels, generator=generator).to(device)
        with torch.no_grad():
            gates = FoldedAttention(folded.modulation).to(device)(average).contiguous()
            double = layer.double().to(device)
            seen = average.double()
            local = None if double.KSM_Local is None else double.KSM_Local(seen)
            self.expected = double.kernels(double.KSM_Global(seen), local, full=True)
            layer.float().cpu()
        columns = column_transform(self.sizes.columns, self.sizes.kernel_width)
        self.rows_in = [
            gates,
            self._put(spectrum.values),
            self._put(spectrum.groups),
            self._put(root_table(self.sizes.rows, transform_of(self.sizes.rows))),
        ]
        # A pointer that a kernel never follows may point anywhere.
        normalised = local_weight = gates
        if folded.local is not None:
            weight, bias = self._put(folded.local.norm_weight), self._put(folded.local.norm_bias)
            shape, epsilon = average.shape[1:], folded.local.epsilon
            normalised = F.layer_norm(average, shape, weight, bias, epsilon).contiguous()
            local_weight = self._put(folded.local.weight)
        table = self._put(root_table(self.sizes.columns, columns))
        scale = gates if folded.output_scale is None else self._put(folded.output_scale)
        self.columns_in = [gates, table, normalised, local_weight, scale]
        self.half = torch.empty((batch, *half_shape(self.sizes)), device=device)

    def _put(self, values: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def rows(self) -> KernelLaunch:
        return row_launch(self.sizes)

    def columns(self, dtype: torch.dtype, channels_last: bool = False) -> KernelLaunch:
        return column_launch(self.sizes, channels_last=channels_last, dtype=dtype_name(dtype))

    def weight(self, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
        """An empty result."""
        shape = self.batch * self.folded.out_channels, self.folded.in_channels
        memory = torch.channels_last if channels_last else torch.contiguous_format
        size = (*shape, *self.folded.kernel_size)
        empty = torch.empty(size, dtype=dtype, device=self.device, memory_format=memory)
        return empty.fill_(torch.nan)  # what is not written is seen

    def error(self, weight: Tensor) -> float:
        """Largest error relative to the largest value, against the layer in float64."""
        expected = self.expected.reshape(weight.shape)
        return float((weight.double() - expected).abs().max() / expected.abs().max())


def measure_layer(
    what: str, assembly: Assembly, dtype: torch.dtype, channels_last: bool
) -> dict[str, Any]:
    """Error against float64 and seconds of both kernels, each alone and as the pair they are."""
    first, second = assembly.rows(), assembly.columns(dtype, channels_last)
    batch, half = assembly.batch, assembly.half
    weight = assembly.weight(dtype, channels_last)
    run_kernel(first, *assembly.rows_in, half)
    run_kernel(second, half, *assembly.columns_in, weight)
    error = assembly.error(weight)

    # Sets of buffers, so many that they do not stay in the cache together.
    own = [*assembly.rows_in, half, weight]
    size = sum(t.numel() * t.element_size() for t in own)
    count = 1
    if torch.cuda.is_available():
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        count = max(2, min(MOST_SETS, -(-2 * cache // size)))
    sets = [[t.clone() for t in own] for _ in range(count)]

    def rows(buffers: list[Tensor]) -> None:
        run_kernel(first, *buffers[:-1])

    def columns(buffers: list[Tensor]) -> None:
        run_kernel(second, buffers[-2], *assembly.columns_in, buffers[-1])

    def pair(buffers: list[Tensor]) -> None:
        rows(buffers)
        columns(buffers)

    def us(run: Callable[[list[Tensor]], None]) -> float:
        return rotating_seconds([lambda b=b: run(b) for b in sets]) * 1e6  # type: ignore[misc]

    folded = assembly.folded
    shape = LayerShape(folded.in_channels, folded.out_channels, folded.kernel_size[0], 1, 1, 1)
    read, written = costs(shape, weight.element_size())
    floor = (read.memory + batch * written.memory) / MEMORY * 1e6
    times = {"rows": us(rows), "columns": us(columns), "pair": us(pair)}
    return {
        "layer": what,
        "batch": batch,
        "dtype": dtype_name(dtype),
        "channels_last": channels_last,
        "error": error,
        "limit": LIMITS[dtype],
        "us": times,
        "floor_us": floor,
        "share": floor / times["pair"],
        "buffers": count,
    }


def measure_kernels(record: Any, layers: dict[str, tuple[FDConv2d, FoldedConv]]) -> None:
    """Into ``record``: every layer at batch 1 in both precisions, the largest in all forms."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half, single = (torch.float16, True), (torch.float32, False)
    cases = [(what, 1, *form) for what in layers for form in (half, single)]
    largest = max(layers, key=lambda what: layers[what][1].in_channels * 9)
    cases.append((largest, 1, torch.float32, True))
    cases += [(largest, batch, *half) for batch in ((8, 32) if device == "cuda" else (2,))]
    made: dict[tuple[str, int], Assembly] = {}
    for what, batch, dtype, channels_last in cases:

        def run(case: Any = (what, batch, dtype, channels_last)) -> None:
            what, batch, dtype, channels_last = case
            if (what, batch) not in made:
                made[what, batch] = Assembly(*layers[what], batch, device)
            assembly = made[what, batch]
            record.add("kernels", lambda: measure_layer(what, assembly, dtype, channels_last))

        record.attempt(f"kernels of {what}, batch {batch}, {dtype_name(dtype)}", run)
