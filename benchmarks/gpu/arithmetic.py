"""What an FDConv ResNet-50 moves and computes at 512×512, and the time that takes at least.

    python -m benchmarks.gpu.arithmetic            # writes docs/performance.md
    python -m benchmarks.gpu.arithmetic --print

Counts come from the kernels' own launch descriptions; times from four rates, stated in the
text. Measured times come from a record of `benchmarks/gpu.sh` where there is one.
"""

# ruff: noqa: E501 - a page's tables
from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.shapes import RESNET50, LayerShape, layer_sizes, local_taps
from fdconv_deploy.ops.frequency_assembly.launch import (
    Transform,
    column_transform,
    half_shape,
    pass_radix,
    transform_of,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"

MEMORY = 4.3e12  # bytes/s: measured copy on an H200, reads and writes counted
CACHE = 5.5e12  # bytes/s through the second-level cache: assumed
ARITHMETIC = 20e12  # float32 operations/s: assumed, a third of the data sheet's 67e12
START = 2e-6  # s per kernel: start, first bytes, last wave: assumed
HALF, FLOAT = 2, 4  # bytes


@dataclass(frozen=True)
class Cost:
    """Of one kernel: bytes from and to memory, bytes through the cache alone, operations."""

    memory: float
    cache: float
    operations: float

    @property
    def predicted(self) -> float:
        """Seconds."""
        work = max(self.memory / MEMORY, self.cache / CACHE, self.operations / ARITHMETIC)
        return work + START


def _per_point(transform: Transform) -> float:
    """Operations per complex point: the odd part, butterflies, twiddles between passes."""
    odd = 8 * (transform.odd - 1) + 6 if transform.odd > 1 else 0
    passes, left = 1, transform.power
    while (radix := pass_radix(left, transform.limit)) < left:
        left //= radix
        passes += 1
    # A twiddle is a product, and on average another for its power.
    return odd + 5 * math.log2(transform.power) + 12 * (passes - 1)


def costs(shape: LayerShape, out_bytes: int = HALF) -> tuple[Cost, Cost]:
    """Of the row and the column kernel at batch 1."""
    sizes = layer_sizes(shape.out_channels, shape.in_channels, shape.kernel)
    rows, columns = transform_of(sizes.rows), column_transform(sizes.columns, shape.kernel)
    assert rows is not None
    assert columns is not None
    constants = sizes.rows * sizes.tiles * sizes.width
    between = FLOAT * math.prod(half_shape(sizes))
    first = Cost(9 * constants, between, constants * (_per_point(rows) + 4))
    epilogue = shape.weights * (2 * local_taps(shape.in_channels) + 12)
    second = Cost(
        out_bytes * shape.weights, between, shape.weights / 2 * _per_point(columns) + epilogue
    )
    return first, second


def floor(shape: LayerShape, out_bytes: int = HALF) -> float:
    """Seconds: the spectrum read once, the kernel written once, at the copy's rate."""
    first, second = costs(shape, out_bytes)
    return (first.memory + second.memory) / MEMORY


def bands_floor(shape: LayerShape, out_bytes: int = HALF) -> float:
    """Seconds: the combination reads the input and three low-passes and writes its output."""
    return 5 * out_bytes * shape.in_channels * shape.feature**2 / MEMORY


def convolution(shape: LayerShape) -> float:
    """Operations of the convolution itself."""
    return 2 * shape.weights * (shape.feature // shape.stride) ** 2


def measured() -> tuple[str, dict[str, dict[str, float]]]:
    """The newest record's name, and its times in µs by layer and kernel; empty if none."""
    records = sorted(RESULTS.glob("*-gpu-*.json"))
    for path in reversed(records):
        record = json.loads(path.read_text())
        if record.get("kernels") and not record.get("dry_run"):
            rows = [r for r in record["kernels"] if r["batch"] == 1 and r["dtype"] == "float16"]
            return path.name, {r["layer"]: r["us"] for r in rows}
    return "", {}


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def table() -> tuple[str, str]:
    """The layers' table, and the sums beneath it."""
    name, times = measured()
    head = (
        "| layer | × | weights | spectrum MB | between MB | kernel MB | MFLOP rows | MFLOP columns "
        "| floor µs | rows µs | columns µs | measured rows | measured columns |"
    )
    lines = [head, "|" + "---|" * 13]
    total = dict.fromkeys(("floor", "predicted", "weights"), 0.0)
    for shape in RESNET50:
        first, second = costs(shape)
        seen = times.get(str(shape), {})
        cells = [
            str(shape), str(shape.count), f"{shape.weights / 1e6:.3f} M",
            f"{first.memory / 1e6:.2f}", f"{first.cache / 1e6:.2f}", f"{second.memory / 1e6:.2f}",
            f"{first.operations / 1e6:.1f}", f"{second.operations / 1e6:.1f}",
            _us(floor(shape)), _us(first.predicted), _us(second.predicted),
            *(f"{seen[k]:.1f}" if k in seen else "not run yet" for k in ("rows", "columns")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
        total["floor"] += shape.count * floor(shape)
        total["predicted"] += shape.count * (first.predicted + second.predicted)
        total["weights"] += shape.count * shape.weights
    by_bands = sum(s.count * bands_floor(s) for s in RESNET50 if s.kernel == 3)
    convolutions = sum(s.count * convolution(s) for s in RESNET50)
    largest = RESNET50[-1]
    first, second = costs(largest)
    share = floor(largest) / (first.predicted + second.predicted)
    starts = 2 * START * sum(s.count for s in RESNET50)
    alone = floor(largest) / (first.predicted + second.predicted - 2 * START)
    sums = f"""All {sum(s.count for s in RESNET50)} layers hold {total["weights"] / 1e6:.1f} M weights. Their floors add up to
{total["floor"] * 1e6:.0f} µs an image, the predictions to {total["predicted"] * 1e6:.0f} µs, of which the start of the kernels is {starts * 1e6:.0f}. The
band combination of the 16 3×3 layers moves {by_bands * MEMORY / 1e6:.0f} MB, {by_bands * 1e6:.0f} µs at the copy's rate. The
convolutions themselves are {convolutions / 1e9:.1f} GFLOP.

For {largest} the two kernels are predicted at {share:.0%} of the memory floor, {alone:.0%} without their
starts: by this count float32 arithmetic, not memory, is what they wait for, and the aim of 60 %
is out of reach without fewer operations or a much better rate than assumed."""
    sums += f"\n\nMeasured: `benchmarks/results/{name}`." if name else ""
    return "\n".join(lines), sums


def page() -> str:
    """The whole page."""
    rows, sums = table()
    return f"""# What the GPU kernels cost, by arithmetic

*Written by `python -m benchmarks.gpu.arithmetic`; a test holds it to that script. **No GPU has
run these kernels yet**: times are predictions until `benchmarks/gpu.sh` has been run, and its
record fills the last two columns.*

ResNet-50, `kernel_num` 64, 512×512, batch 1, weights written in float16, channels last.

## Two kernels a layer

| | reads | computes | writes |
|---|---|---|---|
| rows | spectrum (8 bytes a bin), group map (1 byte), attentions | weighs, inverts along O·kh | half-transformed matrix, 8 bytes a bin |
| columns | that, from the second-level cache | inverts along I·kw onto real numbers, all modulations | the convolution's weights |

The spectrum is half of the kernel matrix in complex numbers: 4.5 bytes a weight with its map.
The half-transformed matrix is as large and stays in the cache (50 MB and more on the large
GPUs; the largest layer's is 9.5 MB). What must cross memory is the spectrum once and the
kernels once: that is the floor.

A row program owns a tile of two or four columns, all rows, and its constants lie in the order it
reads them. It writes for each block of 2 to 8 rows one stretch of 32 to 128 bytes, and a column
program reads such a block as one piece. A column program inverts two real rows in one complex
transform, so it has whole rows, and the local attention costs it a handful of loads a row and a
window a column. A batch reads the spectrum from memory once if it stays cached: the images are
the grid's fastest axis.

Transforms run in registers, as butterflies on float32, not on tensor cores: a length of 1536
takes some 60 operations a point as a fast transform; as three-stage matrix products it would
take 320, and three times that to keep float32's accuracy on TF32 units. Each layer's error
against float64 stays under 8e-7 of the largest value in the interpreter (2e-6 is asked).

Lengths: T·2^a with T odd up to 27 run in registers, which covers 3·2^a, 9·2^a and every length of
the published networks. Others (and kernel widths that do not divide T) take a dense product:
correct, not fast.

## Registers and spills

`python -m benchmarks.gpu.resources` compiles every layer's kernels with the ptxas in Triton's
wheel; [the table](../benchmarks/results/2026-11-22-kernel-resources.md) has no spill on any
target from sm_75 to sm_120.

## Layers

floor = (spectrum + map + kernel) / {MEMORY / 1e12:.1f} TB/s, the copy measured on an H200. A prediction is
the longest of memory ({MEMORY / 1e12:.1f} TB/s), cache ({CACHE / 1e12:.1f} TB/s, assumed) and float32 arithmetic
({ARITHMETIC / 1e12:.0f} TFLOP/s, assumed: a third of the data sheet), plus {START * 1e6:.0f} µs a kernel to start and to
drain (assumed).

{rows}

{sums}

## What the predictions leave out

The small matrix products of the attentions, the band modulation's four or more products a layer,
the layout of PyTorch's NCHW kernels (a float32 kernel written as (O, I, 3, 3) touches each
32-byte sector several times; channels last does not), and everything that waits on anything
else. Short layers (64→64) are all start-up: a CUDA graph takes the launches off the CPU, not
off the GPU.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="to standard output, not the page")
    if parser.parse_args().print:
        print(page(), end="")
    else:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
