"""Which limit holds what is left: ``python -m benchmarks.limits``.

Counts, for the folded R50 backbone at 512×512, the multiplications and the bytes that each part
of the exported graph cannot avoid moving (every operator reads its inputs and writes its
output once, float32), and divides them by this machine's own rates, measured in the same run: a
large matrix product's, a product's with a matrix as small as the transform's stages, and an
addition's that neither operand nor result of fits a core's cache. The sum is a floor for a graph
of such operators; `benchmarks.layers` says what is really taken.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from onnx import helper

from benchmarks.cases import Case
from benchmarks.options import keep, script
from benchmarks.primitives import random, runner
from benchmarks.timing import interleave
from fdconv_deploy.folding.layer import FoldedConv, fold_layer
from fdconv_deploy.folding.network import input_sizes
from fdconv_deploy.latency import machine
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.ops.frequency_assembly.function import group_blocks

Counts = Counter[str]


def assembly(layer: FoldedConv) -> tuple[Counts, Counts]:
    """Multiplications and bytes of one layer's assembly, by kind of operator."""
    spectrum = layer.spectrum
    assert spectrum is not None
    columns, rows = spectrum.column_transform, spectrum.row_transform
    half = 2 * columns.length * rows.slots.size  # numbers: complex, one of two mirrored rows
    kernel = rows.length * columns.length
    blocks = group_blocks(spectrum.groups)
    multiplications, numbers = Counts(), Counts()
    for stage in (*columns.stages, *rows.stages):
        multiplications["transform"] += half * stage.shape[2]
        numbers["transform"] += 2 * half
    multiplications["transform"] += kernel * rows.outer.shape[1]
    numbers["transform"] += half + kernel
    numbers["transposition"] += 2 * half
    planes = spectrum.values.shape[0]
    numbers["attention, gathered"] += blocks.patterns.size + planes * half // 2
    numbers["attention, multiplied"] += planes * (half // 2 + half) + half
    if layer.local is not None:
        taps = layer.local.weight.shape[1]
        multiplications["local attention"] += kernel * taps
        numbers["local attention"] += kernel + 2 * kernel + 3 * kernel
    if layer.modulation.channel and layer.channel_side == "kernel":
        numbers["gates"] += 2 * kernel
    if layer.filter_side == "kernel":
        numbers["gates"] += 2 * kernel
    if layer.kernel_size[0] > 1:
        numbers["rows apart" if layer.by_rows else "transposition"] += 2 * kernel
    return multiplications, Counts({part: 4 * count for part, count in numbers.items()})


def bands(layer: FoldedConv) -> tuple[Counts, Counts]:
    """Multiplications and bytes of one layer's band modulation."""
    folded = layer.bands
    multiplications, numbers = Counts(), Counts()
    if folded is None:
        return multiplications, numbers
    channels, (height, width) = layer.in_channels, layer.input_size
    feature = channels * height * width
    projected = channels * height * folded.to_columns.shape[1]
    per_row = 2 if folded.complex_rows else 1
    columns = folded.to_columns.shape[1] // per_row
    kept = channels * folded.to_rows.shape[0] * columns
    work = feature * folded.to_columns.shape[1] + kept * folded.to_rows.shape[1]
    moved = feature + projected + projected + kept
    for band in folded.bands:
        back = channels * band.from_rows.shape[0] * band.columns
        work += back * band.rows + feature * band.from_columns.shape[0]
        moved += channels * band.rows * band.columns + 2 * back + feature
    multiplications["bands, transforms"] = work
    numbers["bands, transforms"] = 4 * moved
    taps = folded.conv_weight.shape[-1] ** 2 * folded.conv_weight.shape[0]
    multiplications["bands, maps"] = feature * taps
    numbers["bands, maps"] = 4 * (feature + taps * height * width)
    terms = folded.terms
    numbers["bands, weighing"] = 4 * (2 * terms * feature + 3 * (terms - 1) * feature)
    return multiplications, numbers


def rates(threads: int) -> dict[str, float]:
    """This machine's: multiplications and bytes per second."""
    product = [helper.make_node("MatMul", ["x", "a"], ["y"])]
    stage = [helper.make_node("MatMul", ["a", "x"], ["y"])]
    addition = [helper.make_node("Add", ["x", "a"], ["y"])]
    size, numbers = 1536, 1 << 22
    large = runner(product, {"x": random(size, size)}, {"a": random(size, size)}, threads)
    small = runner(stage, {"x": random(24, numbers // 24)}, {"a": random(24, 24)}, threads)
    added = runner(addition, {"x": random(numbers)}, {"a": random(numbers)}, threads)
    times = interleave({"large": large, "small": small, "added": added}, rounds=25)
    seconds = {name: float(np.median(taken)) for name, taken in times.items()}
    return {
        "large product, multiplications/s": size**3 / seconds["large"],
        "24×24 stage, multiplications/s": numbers // 24 * 24 * 24 / seconds["small"],
        "addition, bytes/s": 12 * numbers / seconds["added"],
    }


def main() -> None:
    options = script(__doc__).parse_args()
    machine.warn_if_busy()
    where = machine.describe(options.threads)
    measured = rates(options.threads)
    case = Case("backbone", 50, 512, 512, 1)
    network, x = case.make(), case.images()
    work, moved, weights = Counts(), Counts(), 0
    for name, size in input_sizes(network, x).items():
        layer = fold_layer(dynamic_layers(network)[name], size, name=name)
        weights += layer.out_channels * layer.in_channels * int(np.prod(layer.kernel_size))
        for count in (assembly, bands):
            multiplications, numbers = count(layer)
            work += multiplications
            moved += numbers
    print(f"{case.title}: {weights / 1e6:.1f} million dynamic weights")
    for name, rate in measured.items():
        print(f"  {name:36} {rate / 1e9:7.1f} G")
    print(f"{'part':24} {'GMAC':>7} {'GB':>7} {'product ms':>11} {'moving ms':>10}")
    large = measured["large product, multiplications/s"]
    moving = measured["addition, bytes/s"]
    table = {}
    for part in sorted(moved, key=lambda part: -moved[part]):
        by_work, by_bytes = 1e3 * work[part] / large, 1e3 * moved[part] / moving
        table[part] = {
            "multiplications": work[part],
            "bytes": moved[part],
            "product_ms": round(by_work, 2),
            "moving_ms": round(by_bytes, 2),
        }
        print(
            f"{part:24} {work[part] / 1e9:7.2f} {moved[part] / 1e9:7.3f} "
            f"{by_work:11.1f} {by_bytes:10.1f}"
        )
    totals = [sum(row[key] for row in table.values()) for key in ("product_ms", "moving_ms")]
    print(
        f"{'all':24} {sum(work.values()) / 1e9:7.2f} {sum(moved.values()) / 1e9:7.3f} "
        f"{totals[0]:11.1f} {totals[1]:10.1f}"
    )
    floor = sum(max(row["product_ms"], row["moving_ms"]) for row in table.values())
    print(f"the larger of the two, part by part: {floor:.0f} ms")
    result = {
        "case": case.title,
        "dynamic_weights": weights,
        "rates": measured,
        "parts": table,
        "floor_ms": round(floor, 1),
    }
    keep(options, "limits", where, result)


if __name__ == "__main__":
    main()
