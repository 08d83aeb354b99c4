"""TensorRT plugins of the two assembly kernels.

Registered under each form's own name, since TensorRT finds plugins, as it finds functions, by a
node's operator. All that a kernel is specialised to is in ``sizes``: `AssemblySizes.numbers`,
then the batch size.
"""

from __future__ import annotations

from fdconv_deploy.ops.frequency_assembly.kernel_launch import (
    AssemblySizes,
    column_launch,
    half_shape,
    row_launch,
)
from fdconv_deploy.ops.frequency_assembly.plugin_function import (
    COLUMN_INPUTS,
    COLUMNS,
    ROW_INPUTS,
    ROWS,
)
from fdconv_deploy.ops.launch import KernelLaunch
from fdconv_deploy.ops.tensorrt_plugins import Plugin, Sizes


def _layer(sizes: Sizes) -> AssemblySizes:
    return AssemblySizes.of([int(n) for n in sizes[:-1]])


def rows_plugin(name: str) -> Plugin:
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

    return Plugin(tuple(COLUMN_INPUTS), (*["float32"] * len(COLUMN_INPUTS), kind), shape, launch)


PLUGINS = {ROWS: rows_plugin, COLUMNS: columns_plugin}
