"""The report of ``fdconv bench`` as one HTML page: plots and tables, nothing fetched, no script.

matplotlib draws the plots as SVG, which stands in the page. Its colours are replaced by the page's
own (CSS variables), so that plots are light, dark or printed as the page is.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fdconv_deploy.latency import report as tables
from fdconv_deploy.latency.report import Report, Row, target_name

# The page's colours, light and dark, by the names of their CSS variables.
_LIGHT = {
    "back": "#ffffff", "text": "#1f2328", "faint": "#59636e", "line": "#d1d9e0",
    "c0": "#2f6fb3", "c1": "#d9822b", "c2": "#3a9a5b", "c3": "#b8467c", "c4": "#7a6cc4",
    "c5": "#8a8f98", "c6": "#b59b1d", "c7": "#2a9ba8",
}  # fmt: skip
_DARK = {
    "back": "#12161c", "text": "#e4e8ee", "faint": "#9aa4b1", "line": "#333c48",
    "c0": "#5b9be0", "c1": "#eb9a4a", "c2": "#58bd7d", "c3": "#dd6fa2", "c4": "#9f92e8",
    "c5": "#9aa2ad", "c6": "#d4b93c", "c7": "#4cc0cd",
}  # fmt: skip
_PRINTED = {**_LIGHT, "text": "#000000", "faint": "#444444", "line": "#bbbbbb"}
COLOURS = 8
# Text stays text, and equal plots are equal files.
_SVG: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fdconv", "font.size": 8}
# Where bars end at most, as a share of the width, so that their labels fit behind them.
_LONGEST = 0.74
# Where bars of divergence start: what float32 rounds away anyhow.
LEAST = 1e-8


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


_STYLE = (
    f"""
:root {{ {_variables(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK)} }} }}
@media print {{ :root {{ {_variables(_PRINTED)} }} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem 1rem 3rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p, main > ul { color: var(--faint); margin: .2rem 0 .8rem; }
main > ul { padding-left: 1.2rem; }
.wide { overflow-x: auto; }
.plot { display: block; width: 100%; min-width: 44rem; height: auto; }
.plot text { font-family: system-ui, sans-serif !important; }
.legend { list-style: none; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap;
  gap: .2rem 1.2rem; font-size: 13px; }
.legend i { display: inline-block; width: 12px; height: 12px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { color: var(--faint); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: 13px; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
@media (min-width: 40rem) { td:first-child { min-width: 14rem; } }
@media print { main { max-width: none; padding: 0; } .wide { overflow: visible; }
  .plot { min-width: 0; } table { font-size: 9px; } th, td { padding: .15rem .3rem; }
  section { break-inside: avoid-page; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
)


def page(report: Report) -> str:
    """The whole page."""
    rows, found = report["rows"], report["machine"]
    # A colour for each target, whatever its batch size and concurrency.
    colours = {name: n for n, name in enumerate(dict.fromkeys(map(target_name, rows)))}
    with mpl.rc_context(_SVG):
        sections = [
            _latency(rows, colours),
            _throughput(report, colours),
            *_memory(rows),
            *_start(rows),
            _section("All figures", _grid(*tables.cells(report)), text=tables.head(report)),
            *_profiles(report),
            *_divergences(report),
            _section("Environment", _environment(found)),
        ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in tables.notes(report))
    newline = "\n"
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>fdconv bench, {escape(found['date'])}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>fdconv bench</h1>\n<ul>{notes}</ul>\n{newline.join(sections)}\n"
        "</main></body></html>\n"
    )


def _section(title: str, *parts: str, text: str = "") -> str:
    text = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{text}{''.join(parts)}</section>"


def _latency(rows: Sequence[Row], colours: dict[str, int]) -> str:
    drawn = [
        Bar(
            f"{target_name(row)}, {_batch(row)}",
            [(colours[target_name(row)], row["ms"]["p50"])],
            f"{row['ms']['p50']:.4g} ms" + ("" if row["steady"] else " ~"),
            (row["ms"]["p90"], row["ms"]["p99"]),
        )
        for row in rows
    ]
    text = "Median milliseconds of a request; the lines behind a bar are at 90 and 99 % of them."
    return _section("Latency", bars("Latency of each target", drawn), text=text)


def _throughput(report: Report, colours: dict[str, int]) -> str:
    # A sweep over concurrencies is a line of its own for each batch size.
    swept = len(report["settings"]["concurrency"]) > 1
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in report["rows"]:
        lines.setdefault((target_name(row), row["batch"] if swept else 0), []).append(row)
    figure, axes = _figure(4.0)
    for (name, _), line in lines.items():
        colour = _colour(colours[name])
        x = [row["images_per_second"] for row in line]
        y = [row["ms"]["p50"] for row in line]
        axes.plot(x, y, marker="o", markersize=5, color=colour)
        for row, across, up in zip(line, x, y, strict=True):
            axes.annotate(
                _batch(row), (across, up), (6, 5), textcoords="offset points",
                color=_LIGHT["faint"],
            )  # fmt: skip
    axes.set(yscale="log", xlabel="images per second", ylabel="milliseconds")
    axes.set_xlim(left=0)
    axes.margins(0.12)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=_LIGHT["line"], linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelcolor=_LIGHT["faint"])
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_LIGHT["faint"])
    text = (
        "Further right is more throughput, lower is less latency (logarithmic). b4×2 is batch 4, "
        "two requests at a time."
    )
    plot = _svg("Latency against throughput", figure)
    return _section("Latency and throughput", plot, _legend(list(colours)), text=text)


def _batch(row: Row) -> str:
    """Batch size and concurrency, short enough for a phone."""
    return f"b{row['batch']}" + (f"×{row['concurrency']}" if row["concurrency"] > 1 else "")


def _memory(rows: Sequence[Row]) -> Iterator[str]:
    drawn = []
    for row in _once(rows):
        loaded, peak, device = row["loaded_mb"], row["peak_mb"], row["device_mb"]
        if loaded is not None and peak is not None:
            label = f"{peak:,} MB" + (f", GPU {device:,} MB" if device is not None else "")
            parts = [(0, loaded), (1, max(peak - loaded, 0))]
            drawn.append(Bar(f"{target_name(row)}, b{row['batch']}", parts, label))
    if drawn:
        text = (
            "Of a process that holds nothing but this target, interpreter and libraries included."
        )
        legend = _legend(["loaded", "more while running"])
        yield _section("Memory", bars("Memory of each target", drawn), legend, text=text)


def _start(rows: Sequence[Row]) -> Iterator[str]:
    drawn = []
    for row in _once(rows):
        if row["kind"] != "service":
            steps = row["import_seconds"], row["load_seconds"], row["first_ms"] / 1e3
            name = f"{target_name(row)}, b{row['batch']}"
            drawn.append(Bar(name, list(enumerate(steps)), f"{sum(steps):.2f} s"))
    if drawn:
        legend = _legend(["starting and importing libraries", "loading", "first request"])
        plot = bars("Start of each target", drawn)
        yield _section("From nothing to the first answer", plot, legend)


def _once(rows: Sequence[Row]) -> list[Row]:
    """One row for each process, whatever its concurrencies."""
    return list({(target_name(row), row["batch"]): row for row in reversed(rows)}.values())[::-1]


def _profiles(report: Report) -> Iterator[str]:
    for profile in report.get("profiles", []):
        parts, sums = profile["parts"], profile["sums"]
        drawn = [
            Bar(
                layer["name"],
                [(n, layer["ms"].get(part, 0.0)) for n, part in enumerate(parts)],
                f"{sum(layer['ms'].values()):.2f} ms",
            )
            for layer in profile["layers"]
        ]
        spent = ", ".join(f"{part} {sums.get(part, 0.0):.1f}" for part in parts)
        text = f"{profile['how']} Milliseconds in all: {spent}."
        plot = bars("Time by layer", drawn, tight=True)
        yield _section(f"Time by layer: {profile['title']}", _legend(parts), plot, text=text)


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
        text = f"{found['how']} Bars are logarithmic and start at {LEAST:.0e}."
        plot = bars("Divergence by layer", drawn, tight=True)
        yield _section(f"Divergence by layer: {found['title']}", plot, text=text)


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of one or several parts, with a name above it and a label behind.

    Attributes:
        parts: (colour, value) of each.
        marks: values that a thin line is drawn at.
    """

    name: str
    parts: Sequence[tuple[int, float]]
    label: str
    marks: Sequence[float] = ()

    @property
    def end(self) -> float:
        """The farthest of its parts and marks."""
        return max([sum(value for _, value in self.parts), *self.marks])


def bars(title: str, rows: Sequence[Bar], *, tight: bool = False) -> str:
    """Bars below each other on one scale from 0, as SVG.

    Args:
        title: read aloud to who cannot see it.
        rows: from top to bottom.
        tight: for many.
    """
    step, thick = (0.34, 0.3) if tight else (0.45, 0.35)
    figure, axes = _figure(step * len(rows))
    most = max((row.end for row in rows), default=0.0) or 1.0
    text, faint = _LIGHT["text"], _LIGHT["faint"]
    for y, row in enumerate(rows):
        # A name is no formula, whatever dollars it has.
        axes.text(0, y + 0.02, row.name, color=text, va="bottom", parse_math=False)
        left, middle = 0.0, y + 0.1 + thick / 2
        for colour, value in row.parts:
            axes.barh(middle, value, thick, left, color=_colour(colour))
            left += value
        if row.marks:
            axes.hlines(middle, left, row.end, color=text, linewidth=0.7)
            axes.vlines(
                row.marks, middle - thick / 2, middle + thick / 2, color=text, linewidth=0.7
            )
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
    return _LIGHT[f"c{number % COLOURS}"]


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
    for name, value in _LIGHT.items():
        text = text.replace(value, f"var(--{name})")
    return f'<div class="wide">{text.strip()}</div>'


def _legend(names: Sequence[str]) -> str:
    """Names beside squares of their colours."""
    items = (
        f'<li><i style="background: var(--c{n % COLOURS})"></i> {escape(name)}</li>'
        for n, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


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
