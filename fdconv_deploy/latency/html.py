"""A report as one HTML page: plots and tables, nothing fetched, no script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from fdconv_deploy.latency import report as tables
from fdconv_deploy.latency.style import STYLE
from fdconv_deploy.latency.svg import Bar, Point, bars, curves, legend
from fdconv_deploy.latency.report import Report, Row, side_name

# Where bars of divergence start: what float32 rounds away anyhow.
LEAST = 1e-8


def page(report: Report) -> str:
    """The whole page."""
    machine = report["machine"]
    body = "\n".join(
        section
        for make in (_latency, _throughput, _memory, _start, _table, _profiles, _divergences)
        for section in make(report)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in tables.notes(report))
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>fdconv bench, {escape(machine['date'])}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>fdconv bench</h1>\n<ul>{notes}</ul>\n{body}\n"
        f"{_section('Environment', _environment(machine))}\n</main></body></html>\n"
    )


def _section(title: str, *parts: str, said: str = "") -> str:
    text = f"<p>{escape(said)}</p>" if said else ""
    return f"<section><h2>{escape(title)}</h2>{text}{''.join(parts)}</section>"


def _colours(rows: Sequence[Row]) -> dict[str, int]:
    """A colour for each side, whatever its batch size and concurrency."""
    return {name: n for n, name in enumerate(dict.fromkeys(map(side_name, rows)))}


def _latency(report: Report) -> Iterator[str]:
    rows, colours = report["rows"], _colours(report["rows"])
    drawn = [
        Bar(
            f"{side_name(row)}, {_batch(row)}",
            [(colours[side_name(row)], row["ms"]["p50"])],
            f"{row['ms']['p50']:.4g} ms" + ("" if row["steady"] else " ~"),
            [row["ms"]["p90"], row["ms"]["p99"]],
        )
        for row in rows
    ]
    said = "Median milliseconds of a request; the lines behind a bar are at 90 and 99 % of them."
    yield _section("Latency", bars("Latency of each side", drawn), said=said)


def _throughput(report: Report) -> Iterator[str]:
    rows, colours = report["rows"], _colours(report["rows"])
    # A sweep over concurrencies is a line of its own for each batch size.
    swept = len(report["settings"]["concurrency"]) > 1
    lines: dict[tuple[str, int], list[Point]] = {}
    for row in rows:
        point = Point(row["images_per_second"], row["ms"]["p50"], _batch(row))
        lines.setdefault((side_name(row), row["batch"] if swept else 0), []).append(point)
    series = [(colours[name], line) for (name, _), line in lines.items()]
    plot = curves("Latency against throughput", series, "images per second", "milliseconds")
    said = (
        "To the right is more in all, downwards is sooner (logarithmic). b4×2 is batch 4, two "
        "requests at a time."
    )
    yield _section("Latency and throughput", plot, legend(list(colours)), said=said)


def _batch(row: Row) -> str:
    """Batch size and concurrency, short enough for a phone."""
    return f"b{row['batch']}" + (f"×{row['concurrency']}" if row["concurrency"] > 1 else "")


def _memory(report: Report) -> Iterator[str]:
    known = [row for row in _once(report["rows"]) if row["peak_mb"] is not None]
    drawn = [
        Bar(
            f"{side_name(row)}, b{row['batch']}",
            [(0, row["loaded_mb"]), (1, max(row["peak_mb"] - row["loaded_mb"], 0))],
            f"{row['peak_mb']:,} MB"
            + (f", GPU {row['device_mb']:,} MB" if row["device_mb"] is not None else ""),
        )
        for row in known
    ]
    if drawn:
        parts = legend(["loaded", "more while running"])
        said = "Of a process that holds nothing but this side, interpreter and libraries included."
        yield _section("Memory", bars("Memory of each side", drawn), parts, said=said)


def _start(report: Report) -> Iterator[str]:
    drawn = []
    for row in _once(report["rows"]):
        if row["kind"] != "service":
            steps = row["import_seconds"], row["load_seconds"], row["first_ms"] / 1e3
            drawn.append(
                Bar(
                    f"{side_name(row)}, b{row['batch']}",
                    list(enumerate(steps)),
                    f"{sum(steps):.2f} s",
                )
            )
    if drawn:
        parts = legend(["importing libraries", "loading", "first request"])
        yield _section("From nothing to the first answer", bars("Start of each side", drawn), parts)


def _once(rows: Sequence[Row]) -> list[Row]:
    """One row for each process, whatever its concurrencies."""
    return list({(side_name(row), row["batch"]): row for row in reversed(rows)}.values())[::-1]


def _profiles(report: Report) -> Iterator[str]:
    for profile in report.get("profiles", []):
        parts = profile["parts"]
        drawn = [
            Bar(
                layer["name"],
                [(n, layer["ms"].get(part, 0.0)) for n, part in enumerate(parts)],
                f"{sum(layer['ms'].values()):.2f} ms",
            )
            for layer in profile["layers"]
        ]
        sums = profile["sums"]
        spent = ", ".join(f"{part} {sums.get(part, 0.0):.1f}" for part in parts)
        said = f"{profile['how']} Milliseconds in all: {spent}."
        plot = bars("Time by layer", drawn, tight=True)
        title = f"Time by layer: {profile['title']}"
        yield _section(title, legend(parts), plot, said=said)


def _divergences(report: Report) -> Iterator[str]:
    for found in report.get("divergences", []):
        drawn = [
            Bar(
                layer["name"],
                [(3, max(math.log10(max(layer["max_rel"], LEAST) / LEAST), 0.0))],
                f"{layer['max_rel']:.1e}, 1 − cosine {layer['angle']:.1e}",
            )
            for layer in found["layers"]
        ]
        title = f"Divergence by layer: {found['title']}"
        said = f"{found['how']} Bars are logarithmic and start at {LEAST:.0e}."
        yield _section(title, bars("Divergence by layer", drawn, tight=True), said=said)


def _table(report: Report) -> Iterator[str]:
    yield _section("All figures", _grid(*tables.cells(report)))


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _environment(machine: dict[str, Any]) -> str:
    items = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _facts(machine))
    return f"<dl>{''.join(items)}</dl>"


def _facts(found: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in found.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from _facts(value, f"{name}: ")
        elif isinstance(value, list):
            for number, one in enumerate(value, 1):
                yield from _facts(one, f"{name} {number}: ")
        elif value is not None:
            yield name, str(value)
