"""Tables and a plot of what was measured: ``python -m benchmarks.report``.

Reads the newest record of each kind in ``benchmarks/results`` and writes
``docs/performance-cpu.md`` and ``docs/cost.svg``. Nothing is measured here, and what was not
measured is left out or said to be missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import BATCHES, DEPTHS, NETWORKS, SIZES, Case, grid, sweep
from benchmarks.families import NETWORKS as FAMILIES
from benchmarks.native_costs import KINDS
from benchmarks.plot import draw
from benchmarks.records import FOLDER, every, newest
from benchmarks.speed import OPENVINO
from benchmarks.speed import SIDES as EVERY
from fdconv_deploy.atomic_write import write_atomically
from fdconv_deploy.latency import machine

DOCS = machine.ROOT / "docs"
SIDES = {s: name for s, name in EVERY.items() if s not in (*OPENVINO, "native_nchw")}
NAMES = {"backbone": "ResNet backbone", "upernet": "UPerNet, 150 classes"}
_SMALL = dict(height=512, width=512, batch=1)
BACKBONE, UPERNET = Case("backbone", 50, **_SMALL), Case("upernet", 50, **_SMALL)

Cases = dict[str, dict[str, Any]]


def markdown(
    matrix: dict[str, Any],
    batches: Sequence[dict[str, Any]] = (),
    costs: dict[str, Any] | None = None,
    families: Sequence[dict[str, Any]] = (),
) -> str:
    """The report of a matrix record, with what other records there are.

    :param batches: of ``benchmarks.batches``, the last first; of each network the last is shown.
    :param costs: of ``benchmarks.native_costs``.
    :param families: of ``benchmarks.families``, the last first; of each network the last is shown.
    """
    batches = list({b["title"]: b for b in reversed(batches) if "sides" in b}.values())
    cases: Cases = matrix["cases"]
    commits = sorted({result["commit"] for result in cases.values() if "commit" in result})
    parts = [
        "# What FDConv costs on a CPU\n",
        f"{machine.say(matrix['machine'])}. Written by `python -m benchmarks.report` from "
        "`benchmarks.matrix`.\n",
        "Milliseconds are medians of interleaved runs in one process, quartiles in brackets; "
        "ratios are of medians. Random weights that behave as trained ones, kernel_num 64. "
        "\\* marks cases during which other processes had over "
        f"{machine.QUIET:.0%} of the CPUs. Measured at commit {', '.join(commits)}; a + is a tree "
        "with changes of its own.\n",
        "![Milliseconds of one image through FDConv as published, exported, and the "
        "baseline](cost.svg)\n",
        *_section("Limits set beforehand", _limits(cases, batches)),
    ]
    for network in NETWORKS:
        parts += _section(NAMES[network], _costs(cases, network))
    parts += _section("In OpenVINO, in the same runs", _openvino(cases))
    parts += _section("Four images beside one", _batches(batches))
    parts += _section("Image size (R50 backbone, batch 1)", _sizes(cases))
    parts += _section("kernel_num (R50 backbone, 512×512, batch 1)", _kernel_nums(cases))
    parts += _section("Exports", _exports(cases))
    parts += _section("Every family at full size", _families(families))
    parts += _section("Not measured", _missing(cases))
    if costs is not None:
        parts += _section(f"What is left, native operators ({costs['title']})", _left(costs))
    return "\n".join(parts)


def _section(title: str, lines: Iterator[str]) -> list[str]:
    """A heading and its table; nothing where there is nothing to show."""
    found = list(lines)
    return [f"## {title}\n", *found, ""] if found else []


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(*titles: str) -> Iterator[str]:
    yield _row(*titles)
    yield "|" + "|".join(["---"] * len(titles)) + "|"


def _measured(cases: Cases, wanted: Sequence[Case]) -> list[dict[str, Any]]:
    found = (cases.get(case.key, {}) for case in wanted)
    return [result for result in found if "ms" in result]


def _ms(result: dict[str, Any], side: str) -> str:
    if side not in result["ms"]:
        return "–"  # native operators that were not built, or records from before there were any
    ms = result["ms"][side]
    return f"{ms['median']:.0f} [{ms['q1']:.0f}–{ms['q3']:.0f}]"


def _ratio(result: dict[str, Any], name: str) -> str:
    return f"{result['ratios'][name]['value']:.2f}" if name in result["ratios"] else "–"


def _noise(result: dict[str, Any]) -> str:
    return "\\*" if (result["others_cpu"] or 0) > machine.QUIET else ""


def _limits(cases: Cases, batches: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows = []
    for case, limits in (
        (BACKBONE, {"exported/eager": 0.33, "exported/plain": 2.0}),
        (UPERNET, {"exported/eager": 0.65, "exported/plain": 1.12}),
    ):
        for result in _measured(cases, [case]):
            for name in (*limits, *(f"native{limit.removeprefix('exported')}" for limit in limits)):
                if name in result["ratios"]:
                    limit = limits[name.replace("native", "exported")]
                    value = result["ratios"][name]["value"]
                    rows.append(
                        (f"{result['title']}: {name}", f"{limit}×", f"{value}×", value <= limit)
                    )
            export = result["export"]
            for what, key, limit, unit in (
                ("export seconds", "export_seconds", 45, "s"),
                ("export peak memory", "peak_mb", 4096, "MB"),
            ):
                if case is UPERNET:
                    value = export[key]
                    asked, found = f"{limit} {unit}", f"{value} {unit}"
                    rows.append((f"{result['title']}: {what}", asked, found, value <= limit))
    for batch in batches:
        for side in ("portable", "native"):
            if side in batch["sides"]:
                value = batch["sides"][side]["of one"]["divided"]["value"]
                name = f"{_untold(batch)}: four images over one, {side}"
                rows.append((name, "4.0×", f"{value:.2f}×", value <= 4.0))
    if rows:
        yield from _head("", "at most", "measured", "")
        for name, limit, found, held in rows:
            yield _row(name, limit, found, "held" if held else "**missed**")


def _costs(cases: Cases, network: str) -> Iterator[str]:
    results = _measured(cases, grid([network], DEPTHS, SIZES, BATCHES))
    if not results:
        return
    compared = [f"{a}/{b}" for a in ("exported", "native") for b in ("eager", "plain")]
    yield from _head("", *SIDES.values(), *(name.replace("/", " / ") for name in compared))
    order = ("depth", "height", "width", "batch")
    for result in sorted(results, key=lambda found: [found["case"][key] for key in order]):
        case = result["case"]
        size = f"{case['height']}×{case['width']}"
        name = f"R{case['depth']}, {size}, batch {case['batch']}{_noise(result)}"
        ratios = (_ratio(result, name) for name in compared)
        yield _row(name, *(_ms(result, side) for side in SIDES), *ratios)


def _openvino(cases: Cases) -> Iterator[str]:
    results = [r for r in _measured(cases, grid()) if set(OPENVINO) & set(r["ms"])]
    if not results:
        return
    yield (
        "Ratios are to FDConv in ONNX Runtime with native operators; errors are the largest "
        "difference from PyTorch, of the largest value.\n"
    )
    yield from _head("", "", "ms", "processor ms", "/ native", "error")
    for result in results:
        for side in ("plain", "native", "native_nchw", *OPENVINO):
            error = result["errors"].get(side)
            yield _row(
                f"{result['title']}{_noise(result)}",
                EVERY[side],
                _ms(result, side),
                f"{result['cpu_ms'][side]['median']:.0f}" if side in result["cpu_ms"] else "–",
                _ratio(result, f"{side}/native"),
                "" if error is None else f"{error:.1e}",
            )


def _untold(batch: dict[str, Any]) -> str:
    """A record's title without its batch."""
    return str(batch["title"].rsplit(",", 1)[0])


def _batches(batches: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not batches:
        return
    yield (
        "Both ways in one process, by `benchmarks.batches`: the graph of batch 4, and the way that "
        "`warm_up()` measured to be the cheaper one, which `run` takes.\n"
    )
    yield from _head(
        "", "one image", "graph of four", "of one", "four by `run`", "of one", "its way"
    )
    for batch in batches:
        for side, found in batch["sides"].items():
            of_one = (f"{found['of one'][way]['value']:.2f}" for way in ("graph", "divided"))
            times = [_ms(found, way) for way in ("one", "graph", "divided")]
            yield _row(
                f"{_untold(batch)}, {'baseline' if side == 'plain' else side}{_noise(batch)}",
                *times[:2],
                next(of_one),
                times[2],
                next(of_one),
                found["ways"]["4"],
            )


def _sizes(cases: Cases) -> Iterator[str]:
    results = _measured(cases, sweep("size"))
    if len(results) < 2:
        return
    sides = ("eager", "exported", "native", "plain")
    yield from _head(
        "image", *(SIDES[side] for side in sides), "portable / plain", "native / plain"
    )
    for result in results:
        case = result["case"]
        yield _row(
            f"{case['height']}×{case['width']}{_noise(result)}",
            *(_ms(result, side) for side in sides),
            _ratio(result, "exported/plain"),
            _ratio(result, "native/plain"),
        )


def _kernel_nums(cases: Cases) -> Iterator[str]:
    results = _measured(cases, sweep("kernel_num"))
    if len(results) < 2:
        return
    sides = ("eager", "exported", "native")
    titles = (*(SIDES[side] for side in sides), "portable / plain", "native / plain")
    yield from _head("kernel_num", *titles, "nodes", "bundle")
    for result in results:
        export = result["export"]
        yield _row(
            f"{result['case']['kernel_num']}{_noise(result)}",
            *(_ms(result, side) for side in sides),
            _ratio(result, "exported/plain"),
            _ratio(result, "native/plain"),
            export["nodes"],
            f"{export['bundle_mb']:.0f} MB",
        )


def _exports(cases: Cases) -> Iterator[str]:
    results = _measured(cases, grid())
    if not results:
        return
    yield from _head("", "seconds", "peak memory", "nodes", "bundle", "/ weights", "largest error")
    for result in results:
        export = result["export"]
        yield _row(
            result["title"],
            export["export_seconds"],
            f"{export['peak_mb']} MB",
            export["nodes"],
            f"{export['bundle_mb']:.0f} MB",
            f"{export['bundle_over_weights']:.3f}×",
            f"{result['max_rel_error']:.1e}",
        )


def _families(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    last = {row["name"]: row for record in reversed(records) for row in record["rows"]}
    rows = [last[name] for name in FAMILIES if "export_seconds" in last.get(name, {})]
    if not rows:
        return
    yield (
        "By `benchmarks.families`, from the checkpoint file: seconds and memory of the export, the "
        "bundle over its weights, the largest error of an output and of a part between two of the "
        "network's decisions, time over the plain network's in the same process, and whether "
        "NVIDIA's parser takes the graph.\n"
    )
    yield from _head(
        "", "input", "seconds", "peak memory", "bundle", "nodes", "output", "part",
        "native / plain", "portable / plain", "parsed",
    )  # fmt: skip
    for row in rows:
        yield _row(
            row["name"],
            "×".join(map(str, row["size"])),
            f"{row['export_seconds']:.0f}",
            f"{row['export_peak_gb']:.1f} GB",
            f"{row['bundle_over_weights']:.3f}×",
            row["nodes"],
            f"{max(row['error'].values()):.1e}",
            f"{row['worst_part']['error']:.1e}" if "worst_part" in row else "–",
            *(_over_plain(row, side) for side in ("native", "portable")),
            "yes" if "taken" in row["nvidia_parser"] else "no",
        )


def _over_plain(row: dict[str, Any], side: str) -> str:
    """Of times, or of the processor's where other processes ran."""
    if (found := row.get(f"{side}_over_plain")) is not None:
        return str(found)
    found = row.get(f"{side}_over_plain_processor")
    return "–" if found is None else f"{found} (processor)"


def _missing(cases: Cases) -> Iterator[str]:
    for case in (*grid(), *sweep("size"), *sweep("kernel_num")):
        result = cases.get(case.key, {})
        for what in ("skipped", "failed"):
            if what in result:
                yield f"- {case.title}, kernel_num {case.kernel_num}: {what}, {result[what]}"


def _left(costs: dict[str, Any]) -> Iterator[str]:
    rate = costs["rates"]
    baseline = sum(row["ms"] for row in costs["plain"].values())
    yield (
        f"One thread, {machine.say(costs['machine'])}. Least: the longer of a node's products at "
        f"{rate['products'] / 1e9:.0f} G a second, measured in the cache, and of its bytes, each "
        f"read or written once, at {rate['bytes'] / 1e9:.1f} GB a second, measured in memory.\n"
    )
    yield from _head(
        "kind of node", "nodes", "ms", "share", "/ baseline", "G multiply-adds", "MB", "least ms"
    )
    for name, what in (("fdconv", ""), ("plain", "baseline: ")):
        total = sum(row["ms"] for row in costs[name].values())
        for kind, row in costs[name].items():
            yield _row(
                f"{what}{KINDS[kind]}", f"{row['nodes']:.0f}", f"{row['ms']:.1f}",
                f"{row['ms'] / total:.1%}", f"{row['ms'] / baseline:.3f}",
                f"{row['products'] / 1e9:.2f}", f"{row['bytes'] / 1e6:.0f}",
                f"{row['least_ms']:.1f}",
            )  # fmt: skip
        yield _row(f"**{what}all**", "", f"{total:.1f}", "", f"{total / baseline:.3f}", "", "", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of records")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder to write to")
    options = parser.parse_args()
    matrix = newest("matrix", options.results)
    if matrix is None:
        parser.error(f"{options.results} has no matrix; run python -m benchmarks.matrix first.")
    costs = newest("native costs", options.results)
    text = markdown(
        matrix,
        every("batches", options.results),
        costs,
        every("families", options.results),
    )
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output / "performance-cpu.md", text.encode())
    written = [options.output / "performance-cpu.md"]
    bars = [r for case in (BACKBONE, UPERNET) for r in _measured(matrix["cases"], [case])]
    if bars:
        write_atomically(options.output / "cost.svg", draw(bars).encode())
        written.append(options.output / "cost.svg")
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
