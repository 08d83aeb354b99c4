"""What ``fdconv bench`` prints on a terminal, however narrow."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fdconv_deploy.latency.report import Divergences, Profile, Report

# In a file, where eighty columns are nobody's.
WIDEST = 140
# Layers of a terminal's tables.
SHOWN = 8
# What a terminal without room for all goes without, the first one first; the files have it.
LEFT_OUT = ("first ms", "load s", "p99", "runs", "peak MB", "input", "p90")


def show(report: Report, console: Console) -> None:
    """The report as tables and notes.

    Where the console is narrow, targets are numbered and named above their table; columns that
    still find no room are left out, and a caption names them.
    """
    from fdconv_deploy.latency.report import cells, notes

    titles, rows = cells(report)
    if not console.is_terminal:
        console.width = max(console.width, WIDEST)
    table = _rows(titles, rows)
    if _width(table) > console.width:
        names = list(dict.fromkeys(row[0] for row in rows))
        for number, name in enumerate(names, 1):
            console.print(Text(f"{number}  {name}"))
        rows = [[str(names.index(row[0]) + 1), *row[1:]] for row in rows]
        missing = []
        for title in LEFT_OUT:
            table = _rows(titles, rows)
            if _width(table) <= console.width:
                break
            if title in titles:
                missing.append(title)
                place = titles.index(title)
                titles, *rows = ([*line[:place], *line[place + 1 :]] for line in (titles, *rows))
        table = _rows(titles, rows)
        if missing:
            table.caption = f"No room for {', '.join(missing)}: --markdown - prints all."
            table.caption_justify = "left"
    console.print(table)
    for profile in report.get("profiles", []):
        console.print(_profile(profile))
    for found in report.get("divergences", []):
        console.print(_divergences(found))
    for note in notes(report):
        console.print(note, markup=False, highlight=False)


def _rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in titles:
        table.add_column(title, justify="right" if title else "left", no_wrap=bool(title))
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _width(table: Table) -> int:
    """How wide a table wants to be."""
    console = Console(file=StringIO(), width=10_000)
    return console.measure(table).maximum


def _profile(section: Profile) -> Table:
    """Sums over the network, and the layers that take most; all are in the files."""
    parts = section["parts"]
    title = f"ms by layer: {section['title']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in (*parts, "sum"):
        table.add_column(name, justify="right", no_wrap=" " not in name)
    slowest = sorted(section["layers"], key=lambda layer: -sum(layer["ms"].values()))[:SHOWN]
    named = [(_short(layer["name"]), layer["ms"]) for layer in slowest]
    for name, spent in [("all layers", section["sums"]), *named]:
        values = [f"{spent[part]:.2f}" if part in spent else "" for part in parts]
        table.add_row(Text(name), *values, f"{sum(spent.values()):.2f}")
    return table


def _divergences(section: Divergences) -> Table:
    """The layers that differ most; all are in the files."""
    title = f"divergence by layer: {section['title']}"
    table = Table("", "largest error", "1 − cosine", title=title, box=box.SIMPLE_HEAD)
    for layer in sorted(section["layers"], key=lambda layer: -layer["max_rel"])[:SHOWN]:
        table.add_row(Text(layer["name"]), f"{layer['max_rel']:.1e}", f"{layer['angle']:.1e}")
    return table


def _short(name: str) -> str:
    return name.removeprefix("backbone.")
