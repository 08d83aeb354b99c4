"""What a kernel takes of a GPU by its machine code: registers, spills, instructions.

Needs no GPU: ptxas and nvdisasm are in Triton's wheel.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import backends

from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.compile_kernels import CompiledKernel
from fdconv_deploy.ops.launch import THREADS_PER_WARP, KernelLaunch

TOOLS = Path(next(iter(backends.__path__))) / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """What ptxas says a kernel takes: registers a thread, spilled bytes, stack bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int


def resources(kernel: CompiledKernel, ptxas: Path | None = None) -> Resources:
    """Assemble a kernel and read ptxas's report.

    Args:
        kernel: in PTX.
        ptxas: another one than Triton's.

    Raises:
        BackendError: ptxas refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = _assemble(kernel, Path(folder) / "kernel.cubin", ptxas)

    def number(pattern: str) -> int:
        match = re.search(pattern, report)
        assert match is not None, report
        return int(match.group(1))

    return Resources(
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
    )


def _assemble(kernel: CompiledKernel, cubin: Path, ptxas: Path | None = None) -> str:
    """Write machine code, and give ptxas's report."""
    high = kernel.capability >= 90
    architecture = f"sm_{kernel.capability}a" if high else f"sm_{kernel.capability}"
    source = cubin.with_suffix(".ptx")
    source.write_text(kernel.ptx)
    options = ["-v", f"--gpu-name={architecture}", str(source), "-o", str(cubin)]
    # Of Triton's, only the second knows the newest GPUs and instruction sets.
    for assembler in [ptxas] if ptxas else [TOOLS / "ptxas", TOOLS / "ptxas-blackwell"]:
        command = [str(assembler), *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return result.stderr
    raise BackendError(f"ptxas refuses a kernel for {architecture}: {result.stderr}")


_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(?: `\((\.L_x_\d+)\))?"
)


def warp_instructions(kernel: CompiledKernel, trips: Sequence[int] = ()) -> int:
    """Instructions that each warp issues, counted in the machine code.

    Args:
        kernel: in PTX.
        trips: how often its loops run, see `executed`.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        _assemble(kernel, cubin)
        command = [str(TOOLS / "nvdisasm"), "-c", str(cubin)]
        return executed(subprocess.check_output(command, text=True), trips)


def executed(code: str, trips: Sequence[int]) -> int:
    """Instructions that run in nvdisasm's listing of a kernel. What is branched around counts.

    Args:
        code: the listing.
        trips: how often each loop runs, by where it starts; loops of one trip have no place in
            the code. Where the compiler left others than these, each counts as the longest.
    """
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []  # first instruction and the one past the last
    count = 0
    for line in code.splitlines():
        if line.startswith(".L_x_"):
            labels[line.rstrip(":")] = count
        elif (found := _INSTRUCTION.search(line)) is not None and found[1] != "NOP":
            start = labels.get(found[2])
            if start == count:
                continue  # a branch to itself stops what runs past the end
            count += 1
            if start is not None:
                loops.append((start, count))
    longer = [trip for trip in trips if trip > 1]
    if len(longer) != len(loops):
        longer = [max(trips, default=1)] * len(loops)
    times = [1] * count
    for (start, stop), trip in zip(sorted(loops), longer, strict=True):
        times[start:stop] = [trip * each for each in times[start:stop]]
    return sum(times)


def resident_programs(used: Resources, kernel: CompiledKernel) -> int:
    """Programs that a multiprocessor of compute capability 9.0 holds at a time."""
    warps = -(-kernel.threads // THREADS_PER_WARP)
    # Registers are given out to warps in steps of 8 a thread, from four files of 16,384.
    by_registers = 4 * (16384 // (-(-used.registers // 8) * 8 * THREADS_PER_WARP)) // warps
    by_memory = 227 * 1024 // (kernel.shared + 1024)
    return min(by_registers, by_memory, 64 // warps, 32)


def trips(launch: KernelLaunch) -> list[int]:
    """How often each loop of a kernel runs, in their order."""
    known: Any = launch.constants
    if launch.kernel in ("row_kernel", "column_kernel"):
        return [known["outputs"]]
    if launch.kernel in ("pool_kernel", "finish_kernel"):
        return [known["steps"], math.ceil(known["units"] / known["unit_block"])]
    if launch.kernel in ("gates_kernel", "attend_rows_kernel"):
        parts = math.ceil(known["splits"] * known["blocks"] / known["part_block"])
        averages = math.ceil(known["splits"] / known["split_block"])
        transform = [known["outputs"]] if launch.kernel == "attend_rows_kernel" else []
        return [parts, *transform, averages]
    if launch.kernel == "project_rows_kernel":
        return [math.ceil(known["width"] / known["pixel_block"])]
    if launch.kernel == "filter_columns_kernel":
        return [math.ceil(known["rows"] / known["inner_block"])]
    if launch.kernel == "modulate_rows_kernel":
        block, parts = known["inner_block"], known["parts"]
        return [math.ceil(parts * columns / block) for columns in known["columns"]]
    return []
