"""What an FDConv ResNet-50 costs on a GPU beside a plain one, by counting: docs/performance.md.

    python -m benchmarks.gpu.arithmetic            # counts again, writes the record and the page

Launches are counted on fake tensors, instructions and occupancy in machine code; rates are
assumed and stated in the text. Measured times come from a record of `benchmarks/gpu.sh` where
there is one.
"""

# ruff: noqa: E501 - a page's tables
from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.run import summarise
from benchmarks.gpu.shapes import RESNET50, LayerShape, layer_sizes
from benchmarks.records import write_json

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
RECORD = RESULTS / "kernel-costs.json"

MEMORY = 4.3e12  # bytes/s: measured copy on an H200, reads and writes counted
RATES = {"H100": 3.0e12, "H200": MEMORY}
START = (
    2e-6  # s from a kernel's start to the next one's in a CUDA graph, if it does next to nothing
)
# The same where a kernel of this package starts while the one before it ends: assumed.
START_EARLY = 1.2e-6
CLOCK = 1.755e9  # Hz under load
MULTIPROCESSORS = 132
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction a cycle
ALONE = 2.5  # cycles between instructions of a warp that has its scheduler for itself
TILE = 64  # rows and columns of a product's tile
TENSOR_CORES = 0.5 * 989e12 / MULTIPROCESSORS  # float16 operations/s of one multiprocessor
NETWORKS = {"plain": None, "FDConv": 64}


@dataclass(frozen=True)
class Cost:
    """Bytes that one kernel must move from or to memory."""

    memory: float


def costs(shape: LayerShape, out_bytes: int = 2) -> tuple[Cost, Cost]:
    """The floor of a layer's assembly at batch 1: the spectrum and its map read, the kernel written."""
    sizes = layer_sizes(shape.out_channels, shape.in_channels, shape.kernel)
    return Cost(9 * sizes.rows * sizes.tiles * sizes.width), Cost(out_bytes * shape.weights)


def floor(shape: LayerShape, out_bytes: int = 2) -> float:
    """Seconds of that at an H200's copy's rate."""
    first, second = costs(shape, out_bytes)
    return (first.memory + second.memory) / MEMORY


@dataclass(frozen=True)
class Kernel:
    """Launches that are alike; None where it is not a Triton kernel, or not a product.

    operator: PyTorch's or the Triton kernel's name. count: launches. read, written: bytes of one.
    product: matrices, rows, columns and inner length. programs, warps: of one launch, and warps of
    a program. registers: of a thread. resident: programs that a multiprocessor holds.
    instructions: of a warp. early: whether it starts while the kernel before it ends.
    """

    operator: str
    count: int
    read: int
    written: int
    product: tuple[int, int, int, int] | None = None
    programs: int | None = None
    warps: int | None = None
    registers: int | None = None
    resident: int | None = None
    instructions: int | None = None
    early: bool = False

    @property
    def start(self) -> float:
        """Seconds that it takes if it does next to nothing."""
        return START_EARLY if self.early else START

    def seconds(self, gpu: str) -> float:
        """Predicted time of one launch."""
        return self.start + max((self.read + self.written) / RATES[gpu], self.work)

    @property
    def work(self) -> float:
        """Seconds of arithmetic and of issuing instructions."""
        if self.product is not None:
            matrices, rows, columns, inner = self.product
            tiles = matrices * math.ceil(rows / TILE) * math.ceil(columns / TILE)
            waves = math.ceil(tiles / MULTIPROCESSORS)
            return waves * 2 * TILE**2 * inner / TENSOR_CORES
        if self.programs is None:
            return 0.0
        assert self.warps is not None
        assert self.resident is not None
        assert self.instructions is not None
        each = math.ceil(self.programs / MULTIPROCESSORS)
        issued = each * self.warps * self.instructions / SCHEDULERS
        alone = math.ceil(each / self.resident) * self.instructions * ALONE
        return max(issued, alone) / CLOCK


def counted(kernel_num: int | None) -> dict[str, Any]:
    """The kernels of a fused half-precision ResNet-50, 512×512, batch 1; those alike together.

    Returns:
        ``kernels``, and ``forks``: places of kernels on a stream beside, and of those meanwhile.
    """
    from benchmarks.gpu.launches import resnet50
    from benchmarks.gpu.resources import resident_programs, resources, trips, warp_instructions
    from fdconv_deploy.ops.compile_kernels import compile_kernel

    places: dict[Any, int] = {}
    found: list[dict[str, Any]] = []
    forks: list[list[list[int]]] = []
    joined, follows = True, {False: False, True: False}
    for one in resnet50(kernel_num):
        constants = None if one.launch is None else tuple(sorted(one.launch.constants.items()))
        if one.beside and joined:
            joined, follows = False, {False: False, True: False}
            forks.append([[], []])
        # Only behind another of these kernels, which lets it, and on the same stream.
        early = one.launch is not None and follows[one.beside]
        follows[one.beside] = one.launch is not None
        key = one, constants, early
        if key not in places:
            places[key] = len(found)
            kernel = Kernel(one.operator, 0, one.read, one.written, one.product, early=early)
            if one.launch is not None:
                compiled = compile_kernel(one.launch.early(), 90)
                used = resources(compiled)
                assert used.spill_stores == used.spill_loads == 0, f"{one.operator} spills"
                kernel = replace(
                    kernel,
                    programs=math.prod(one.launch.grid(one.batch)),
                    warps=-(-compiled.threads // 32),
                    registers=used.registers,
                    resident=resident_programs(used, compiled),
                    instructions=warp_instructions(compiled, trips(one.launch)),
                )
            found.append(asdict(kernel))
        found[places[key]]["count"] += 1
        if one.beside:
            forks[-1][0].append(places[key])
        elif not joined:
            joined = one.launch is None  # the convolution that reads both
            if not joined:
                forks[-1][1].append(places[key])
    return {"kernels": found, "forks": forks}


def count() -> dict[str, Any]:
    """The record: both networks' kernels, and by which versions."""
    import torch
    import triton

    networks = {name: counted(groups) for name, groups in NETWORKS.items()}
    return {"torch": torch.__version__, "triton": triton.__version__, "networks": networks}


def kernels_of(record: dict[str, Any], network: str) -> list[Kernel]:
    """A network's kernels in a record."""
    rows = record["networks"][network]["kernels"]
    return [Kernel(**row | {"product": row["product"] and tuple(row["product"])}) for row in rows]


def predicted(
    record: dict[str, Any],
    network: str,
    gpu: str,
    *,
    early: bool = True,
    ends: bool = True,
    beside: bool = True,
) -> float:
    """Seconds of one image: of what runs side by side the longer counts.

    early: as recorded; else no kernel starts while another one ends. ends: with those of
    convolutions. beside: as recorded; else one kernel runs at a time.
    """
    kernels = kernels_of(record, network)
    if not early:
        kernels = [replace(kernel, early=False) for kernel in kernels]
    if not ends:
        kernels = [replace(k, count=k.count * (k.operator != "finish_kernel")) for k in kernels]
        # Attentions come behind a convolution then, which lets nothing start early.
        follow = "attend_rows_kernel"
        kernels = [replace(k, early=k.early and k.operator != follow) for k in kernels]
    total = sum(kernel.count * kernel.seconds(gpu) for kernel in kernels)
    for sides in record["networks"][network]["forks"] if beside else ():
        total -= min(sum(kernels[place].seconds(gpu) for place in side) for side in sides)
    return total


def measured() -> tuple[str, list[dict[str, Any]]]:
    """The newest record of a GPU, and its half-precision rows of batch 1; empty if none."""
    for path in sorted(RESULTS.glob("*-gpu-*.json"), reverse=True):
        record = json.loads(path.read_text())
        if record.get("networks") and not record.get("dry_run"):
            rows = [r for r in record["networks"] if (r["batch"], r["dtype"]) == (1, "float16")]
            return path.name, summarise(rows)
    return "", []


def _networks(record: dict[str, Any]) -> str:
    lines = [
        "| | kernels | MB moved | GFLOP in products | start of kernels ms | H100 ms | H200 ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    times = {}
    for name in NETWORKS:
        kernels = kernels_of(record, name)
        launches = sum(k.count for k in kernels)
        moved = sum(k.count * (k.read + k.written) for k in kernels) / 1e6
        flops = sum(2 * k.count * math.prod(k.product) for k in kernels if k.product) / 1e9
        times[name] = [predicted(record, name, gpu) * 1e3 for gpu in RATES]
        cells = [
            name,
            str(launches),
            f"{moved:,.0f}",
            f"{flops:.1f}",
            f"{sum(k.count * k.start for k in kernels) * 1e3:.2f}",
        ]
        lines.append("| " + " | ".join(cells + [f"{ms:.2f}" for ms in times[name]]) + " |")
    ratios = [f"{b / a:.2f}×" for a, b in zip(times["plain"], times["FDConv"], strict=True)]
    lines.append(f"| **FDConv vs. plain** | | | | | **{ratios[0]}** | **{ratios[1]}** |")
    for what, given in (
        ("if no kernel started early", {"early": False}),
        ("if nothing ran side by side", {"beside": False}),
        ("if the ends of convolutions cost nothing in either", {"ends": False}),
    ):
        fdconv, plain = (
            [predicted(record, network, gpu, **given) for gpu in RATES]
            for network in ("FDConv", "plain")
        )
        ratios = [f"{b / a:.2f}×" for a, b in zip(plain, fdconv, strict=True)]
        lines.append(f"| {what} | | | | | {ratios[0]} | {ratios[1]} |")
    return "\n".join(lines)


def _operators(record: dict[str, Any]) -> str:
    lines = ["| kernel | plain | FDConv | plain µs | FDConv µs |", "|---|---:|---:|---:|---:|"]
    totals: dict[str, dict[str, tuple[int, float]]] = {}
    for network in NETWORKS:
        for kernel in kernels_of(record, network):
            launches, seconds = totals.setdefault(kernel.operator, {}).get(network, (0, 0.0))
            more = kernel.count * kernel.seconds("H200")
            totals[kernel.operator][network] = launches + kernel.count, seconds + more
    for name, by in sorted(totals.items(), key=lambda one: -one[1].get("FDConv", (0, 0.0))[1]):
        sides = [by.get(network) for network in NETWORKS]
        cells = [str(s[0]) if s else "" for s in sides]
        cells += [f"{s[1] * 1e6:.0f}" if s else "" for s in sides]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _triton(record: dict[str, Any]) -> str:
    lines = [
        "| kernel | launches | programs | warps a program | registers | programs an SM holds | instructions a warp | µs each |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    own = [k for k in kernels_of(record, "FDConv") if k.programs is not None]
    for name in dict.fromkeys(k.operator for k in own):
        group = [k for k in own if k.operator == name]

        def span(values: list[Any], form: str = ",") -> str:
            low, high = format(min(values), form), format(max(values), form)
            return low if low == high else f"{low} to {high}"

        cells = [f"`{name}`", str(sum(k.count for k in group))]
        fields = ("programs", "warps", "registers", "resident", "instructions")
        cells += [span([getattr(k, field) for k in group]) for field in fields]
        cells.append(span([k.seconds("H200") * 1e6 for k in group], ".1f"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _tensorrt(record: dict[str, Any]) -> str:
    from benchmarks.gpu import tensorrt_kernels

    engine = json.loads(tensorrt_kernels.RECORD.read_text())
    nodes, least, most = (engine["FDConv"][key] for key in ("nodes", "least", "most"))
    fused = sum(k.count for k in kernels_of(record, "FDConv"))
    layers, bands = nodes["FrequencyAssemblyRows"], nodes["FrequencyBandCombination"]
    assembled = json.loads(tensorrt_kernels.TARGETS.read_text())
    return f"""## TensorRT

A float16 ResNet-50's engine, counted in the graph that `fdconv build` hands over (`python -m
benchmarks.gpu.tensorrt_kernels`). TensorRT decides on the GPU what it fuses: at least, if every pointwise
operator and every copy becomes part of a neighbour; at most, if each chain of pointwise operators and
each copy is a kernel.

{tensorrt_kernels.table(engine)}

Plugins are {2 * layers + bands} of them: two a layer for the assembly, one for each band modulation. An attention's
average, hidden layer, heads and LayerNorm, and the bands' low-passes, are TensorRT's own operators. So an
engine starts {least / fused:.1f} to {most / fused:.1f} times as many kernels as `fuse_network` ({fused}), {(least - fused) * START * 1e3:.1f} to {(most - fused) * START * 1e3:.1f} ms an image more at {START * 1e6:.0f} µs each.
Attentions and low-passes in this package's kernels, as `fuse_network` has them, would need plugins that are
not written.

Registers of a thread, and the most shared memory of a program, of every kernel that such a build may
hold, in both layouts and in float16 and float32, by ptxas {assembled["ptxas"]} (`python -m
tests.real_packages.cuda_toolkit.check`):

{tensorrt_kernels.target_table(assembled)}"""


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def page(record: dict[str, Any]) -> str:
    """The whole page."""
    name, rows = measured()
    seen = "\n".join(
        f"| {r['backend']} | {r['ms']:.3f} | {_or_dash(r['baseline_ms'])} | {_or_dash(r['vs_baseline'])} |"
        for r in rows
    )
    head = (
        f"| measured (`{name}`) | FDConv ms | plain ms | FDConv vs. plain |\n|---|---:|---:|---:|"
    )
    measurements = f"\n{head}\n{seen}\n" if seen else ""
    floors = sum(s.count * floor(s) for s in RESNET50)
    return f"""# What the GPU kernels cost, by counting

*Written by `python -m benchmarks.gpu.arithmetic`; tests hold it to its record and the record's counts to
the networks. **No GPU has run these kernels yet**: times are predictions until `benchmarks/gpu.sh` has
been run. The 300 µs an image that stood here before are withdrawn: they counted the 96 kernels that
assemble weights and none of the others.*

ResNet-50, `kernel_num` 64, 512×512, batch 1, float16, channels last, as `fuse_network` runs it in a CUDA
graph, beside a plain ResNet-50 that `fuse_network` made as well. Ends of convolutions are bias, shortcut,
ReLU and pooling: an inference engine makes them in the convolutions, of both networks.

{_networks(record)}
{measurements}
## How it is counted

- **Launches** (`python -m benchmarks.gpu.launches`): the fused network runs on fake tensors, and every
  operator that does work is a kernel; a convolution's bias is one more, which PyTorch adds after cuDNN.
- **Instructions, registers, occupancy**: every Triton kernel is compiled for sm_90a, assembled by ptxas
  and disassembled; loops count as often as they run. None spills there. `tests/ops/gpu/test_compile.py` holds it
  for every GPU from 7.5 on: the assembly's kernels at a ResNet-50's sizes (slow tests), the others at small ones.
- **Time of a kernel**: {START * 1e6:.0f} µs from its start to the next one's in a CUDA graph, {START_EARLY * 1e6:.1f} where one of this package's
  kernels starts while another one ends (both assumed), and the longest of
  - its tensors' bytes at the copy's rate: {RATES["H100"] / 1e12:.1f} TB/s on an H100, {RATES["H200"] / 1e12:.1f} on an H200, and what each program of
    `attend_rows_kernel` reads for itself for every one. At batch 1 much of it stays in the second-level cache,
    which is faster: this counts against both networks alike;
  - of a product or convolution: tiles of {TILE}×{TILE}, one a multiprocessor at a time, at half of the tensor cores' rate
    (assumed);
  - of a Triton kernel: instructions over {MULTIPROCESSORS} multiprocessors' {SCHEDULERS} schedulers at {CLOCK / 1e9:.3f} GHz, and no faster than one in {ALONE}
    cycles for each warp (assumed).

A band modulation runs on a stream beside its layer's attentions and assembly: of the two, the longer
counts, as if neither slowed the other down. The sums by kernel below count both. Of a kernel whose programs do one of two things, the
instructions of both count for each.

## By kernel

Launches an image, and predicted µs on an H200:

{_operators(record)}

## Kernels of this package

{_triton(record)}

{_tensorrt(record)}

## Assembly

The convolution before has pooled its output, in up to 128 parts of the hidden layer. The spectrum is half
of the kernel matrix in complex numbers: 4.5 bytes a weight with its map. A first kernel's programs each
add up the parts and make the attentions that weigh it, 64 numbers, for themselves, which takes less than
another kernel's start; and each makes a few of the gates for the second kernel. They invert the spectrum along
O·kh; what they write stays in the second-level cache (50 MB and more on the large GPUs; the largest
layer's is 9.5 MB). The second kernel inverts along I·kw onto real numbers, two rows in one complex
transform, applies all modulations and writes the convolution's weights. What must cross memory is the
spectrum once and the kernels once: all 48 layers' floors add up to {floors * 1e6:.0f} µs an image at {MEMORY / 1e12:.1f} TB/s.

Transforms run in registers, as butterflies on float32, not on tensor cores: a length of 1536 takes some
60 operations a point as a fast transform; as three-stage matrix products it would take 320, and three
times that to keep float32's accuracy on TF32 units. Each layer's error against float64 stays under 8e-7
of the largest value in the interpreter (2e-6 is asked).

Lengths: T·2^a with T odd up to 27 run in registers, which covers 3·2^a, 9·2^a and every length of the
published networks. Others (and kernel widths that do not divide T) take a dense product: correct, not
fast.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="write the page of the record there is")
    if not parser.parse_args().page:
        write_json(RECORD, count())
    text = page(json.loads(RECORD.read_text()))
    PAGE.write_text(text)
    print(text[text.index("| | kernels") : text.index("## How")])


if __name__ == "__main__":
    main()
