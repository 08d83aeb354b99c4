"""The report of ``fdconv bench``: as JSON, tables of text, Markdown and CSV, and its limits."""

from __future__ import annotations

import csv as comma_separated
import io
import shlex
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, computed_field

from fdconv_deploy.latency import machine
from fdconv_deploy.latency.networks import Opened, Skipped
from fdconv_deploy.profiling import PARTS, Divergence, LayerTime

# A GPU's clock that moves by more than this share of itself makes times of one row differ.
MOVED = 0.03
Columns = dict[str, list[str]]  # a table of text: cells by title


class Span(BaseModel):
    """Some readings of a GPU."""

    min: float
    median: float
    max: float

    def __str__(self) -> str:
        low, high = f"{self.min:.0f}", f"{self.max:.0f}"
        return low if low == high else f"{low}–{high}"


class GpuState(BaseModel):
    """A GPU while one target was timed; what it does not tell is None."""

    readings: int
    sm_mhz: Span | None = None
    memory_mhz: Span | None = None
    watts: Span | None = None
    celsius: Span | None = None
    throttled: dict[str, float]  # why its clock was held down: the share of readings that said so

    @property
    def moved(self) -> float:
        """How far its clock moved meanwhile, as a share of the median, where that matters."""
        clock = self.sm_mhz
        share = (clock.max - clock.min) / clock.median if clock and clock.median else 0.0
        return share if share > MOVED else 0.0


class Row(Opened):
    """One target at one concurrency."""

    concurrency: int
    runs: int
    # Quantiles of a request: "p50", "p90", "p99", "q1", "q3", "min", and "mean".
    ms: dict[str, float]
    images_per_second: float
    steady: bool  # whether the last three windows agree
    windows_ms: list[float]  # each window's median
    # How many times the first target's time it took: "value", "q1", "q3". None for the first, and
    # where the input has another size than the first's.
    over_first: dict[str, float] | None = None
    joules_per_image: float | None = None
    phases_ms: dict[str, float] | None = None  # medians of `Phases`
    gpu: GpuState | None = None  # what the GPU was like meanwhile

    @property
    def trtexec(self) -> str | None:
        """NVIDIA's own benchmark of the same engine, one request at a time; None of no engine."""
        options = "--useCudaGraph --exposeDMA --infStreams=1 --warmUp=500 --duration=10"
        return self.engine and f"trtexec --loadEngine={shlex.quote(self.engine)} {options}"


class Profile(BaseModel):
    """Time by layer of one target."""

    title: str
    source: str
    how: str
    layers: list[LayerTime]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sums(self) -> dict[str, float]:
        """Milliseconds by part over all layers."""
        spent = {part: sum(one.ms.get(part, 0.0) for one in self.layers) for part in PARTS}
        return {part: round(ms, 3) for part, ms in spent.items()}

    @property
    def heading(self) -> str:
        """For people."""
        return f"Milliseconds by layer: {self.title}"

    def table(self, most: int | None = None) -> Columns:
        """The sums, and every layer, or those that take most."""
        layers = self.layers
        if most is not None:
            layers = sorted(layers, key=lambda one: -sum(one.ms.values()))[:most]
        layers = [LayerTime(name="all layers", ms=self.sums), *layers]
        columns = {"": [one.name for one in layers]}
        for part in PARTS:
            columns[part] = [f"{one.ms[part]:.2f}" if part in one.ms else "" for one in layers]
        return {**columns, "sum": [f"{sum(one.ms.values()):.2f}" for one in layers]}


class Divergences(BaseModel):
    """How far one bundle is from the first, by layer."""

    title: str
    how: str
    layers: list[Divergence]

    @property
    def heading(self) -> str:
        """For people."""
        return f"Divergence by layer: {self.title}"

    def table(self, most: int | None = None) -> Columns:
        """Every layer, or those that differ most."""
        layers = self.layers
        if most is not None:
            layers = sorted(layers, key=lambda one: -one.max_rel)[:most]
        return {
            "": [one.name for one in layers],
            "largest error / largest value": [f"{one.max_rel:.1e}" for one in layers],
            "1 − cosine": [f"{one.angle:.1e}" for one in layers],
        }


class Report(BaseModel):
    """All of it; layers where they were asked for."""

    kind: Literal["bench"] = "bench"
    format: int = 2
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = []
    skipped: list[Skipped] = []
    others_cpu: float | None = None
    profiles: list[Profile] = []
    divergences: list[Divergences] = []

    @property
    def sections(self) -> list[Profile | Divergences]:
        """All that is told by layer."""
        return [*self.profiles, *self.divergences]

    def first(self, row: Row) -> Row:
        """The row that another one is compared with."""
        fields = row.batch, row.concurrency
        return next(one for one in self.rows if (one.batch, one.concurrency) == fields)

    def has_other_size(self, row: Row) -> bool:
        """Whether its input has another size than that of the row it would be compared with."""
        return row.over_first is None and self.first(row) is not row


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _known(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def _span(name: Literal["sm_mhz", "watts", "celsius"]) -> Callable[[Row], str]:
    return lambda row: str(getattr(row.gpu, name, None) or "")


def _phase(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row.phases_ms is None else f"{row.phases_ms[name]:.3f}"


# What is empty is not known; a column that is empty in every row is not shown.
_COLUMNS: dict[str, Callable[[Row], str]] = {
    "batch": lambda row: str(row.batch),
    "concurrency": lambda row: str(row.concurrency),
    "input": lambda row: "×".join(map(str, row.size or ())),
    "p50 ms": lambda row: (
        _milliseconds(row.ms["p50"])
        + ("" if row.steady else " ~")
        + (" !" if row.gpu and row.gpu.moved else "")
    ),
    "p90": lambda row: _milliseconds(row.ms["p90"]),
    "p99": lambda row: _milliseconds(row.ms["p99"]),
    "vs. first": lambda row: f"{row.over_first['value']:.2f}×" if row.over_first else "",
    "H2D": _phase("h2d"),
    "compute": _phase("compute"),
    "D2H": _phase("d2h"),
    "no copies": _phase("no_copies"),
    "images/s": lambda row: f"{row.images_per_second:.2f}",
    "load s": lambda row: "" if row.kind == "service" else f"{row.load_seconds:.2f}",
    "first ms": lambda row: _milliseconds(row.first_ms),
    "peak MB": lambda row: _known(row.peak_mb),
    "GPU MB": lambda row: _known(row.device_mb),
    "J/image": lambda row: _known(row.joules_per_image),
    "GPU MHz": _span("sm_mhz"),
    "W": _span("watts"),
    "°C": _span("celsius"),
    "runs": lambda row: str(row.runs),
}


def cells(report: Report) -> Columns:
    """Every row's figures, for people."""
    rows = report.rows
    columns = {title: list(map(cell, rows)) for title, cell in _COLUMNS.items()}
    for place, row in enumerate(rows):
        if report.first(row) is row:
            columns["vs. first"][place] = "1"
    if all(row.concurrency == 1 for row in rows):
        del columns["concurrency"]
    shown = {t: [one or "–" for one in column] for t, column in columns.items() if any(column)}
    return {"": [row.label for row in rows], **shown}


def head(report: Report) -> str:
    """What is inside a latency, to stand above the table."""
    local = [row for row in report.rows if row.kind != "service"]
    said = []
    if any(row.whole for row in local):
        said.append("ms: one request, from decoded pixels to labels or objects.")
    elif local:
        said.append("ms: one request, from inputs in host memory to outputs in host memory.")
    if len(local) < len(report.rows):
        said.append(
            "A service is timed over its network: from an encoded image to a mask, or to objects."
        )
    if any(row.phases_ms for row in report.rows):
        said.append(
            "H2D, compute, D2H: the GPU's time for copies to it, its work and copies back, in runs "
            "apart that wait after each; no copies: by the clock, inputs and outputs on the GPU."
        )
    return " ".join(said)


def notes(report: Report) -> Iterator[str]:
    """What a reader must know beside the figures."""
    rows, settings = report.rows, report.settings
    for row in rows:
        if row.gpu and row.gpu.moved:
            yield (
                f"! {row.name}: the GPU's clock moved by {row.gpu.moved:.0%} while it was timed "
                f"({row.gpu.sm_mhz} MHz). Lock it (nvidia-smi --lock-gpu-clocks), or compare "
                "ratios."
            )
        if row.gpu and row.gpu.throttled:
            why = ", ".join(f"{name} {share:.0%}" for name, share in row.gpu.throttled.items())
            yield f"{row.name}: the GPU was throttled ({why} of the time)."
    for label, manner in dict.fromkeys((row.label, row.manner) for row in rows if row.manner):
        yield f"{label}: {manner}."
    for command in dict.fromkeys(row.trtexec for row in rows if row.trtexec):
        yield f"The same engine by NVIDIA's own tool: {command}"
    if any(not row.steady for row in rows):
        yield (
            f"~ not steady: no three windows in a row agreed within {settings['agree']:.0%} "
            f"before {settings['seconds']:g} s were over."
        )
    if any(map(report.has_other_size, rows)):
        yield "No ratio where the input has another size than the first target's: other work."
    networks = {row.network: row.label for row in reversed(rows) if row.network}
    if len(networks) > 1:
        named = "; ".join(f"{name} is {network}" for network, name in reversed(networks.items()))
        yield f"Different networks do different work, so their ratio is not an export's: {named}."
    if shared := machine.shared_machine(report.others_cpu):
        yield shared
    for one in report.skipped:
        yield f"Skipped: {one.what}. {one.why}"
    yield f"{machine.say(report.machine)}."


def broken_limits(
    report: Report,
    images_per_second: float | None = None,
    milliseconds: float | None = None,
    ratio: float | None = None,
) -> Iterator[str]:
    """A sentence for every limit that a row does not keep, for continuous integration.

    Limits, None for any, are the least throughput, the longest median, and how many times the
    first target's median another may take.
    """
    for row in report.rows:
        name = row.name + (f", concurrency {row.concurrency}" if row.concurrency > 1 else "")
        rate, median, over = row.images_per_second, row.ms["p50"], row.over_first
        if images_per_second is not None and rate < images_per_second:
            yield f"{name}: {rate:.2f} images/s; at least {images_per_second:g} are required."
        if milliseconds is not None and median > milliseconds:
            yield f"{name}: {median:.2f} ms; at most {milliseconds:g} are allowed."
        if ratio is not None and report.has_other_size(row):
            yield f"{name}: its input has another size than the first target's: there is no ratio."
        if ratio is not None and over is not None and over["value"] > ratio:
            yield (
                f"{name}: {over['value']:.3f} times the first target's time; at most {ratio:g} "
                "are allowed."
            )


def as_json(report: Report) -> str:
    """The whole report."""
    return report.model_dump_json(indent=2) + "\n"


def markdown(report: Report) -> str:
    """Tables and notes, to be pasted."""
    lines = [head(report), "", *_table(cells(report)), ""]
    lines += [f"- {note}" for note in notes(report)]
    for section in report.sections:
        lines += ["", section.heading, "", *_table(section.table())]
    return "\n".join(lines) + "\n"


def _table(columns: Columns) -> Iterator[str]:
    rules = ["---", *["---:"] * (len(columns) - 1)]
    for row in (columns, rules, *zip(*columns.values(), strict=True)):
        escaped = (cell.replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(escaped)} |"


def csv(report: Report) -> str:
    """One line per row, nested values under dotted names."""
    found = [dict(flat(row.model_dump())) for row in report.rows]
    titles = list(dict.fromkeys(title for row in found for title in row))
    file = io.StringIO()
    writer = comma_separated.DictWriter(file, titles, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return file.getvalue()


def flat(found: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values under dotted names."""
    for key, value in found.items():
        name, several = f"{before}{key}", isinstance(value, list | tuple)
        if isinstance(value, dict):
            yield from flat(value, f"{name}.")
        elif several and value and isinstance(value[0], dict):
            for number, one in enumerate(value, 1):
                yield from flat(one, f"{name} {number}.")
        else:
            yield name, " ".join(map(str, value)) if several else value
