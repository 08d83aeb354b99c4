"""The report of ``fdconv bench`` as one HTML page: plots and tables, nothing fetched, no script.

matplotlib draws the plots as SVG, which stands in the page. It draws in codes for colours, which
are replaced by the page's own (CSS variables of ``page.html``), so that plots are light, dark or
printed as the page is.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fdconv_deploy.latency import report as tables
from fdconv_deploy.latency.report import Report, Row
from fdconv_deploy.profiling import PARTS

# Colours of targets and parts; further ones take them again.
COLOURS = 8
# Codes for the page's colours, by the names of their CSS variables.
_CODES = {
    name: f"#fdc0{number:02x}"
    for number, name in enumerate(("text", "faint", "line", *(f"c{n}" for n in range(COLOURS))))
}
# Text stays text, and equal plots are equal files.
_SVG: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fdconv", "font.size": 8}
# Where bars end at most, as a share of the width, so that their labels fit behind them.
_LONGEST = 0.74
# Where bars of divergence start, at what float32 rounds away anyhow, and end: no sense is left.
LEAST, MOST = 1e-8, 1e3


def page(report: Report) -> str:
    """The whole page."""
    with mpl.rc_context(_SVG):
        sections = "\n".join(_sections(report))
    notes = "".join(f"<li>{escape(note)}</li>" for note in tables.notes(report))
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(date=escape(report.machine["date"]), notes=notes, sections=sections)


def _sections(report: Report) -> Iterator[str]:
    rows = report.rows
    # A colour for each target, whatever its batch size and concurrency.
    colours = {label: n for n, label in enumerate(dict.fromkeys(row.label for row in rows))}
    drawn = [
        Bar(
            f"{row.label}, {_batch(row)}",
            [(colours[row.label], row.ms["p50"])],
            f"{row.ms['p50']:.4g} ms" + ("" if row.steady else " ~"),
            (row.ms["p90"], row.ms["p99"]),
        )
        for row in rows
    ]
    text = "Median milliseconds of a request; the lines behind a bar are at 90 and 99 % of them."
    yield _section("Latency", bars("Latency of each target", drawn), text=text)
    text = (
        "Further right is more throughput, lower is less latency (logarithmic). b4×2 is batch 4, "
        "two requests at a time."
    )
    plot = _throughput(report, colours)
    yield _section("Latency and throughput", plot, _legend(list(colours)), text=text)
    memory, start = [], []
    # One row for each process, whatever its concurrencies; a service's is only its client.
    once = {row.name: row for row in reversed(rows) if row.kind != "service"}
    for row in reversed(once.values()):
        name, loaded, peak = f"{row.label}, b{row.batch}", row.loaded_mb or 0, row.peak_mb or 0
        said = f"{peak:,} MB" + ("" if row.device_mb is None else f", GPU {row.device_mb:,} MB")
        memory.append(Bar(name, [(0, loaded), (1, max(peak - loaded, 0))], said))
        steps = row.import_seconds, row.load_seconds, row.first_ms / 1e3
        start.append(Bar(name, list(enumerate(steps)), f"{sum(steps):.2f} s"))
    if once:
        text = "Of a process with nothing but this target, its interpreter and libraries."
        legend = _legend(["loaded", "more while running"])
        yield _section("Memory", bars("Memory of each target", memory), legend, text=text)
        legend = _legend(["starting and importing libraries", "loading", "first request"])
        yield _section(
            "From nothing to the first answer", bars("Start of each target", start), legend
        )
    yield _section("All figures", _grid(tables.cells(report)), text=tables.head(report))
    for profile in report.profiles:
        drawn = [
            Bar(
                layer.name,
                [(n, layer.ms.get(part, 0.0)) for n, part in enumerate(PARTS)],
                f"{sum(layer.ms.values()):.2f} ms",
            )
            for layer in profile.layers
        ]
        spent = ", ".join(f"{part} {ms:.1f}" for part, ms in profile.sums.items())
        text = f"{profile.how} In all: {spent}."
        plot = bars("Time by layer", drawn, tight=True)
        yield _section(profile.heading, _legend(PARTS), plot, text=text)
    for found in report.divergences:
        drawn = [
            Bar(
                layer.name,
                [(3, math.log10(min(max(layer.max_rel, LEAST), MOST) / LEAST))],
                f"{layer.max_rel:.1e}, 1 − cosine {layer.angle:.1e}",
            )
            for layer in found.layers
        ]
        text = f"{found.how} Bars are logarithmic and start at {LEAST:.0e}."
        plot = bars("Divergence by layer", drawn, tight=True)
        yield _section(found.heading, plot, text=text)
    facts = "".join(
        f"<dt>{escape(name.replace('_', ' ').replace('.', ': '))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in tables.flat(report.machine)
        if value not in (None, "")
    )
    yield _section("Environment", f"<dl>{facts}</dl>")


def _section(title: str, *parts: str, text: str = "") -> str:
    text = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{text}{''.join(parts)}</section>"


def _batch(row: Row) -> str:
    """Batch size and concurrency, short enough for a phone."""
    return f"b{row.batch}" + (f"×{row.concurrency}" if row.concurrency > 1 else "")


def _throughput(report: Report, colours: dict[str, int]) -> str:
    # A sweep over concurrencies is a line of its own for each batch size.
    swept = len(report.settings["concurrency"]) > 1
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in report.rows:
        lines.setdefault((row.label, row.batch if swept else 0), []).append(row)
    figure, axes = _figure(4.0)
    faint = _CODES["faint"]
    for (label, _), line in lines.items():
        x = [row.images_per_second for row in line]
        y = [row.ms["p50"] for row in line]
        axes.plot(x, y, marker="o", markersize=5, color=_colour(colours[label]))
        for row, at in zip(line, zip(x, y, strict=True), strict=True):
            axes.annotate(_batch(row), at, (6, 5), textcoords="offset points", color=faint)
    axes.set(yscale="log")
    axes.set_xlabel("images per second", color=faint)
    axes.set_ylabel("milliseconds", color=faint)
    axes.set_xlim(left=0)
    axes.margins(0.12)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=_CODES["line"], linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelcolor=faint)
    return _svg("Latency against throughput", figure)


class Bar(NamedTuple):
    """A horizontal bar of one or several parts."""

    name: str  # above it
    parts: Sequence[tuple[int, float]]  # (colour, value) of each
    label: str  # behind it
    marks: Sequence[float] = ()  # values that a thin line is drawn at

    @property
    def end(self) -> float:
        """The farthest of its parts and marks."""
        return max([sum(value for _, value in self.parts), *self.marks])


def bars(title: str, rows: Sequence[Bar], *, tight: bool = False) -> str:
    """Bars below each other on one scale from 0, as SVG; the title is for screen readers."""
    step, thick = (0.34, 0.3) if tight else (0.45, 0.35)
    figure, axes = _figure(step * len(rows))
    most = max((row.end for row in rows), default=0.0) or 1.0
    text, faint = _CODES["text"], _CODES["faint"]
    for y, row in enumerate(rows):
        # A name is no formula, whatever dollars it has.
        axes.text(0, y + 0.02, row.name, color=text, va="bottom", parse_math=False)
        left, middle = 0.0, y + 0.1 + thick / 2
        for colour, value in row.parts:
            axes.barh(middle, value, thick, left, color=_colour(colour))
            left += value
        if row.marks:
            low, high = middle - thick / 2, middle + thick / 2
            axes.hlines(middle, left, row.end, color=text, linewidth=0.7)
            axes.vlines(row.marks, low, high, color=text, linewidth=0.7)
        axes.annotate(
            row.label, (row.end, middle), (5, 0), textcoords="offset points", color=faint,
            va="center",
        )  # fmt: skip
    axes.set(xlim=(0, most / _LONGEST), ylim=(len(rows) - 0.4, -0.5))
    axes.axis("off")
    return _svg(title, figure)


def _figure(inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.0, inches), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    return figure, axes


def _colour(number: int) -> str:
    return _CODES[f"c{number % COLOURS}"]


def _svg(title: str, figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that its font lacks: the page's has them
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    # Without the XML's head, and without ids that several plots would share.
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    width, height = figure.get_size_inches() * 72
    head = (
        '<svg class="plot" role="img" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width:g} {height:g}">'
    )
    text = head + f"<title>{escape(title)}</title>" + text.partition(">")[2]
    for name, code in _CODES.items():
        text = text.replace(code, f"var(--{name})")
    return f'<div class="wide">{text.strip()}</div>'


def _legend(names: Sequence[str]) -> str:
    """Names beside squares of their colours."""
    items = (
        f'<li><i style="background: var(--c{n % COLOURS})"></i> {escape(name)}</li>'
        for n, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _grid(columns: tables.Columns) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in zip(*columns.values(), strict=True)
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'
