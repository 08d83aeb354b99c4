"""The FDConv paper's Table 1 with the columns it lacks: ``python -m benchmarks.table1``.

Every method in the same ResNet-50: parameters and operations beside the paper's numbers, then
milliseconds per image and memory, in eager PyTorch and in ONNX Runtime, all networks taking turns
so that a machine's drift hits all alike. Rivals and the plain network are exported by
``torch.onnx.export`` as they are, FDConv by this project. Batch 1, random weights. What is
counted and why numbers differ from the paper's: docs/table1.md.

``--prepare FOLDER`` makes and exports the networks (minutes); ``--latency FOLDER`` times them,
which is what wants a quiet machine. Without either, both are done in a temporary folder.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import table1_latency
from benchmarks.cases import NETWORKS, add_size_argument, add_width_arguments
from benchmarks.flops import count_operations
from benchmarks.options import script
from benchmarks.records import write_json
from benchmarks.rivals import METHODS
from benchmarks.table1_rows import COUNTED_AT, PLAIN, Frame, Published, make, rows
from fdconv_deploy.latency import machine
from fdconv_deploy.latency.measure import Schedule


def count(names: Iterable[str], frame: Frame) -> dict[str, Any]:
    """Parameters and operations by row: totals of the plain network, of others what they add."""
    counts: dict[str, Any] = {}
    base = None
    for name in [PLAIN, *(n for n in names if n != PLAIN)]:
        with torch.device("meta"):
            made = make(name, frame)
        parameters = sum(p.numel() for p in made.parameters())
        operations = count_operations(made, (1, 3, *COUNTED_AT))
        if base is None:
            base = parameters, operations
        else:
            parameters, operations = parameters - base[0], operations - base[1]
        adds = operations.multiply_adds
        counts[name] = {"parameters": parameters, "multiply_adds": adds, **asdict(operations)}
    return counts


def markdown(result: dict[str, Any]) -> str:
    """The table, for people."""
    published = rows()
    if result["frame"]["channels"] != 64:  # then the paper's numbers are of other networks
        published = {key: Published(row.title, None, None) for key, row in published.items()}
    counts, timed = result["counts"], result.get("latency")
    height, width = COUNTED_AT
    heads = [
        "", "parameters", "paper", f"multiply-adds, G at {height}×{width}", "paper",
        "element-wise, G", "Fourier transforms, GFLOP",
    ]  # fmt: skip
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, counted in counts.items():
        sign = "" if name == PLAIN else "+"
        paper = published[name]
        cells = [
            paper.title,
            f"{sign}{counted['parameters']:,}",
            f"+{paper.parameters} M" if paper.parameters else "",
            f"{sign}{counted['multiply_adds'] / 1e9:.3f}",
            f"+{paper.flops} G" if paper.flops else "–" if paper.parameters else "",
            f"{sign}{counted['elementwise'] / 1e9:.3f}",
            f"{sign}{counted['transform'] / 1e9:.2f}" if counted["transform"] else "",
        ]
        lines.append(cells)
    return _table(lines) + (f"\n\n{_latency(timed)}" if timed else "")


def _latency(timed: dict[str, Any]) -> str:
    """The clock's columns, in a table of their own."""
    where = "×".join(map(str, timed["size"]))
    heads = [f"{where}, batch 1", "PyTorch, ms", "", "MB", "ONNX Runtime, ms", "", "MB", "images/s"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    titles = {key: row.title for key, row in rows().items()}
    titles[table1_latency.NATIVE] = f"{titles['fdconv']}, native operators"
    for name, title in titles.items():
        if f"exported/{name}" not in timed["ms"]:
            continue
        cells = [title]
        for key in (f"eager/{name}", f"exported/{name}"):
            if key not in timed["ms"]:  # native operators are a bundle's alone
                cells += [""] * 3
                continue
            over = timed["over_plain"].get(key)
            cells += [
                f"{timed['ms'][key]['median']:.1f}" + ("" if timed["steady"][key] else " ~"),
                f"{over['value']:.2f}×" if over else "1",
                f"{timed['memory_mb'][key]:,}",
            ]
        cells.append(f"{1e3 / timed['ms'][f'exported/{name}']['median']:.2f}")
        lines.append(cells)
    return _table(lines)


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = script(__doc__)
    made.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--network", choices=NETWORKS, default="backbone")
    add_size_argument(made)
    add_width_arguments(made)
    made.add_argument("--counts", action="store_true", help="count only, time nothing")
    made.add_argument("--prepare", type=Path, help="make and export into this folder, and stop")
    made.add_argument("--latency", type=Path, help="time what --prepare left in this folder")
    made.add_argument(
        "--seconds", type=float, default=100.0, help="of timing each of the two forms, at most"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    # The exporter's chatter would bury the progress.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    names = list(rows(options.methods))
    frame = Frame(options.network, options.channels, options.kernel_num)

    def said(step: str) -> None:
        print(f"  {step}", file=sys.stderr, flush=True)

    if options.prepare:
        table1_latency.prepare(names, frame, options.size, options.prepare, said)
        return
    timed = None
    where = machine.describe(options.threads)
    if not options.counts:
        machine.warn_if_busy()
        schedule = Schedule(seconds=options.seconds)
        with tempfile.TemporaryDirectory(prefix="fdconv-table1-") as scratch:
            folder = options.latency
            if folder is None:
                folder = Path(scratch)
                table1_latency.prepare(names, frame, options.size, folder, said)
            timed = table1_latency.measure(
                folder, threads=options.threads, schedule=schedule, progress=said
            )
        frame, names = Frame(**timed["frame"]), list(timed["onnx_mb"])
    result: dict[str, Any] = {"frame": asdict(frame), "counts": count(names, frame)}
    if timed is not None:
        result["latency"] = timed
    print(markdown(result))
    if timed is not None:
        if shared := machine.shared_machine(timed["others_cpu"]):
            print(f"\n{shared}")
        print(f"\n{machine.say(where)}")
    if options.json:
        write_json(options.json, {"kind": "table1", "machine": where, **result})


if __name__ == "__main__":
    main()
