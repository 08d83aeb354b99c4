"""A report as tables: for a terminal, Markdown, CSV and JSON."""

from __future__ import annotations

import csv as comma_separated
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fdconv_deploy.latency import machine

Row = dict[str, Any]
Report = dict[str, Any]


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _over(row: Row) -> str:
    over = row["over_first"]
    return "1" if over is None else f"{over['value']:.2f}×"


def _known(key: str) -> Callable[[Row], str]:
    return lambda row: "–" if row[key] is None else f"{row[key]:,}"


def _size(row: Row) -> str:
    return "×".join(map(str, row["size"])) if row["size"] else "–"


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "batch": lambda row: str(row["batch"]),
    "at a time": lambda row: str(row["concurrency"]),
    "input": _size,
    "p50 ms": lambda row: _milliseconds(row["ms"]["p50"]) + ("" if row["steady"] else " ~"),
    "p90": lambda row: _milliseconds(row["ms"]["p90"]),
    "p99": lambda row: _milliseconds(row["ms"]["p99"]),
    "of first": _over,
    "images/s": lambda row: f"{row['images_per_second']:.2f}",
    "load s": lambda row: "–" if row["kind"] == "service" else f"{row['load_seconds']:.2f}",
    "first ms": lambda row: _milliseconds(row["first_ms"]),
    "peak MB": _known("peak_mb"),
    "GPU MB": _known("device_mb"),
    "J/image": _known("joules_per_image"),
    "runs": lambda row: str(row["runs"]),
}
# Said only where it tells rows apart or is known at all.
_ONLY_WHERE: dict[str, Callable[[Row], bool]] = {
    "at a time": lambda row: row["concurrency"] > 1,
    "GPU MB": lambda row: row["device_mb"] is not None,
    "J/image": lambda row: row["joules_per_image"] is not None,
}


def side_name(row: Row) -> str:
    """What a row is of: source, backend and precision."""
    short = row["source"] if row["kind"] == "service" else Path(row["source"]).name
    # Portable operators go without saying, unless they were asked for.
    operators = row["operators"].partition(" ")[0]
    how = f", {operators}" if operators == "native" or row["native"] is False else ""
    return f"{short}, {row['backend']}{how}, {row['precision']}"


def row_name(row: Row) -> str:
    """A row's full name."""
    many = f", {row['concurrency']} at a time" if row["concurrency"] > 1 else ""
    return f"{side_name(row)}, batch {row['batch']}{many}"


def cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of text, for people."""
    rows = report["rows"]
    shown = {
        title: cell
        for title, cell in _COLUMNS.items()
        if title not in _ONLY_WHERE or any(map(_ONLY_WHERE[title], rows))
    }
    return ["", *shown], [[side_name(row), *(cell(row) for cell in shown.values())] for row in rows]


def notes(report: Report) -> Iterator[str]:
    """What a reader must know beside the figures."""
    rows, settings = report["rows"], report["settings"]
    if any(not row["steady"] for row in rows):
        yield (
            f"~ not steady: no three windows in a row agreed within {settings['agree']:.0%} "
            f"before {settings['seconds']:g} s were over."
        )
    share = report["others_cpu"]
    if share is not None and share > machine.QUIET:
        yield f"Others had {share:.0%} of the CPUs meanwhile: measure again before quoting."
    if any(row["kind"] == "service" for row in rows):
        yield "A service is timed over its network: from an encoded image to a mask, or to objects."
    if any(row["whole"] and row["kind"] != "service" for row in rows):
        yield "Timed from decoded pixels to labels."
    for one in report["skipped"]:
        yield f"Left out: {one['what']}. {one['why']}"
    yield f"{machine.say(report['machine'])}."


def as_json(report: Report) -> str:
    """The whole report."""
    return json.dumps(report, indent=2, ensure_ascii=False) + "\n"


def markdown(report: Report) -> str:
    """A table and notes, to be pasted."""
    titles, rows = cells(report)
    lines = [_line(titles), _line(["---", *["---:"] * (len(titles) - 1)])]
    lines += [_line([cell.replace("|", "\\|") for cell in row]) for row in rows]
    lines += ["", *(f"- {note}" for note in notes(report))]
    for section in report.get("profiles", []):
        lines += ["", f"Milliseconds by layer: {section['title']}", "", *_layers(section)]
    for section in report.get("divergences", []):
        lines += ["", f"Divergence by layer: {section['title']}", "", *_divergence(section)]
    return "\n".join(lines) + "\n"


def _line(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def _layers(section: dict[str, Any]) -> Iterator[str]:
    parts = section["parts"]
    yield _line(["", *parts, "sum"])
    yield _line(["---", *["---:"] * (len(parts) + 1)])
    for layer in [*section["layers"], {"name": "**sum**", "ms": section["sums"]}]:
        spent = [layer["ms"].get(part, 0.0) for part in parts]
        yield _line([layer["name"], *(f"{one:.2f}" for one in spent), f"{sum(spent):.2f}"])


def _divergence(section: dict[str, Any]) -> Iterator[str]:
    yield _line(["", "largest error / largest value", "1 − cosine"])
    yield _line(["---", "---:", "---:"])
    for layer in section["layers"]:
        yield _line([layer["name"], f"{layer['max_rel']:.1e}", f"{layer['angle']:.1e}"])


def csv(report: Report) -> str:
    """One line per row, nested values under dotted names."""
    flat = [dict(_flat(row)) for row in report["rows"]]
    titles = list(dict.fromkeys(title for row in flat for title in row))
    file = io.StringIO()
    writer = comma_separated.DictWriter(file, titles, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def _flat(row: Row, before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        elif isinstance(value, list):
            yield f"{before}{key}", " ".join(map(str, value))
        else:
            yield f"{before}{key}", value
