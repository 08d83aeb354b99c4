"""TensorRT plugins of the two assembly kernels.

Registered under each form's own name, since TensorRT finds plugins, as it finds functions, by a
node's operator. Which form a plugin is makes no difference to it: all is in ``sizes``.
"""

# TensorRT reads annotations as types: no `from __future__ import annotations` here.

from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.ops.frequency_assembly.kernel_launch import (
    AssemblySizes,
    column_launch,
    half_shape,
    row_launch,
)
from fdconv_deploy.ops.frequency_assembly.plugin_function import COLUMNS, ROWS
from fdconv_deploy.ops.plugins import NAMESPACE, combination, implement

Sizes = npt.NDArray[np.int32]


def assembly_sizes_of(sizes: Sizes) -> AssemblySizes:
    """Of a node's ``sizes``: `AssemblySizes.numbers`, then the batch size."""
    return AssemblySizes.of([int(n) for n in sizes[:-1]])


def register_rows(trt: Any, trtp: Any, name: str) -> None:
    """The first kernel: gates and constant spectrum -> half-inverted spectra."""
    identity = f"{NAMESPACE}::{name}"
    desc = trtp.TensorDesc

    @trtp.register(identity)
    def describe(gates: desc, values: desc, groups: desc, table: desc, sizes: Sizes) -> desc:
        shape = int(sizes[-1]), *half_shape(assembly_sizes_of(sizes))
        return trtp.from_shape_expr(shape, trt.float32)

    @trtp.autotune(identity)
    def types(
        gates: desc, values: desc, groups: desc, table: desc, sizes: Sizes, outputs: tuple[desc]
    ) -> list[trtp.AutoTuneCombination]:
        return combination(trtp, "float32", "float32", "int32", "float32", "float32")

    @trtp.aot_impl(identity)
    def kernel(
        gates: desc,
        values: desc,
        groups: desc,
        table: desc,
        sizes: Sizes,
        outputs: tuple[desc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        return implement(trtp, row_launch(assembly_sizes_of(sizes)), int(sizes[-1]))


def register_columns(trt: Any, trtp: Any, name: str) -> None:
    """The second kernel: half-inverted spectra -> modulated kernels, float32 or float16."""
    identity = f"{NAMESPACE}::{name}"
    desc = trtp.TensorDesc
    kind = "float16" if name.endswith("_Half") else "float32"

    @trtp.register(identity)
    def describe(
        half: desc,
        gates: desc,
        table: desc,
        average: desc,
        local_weight: desc,
        output_scale: desc,
        sizes: Sizes,
    ) -> desc:
        layer = assembly_sizes_of(sizes)
        shape = int(sizes[-1]) * layer.out_channels, layer.in_channels, *layer.kernel_size
        return trtp.from_shape_expr(shape, trt.float16 if kind == "float16" else trt.float32)

    @trtp.autotune(identity)
    def types(
        half: desc,
        gates: desc,
        table: desc,
        average: desc,
        local_weight: desc,
        output_scale: desc,
        sizes: Sizes,
        outputs: tuple[desc],
    ) -> list[trtp.AutoTuneCombination]:
        return combination(trtp, *["float32"] * 6, kind)

    @trtp.aot_impl(identity)
    def kernel(
        half: desc,
        gates: desc,
        table: desc,
        average: desc,
        local_weight: desc,
        output_scale: desc,
        sizes: Sizes,
        outputs: tuple[desc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        launch = column_launch(assembly_sizes_of(sizes), dtype=kind)
        return implement(trtp, launch, int(sizes[-1]))


PLUGINS = {ROWS: register_rows, COLUMNS: register_columns}
