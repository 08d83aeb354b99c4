"""Plots as SVG text for a page: widths are shares of the page's, so letters keep their size.

Colours are CSS classes (``c0`` to ``c7``, ``grid``, ``faint``), so that a page can show them
light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

COLOURS = 8
# Shares of the width, in percent: where bars end at most, so that their labels fit behind.
_LONGEST = 76.0


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of one or several parts, with a name above it and a label behind.

    ``parts``: (colour, value). ``marks``: values that a thin line is drawn at.
    """

    name: str
    parts: Sequence[tuple[int, float]]
    label: str
    marks: Sequence[float] = ()

    @property
    def length(self) -> float:
        """To the end of its parts."""
        return sum(value for _, value in self.parts)


@dataclass(frozen=True)
class Point:
    """A point of a line, and what is written beside it."""

    x: float
    y: float
    label: str


def bars(title: str, rows: Sequence[Bar], *, tight: bool = False) -> str:
    """Bars below each other on one scale from 0.

    :param title: read aloud to who cannot see it.
    :param tight: for many.
    """
    step, thick = (27, 9) if tight else (40, 14)
    most = max((max([row.length, *row.marks]) for row in rows), default=0.0) or 1.0
    drawn = []
    for place, row in enumerate(rows):
        top = place * step
        drawn.append(f'<text x="0" y="{top + 12}">{escape(row.name)}</text>')
        x = 0.0
        for colour, value in row.parts:
            width = value / most * _LONGEST
            drawn.append(
                f'<rect class="c{colour % COLOURS}" x="{x:.3f}%" y="{top + 17}" '
                f'width="{width:.3f}%" height="{thick}"/>'
            )
            x += width
        middle, end = top + 17 + thick / 2, max([row.length, *row.marks]) / most * _LONGEST
        if row.marks:
            drawn.append(
                f'<line class="whisker" x1="{x:.3f}%" x2="{end:.3f}%" y1="{middle}" y2="{middle}"/>'
            )
        drawn += [
            f'<line class="whisker" x1="{at:.3f}%" x2="{at:.3f}%" y1="{top + 18}" '
            f'y2="{top + 16 + thick}"/>'
            for at in (mark / most * _LONGEST for mark in row.marks)
        ]
        drawn.append(
            f'<text class="faint" x="{end:.3f}%" dx="6" y="{middle + 4}">{escape(row.label)}</text>'
        )
    return _svg(title, len(rows) * step, drawn)


def curves(
    title: str,
    series: Sequence[tuple[int, Sequence[Point]]],
    x_name: str,
    y_name: str,
) -> str:
    """Lines of points, each of a colour: x from 0, y, which is above 0, by its logarithm."""
    height, bottom, top = 300, 262, 30
    points = [point for _, line in series for point in line]
    x_ticks = ticks(max((point.x for point in points), default=1.0))
    y_ticks = powers([point.y for point in points])

    def x_at(value: float) -> float:
        return 2 + value / x_ticks[-1] * 88

    def y_at(value: float) -> float:
        share = math.log(value / y_ticks[0]) / math.log(y_ticks[-1] / y_ticks[0])
        return bottom - share * (bottom - top)

    drawn = []
    for tick in y_ticks:
        y = y_at(tick)
        drawn.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text class="faint" x="0" y="{y - 3:.1f}">{tick:g}</text>')
    drawn += [
        f'<text class="faint" x="{x_at(tick):.2f}%" y="{bottom + 15}" '
        f'text-anchor="middle">{tick:g}</text>'
        for tick in x_ticks
    ]
    drawn.append(f'<text class="faint" x="0" y="12">{escape(y_name)}</text>')
    drawn.append(
        f'<text class="faint" x="100%" y="{height - 6}" text-anchor="end">{escape(x_name)}</text>'
    )
    for colour, line in series:
        kind = f"c{colour % COLOURS}"
        drawn += [
            f'<line class="{kind}" x1="{x_at(a.x):.2f}%" x2="{x_at(b.x):.2f}%" '
            f'y1="{y_at(a.y):.1f}" y2="{y_at(b.y):.1f}"/>'
            for a, b in pairwise(line)
        ]
        for point in line:
            x, y = f"{x_at(point.x):.2f}%", y_at(point.y)
            drawn.append(f'<circle class="{kind}" cx="{x}" cy="{y:.1f}" r="4"/>')
            drawn.append(
                f'<text class="small" x="{x}" dx="7" y="{y - 6:.1f}">{escape(point.label)}</text>'
            )
    return _svg(title, height, drawn)


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to ``most`` or just above, four to six of them."""
    if most <= 0:
        return [0.0, 1.0]
    raw = most / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    return [round(step * n, 10) for n in range(math.ceil(most / step - 1e-9) + 1)]


def powers(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten, from at or below the least of some values to the most."""
    least, most = min(values, default=1.0), max(values, default=1.0)
    # A decade more on either side: logarithms of round numbers are rounded, too.
    decades = range(math.floor(math.log10(least)) - 1, math.floor(math.log10(most)) + 3)
    steps = [float(f"{step}e{decade}") for decade in decades for step in (1, 2, 5)]
    first = max(step for step in steps if step <= least)
    last = min(step for step in steps if step >= most and step > first)
    return [step for step in steps if first <= step <= last]


def legend(names: Sequence[str]) -> str:
    """Names beside squares of their colours."""
    items = (
        f'<li><svg width="12" height="12" aria-hidden="true"><rect class="c{n % COLOURS}" '
        f'width="12" height="12"/></svg> {escape(name)}</li>'
        for n, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(title: str, height: float, drawn: Sequence[str]) -> str:
    return (
        f'<svg class="plot" role="img" width="100%" height="{height:g}">'
        f"<title>{escape(title)}</title>{''.join(drawn)}</svg>"
    )
