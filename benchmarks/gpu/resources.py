"""Registers, spills and shared memory of every kernel, as ptxas reports them; needs no GPU.

    python -m benchmarks.gpu.resources [--capability 90 …] [--json FILE]

Every layer of a ResNet-50 in the form the half-precision network uses (channels last, float16),
and the band combination.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import triton

from benchmarks.gpu.shapes import RESNET50, layer_sizes
from fdconv_deploy.ops.compile_kernels import CAPABILITIES, compile_kernel
from fdconv_deploy.ops.frequency_assembly.kernel_launch import column_launch, row_launch
from fdconv_deploy.ops.frequency_band_modulation.launch import combination_launch
from fdconv_deploy.ops.launch import KernelLaunch


def launches() -> dict[str, tuple[KernelLaunch, ...]]:
    """By layer; layers that differ in stride alone have the same kernels."""
    result: dict[str, tuple[KernelLaunch, ...]] = {}
    for shape in RESNET50:
        sizes = layer_sizes(shape.out_channels, shape.in_channels, shape.kernel)
        name = str(shape).split("/")[0]
        result[name] = row_launch(sizes), column_launch(sizes, channels_last=True, dtype="float16")
    for shape in (RESNET50[1], RESNET50[-1]):
        result[f"bands of {shape}"] = (
            combination_launch(
                channels=shape.in_channels, pixels=shape.feature**2, groups=1, weighted=3,
                terms=4, sigmoid=True, channels_last=True, dtype="float16",
            ),
        )  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, nargs="*", default=list(CAPABILITIES))
    parser.add_argument("--layer", nargs="*", help="only these, e.g. '512→512 3×3'")
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args()
    rows = []
    columns = "layer kernel sm programs threads shared registers spilled stack".split()
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for capability in options.capability:
        for layer, kernels in launches().items():
            if options.layer and layer not in options.layer:
                continue
            for launch in kernels:
                compiled = compile_kernel(launch, capability)
                used = compiled.resources()
                row = dict(zip(columns, (
                    layer, launch.kernel, capability, launch.blocks[0] * launch.blocks[1],
                    compiled.threads, compiled.shared, used.registers,
                    used.spill_stores + used.spill_loads, used.stack,
                ), strict=True))  # fmt: skip
                rows.append(row)
                print("| " + " | ".join(str(v) for v in row.values()) + " |", flush=True)
    if options.json:
        record = {"date": date.today().isoformat(), "triton": triton.__version__, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
