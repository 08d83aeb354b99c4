"""Registers, spills and shared memory of every kernel, as ptxas reports them; needs no GPU.

    python -m benchmarks.gpu.resources [--capability 90 …] [--json FILE]

Every layer of a ResNet-50 in the form the half-precision network uses (channels last, float16),
and the band combination.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import triton
from triton import backends

from benchmarks.gpu.shapes import RESNET50, layer_sizes
from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.compile_kernels import CAPABILITIES, CompiledKernel, compile_kernel
from fdconv_deploy.ops.frequency_assembly.launch import column_launch, row_launch
from fdconv_deploy.ops.frequency_band_modulation.launch import combination_launch
from fdconv_deploy.ops.launch import KernelLaunch


@dataclass(frozen=True)
class Resources:
    """What ptxas says a kernel takes: registers a thread, spilled bytes, stack bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int


def resources(kernel: CompiledKernel) -> Resources:
    """Assemble a kernel to machine code with the ptxas in Triton's wheel and read its report."""
    high = kernel.capability >= 90
    architecture = f"sm_{kernel.capability}a" if high else f"sm_{kernel.capability}"
    binaries = Path(next(iter(backends.__path__))) / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.ptx)
        options = ["-v", f"--gpu-name={architecture}", str(source), "-o", f"{source}.cubin"]
        # Only the newest ptxas knows the newest GPUs and instruction sets.
        for assembler in ("ptxas", "ptxas-blackwell"):
            command = [str(binaries / assembler), *options]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                break
        else:
            raise BackendError(f"ptxas refuses a kernel for {architecture}: {result.stderr}")

    def number(pattern: str) -> int:
        match = re.search(pattern, result.stderr)
        assert match is not None, result.stderr
        return int(match.group(1))

    return Resources(
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
    )


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
                used = resources(compiled)
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
