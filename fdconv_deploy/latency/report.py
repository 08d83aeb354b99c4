"""The report of ``fdconv bench``: as JSON, a table, Markdown and CSV, and its limits."""

from __future__ import annotations

import csv as comma_separated
import io
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from fdconv_deploy.latency import machine
from fdconv_deploy.ops.native import NCHW, Native

# A GPU's clock that moves by more than this share of itself makes times of one row differ.
MOVED = 0.03


class GpuState(TypedDict):
    """A GPU while one target was timed: "min", "median" and "max" of its readings.

    ``throttled``: why its clock was held down, and the share of readings that said so.
    """

    readings: int
    sm_mhz: dict[str, float] | None
    memory_mhz: dict[str, float] | None
    watts: dict[str, float] | None
    celsius: dict[str, float] | None
    throttled: dict[str, float]


class Row(TypedDict):
    """One target at one concurrency.

    ``ms`` holds quantiles of a request's milliseconds ("p50", "p90", "p99", "q1", "q3", "min",
    "mean"), ``over_first`` how many times the first target's time it took ("value", "q1", "q3"),
    None for the first, and where the input has another size than the first's. On a GPU ``manner``
    tells its rounding, streams and synchronisation, ``phases_ms`` holds medians of a `Phases`,
    ``gpu`` what the GPU was like meanwhile, ``engine`` TensorRT's file. What is not known is None.
    """

    kind: str
    source: str
    backend: str
    choice: str
    network: str
    native: Native
    operators: str
    device: str
    precision: str
    batch: int
    concurrency: int
    size: Sequence[int] | None
    whole: bool
    threads: int
    runs: int
    ms: dict[str, float]
    images_per_second: float
    steady: bool
    windows_ms: list[float]
    over_first: dict[str, float] | None
    import_seconds: float
    load_seconds: float
    first_ms: float
    loaded_mb: int | None
    peak_mb: int | None
    device_mb: int | None
    joules_per_image: float | None
    manner: str
    phases_ms: dict[str, float] | None
    gpu: GpuState | None
    engine: str | None


class LayerTime(TypedDict):
    """Milliseconds of a layer by part."""

    name: str
    ms: dict[str, float]


class Profile(TypedDict):
    """Time by layer of one target; ``sums`` are milliseconds by part over all layers."""

    title: str
    source: str
    how: str
    parts: list[str]
    sums: dict[str, float]
    layers: list[LayerTime]


class LayerDivergence(TypedDict):
    """Largest difference as a share of the largest value, and 1 − cosine of the angle."""

    name: str
    max_rel: float
    angle: float


class Divergences(TypedDict):
    """How far one bundle is from the first, by layer."""

    title: str
    how: str
    layers: list[LayerDivergence]


class _Report(TypedDict):
    kind: str
    format: int
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    skipped: list[dict[str, str]]
    others_cpu: float | None


class Report(_Report, total=False):
    """All of it; layers where they were asked for."""

    profiles: list[Profile]
    divergences: list[Divergences]


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _known(value: float | None) -> str:
    return "–" if value is None else f"{value:,}"


def _phase(row: Row, name: str) -> str:
    return "–" if row["phases_ms"] is None else f"{row['phases_ms'][name]:.3f}"


def _spread(row: Row, name: Literal["sm_mhz", "watts", "celsius"]) -> dict[str, float] | None:
    return row["gpu"] and row["gpu"][name]


def _span(row: Row, name: Literal["sm_mhz", "watts", "celsius"]) -> str:
    found = _spread(row, name)
    if found is None:
        return "–"
    low, high = f"{found['min']:.0f}", f"{found['max']:.0f}"
    return low if low == high else f"{low}–{high}"


def _clock_moved(row: Row) -> float:
    """How far a GPU's clock moved while a target was timed, as a share of its median."""
    found = _spread(row, "sm_mhz")
    return (found["max"] - found["min"]) / found["median"] if found and found["median"] else 0.0


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "batch": lambda row: str(row["batch"]),
    "concurrency": lambda row: str(row["concurrency"]),
    "input": lambda row: "×".join(map(str, row["size"])) if row["size"] else "–",
    "p50 ms": lambda row: (
        _milliseconds(row["ms"]["p50"])
        + ("" if row["steady"] else " ~")
        + (" !" if _clock_moved(row) > MOVED else "")
    ),
    "p90": lambda row: _milliseconds(row["ms"]["p90"]),
    "p99": lambda row: _milliseconds(row["ms"]["p99"]),
    "vs. first": lambda row: f"{row['over_first']['value']:.2f}×" if row["over_first"] else "–",
    "H2D": lambda row: _phase(row, "h2d"),
    "compute": lambda row: _phase(row, "compute"),
    "D2H": lambda row: _phase(row, "d2h"),
    "no copies": lambda row: _phase(row, "no_copies"),
    "images/s": lambda row: f"{row['images_per_second']:.2f}",
    "load s": lambda row: "–" if row["kind"] == "service" else f"{row['load_seconds']:.2f}",
    "first ms": lambda row: _milliseconds(row["first_ms"]),
    "peak MB": lambda row: _known(row["peak_mb"]),
    "GPU MB": lambda row: _known(row["device_mb"]),
    "J/image": lambda row: _known(row["joules_per_image"]),
    "GPU MHz": lambda row: _span(row, "sm_mhz"),
    "W": lambda row: _span(row, "watts"),
    "°C": lambda row: _span(row, "celsius"),
    "runs": lambda row: str(row["runs"]),
}
# Shown only where it tells rows apart or is known at all.
_ONLY_WHERE: dict[str, Callable[[Row], bool]] = {
    **dict.fromkeys(
        ("H2D", "compute", "D2H", "no copies"), lambda row: row["phases_ms"] is not None
    ),
    "GPU MHz": lambda row: row["gpu"] is not None and row["gpu"]["sm_mhz"] is not None,
    "W": lambda row: row["gpu"] is not None and row["gpu"]["watts"] is not None,
    "°C": lambda row: row["gpu"] is not None and row["gpu"]["celsius"] is not None,
    "concurrency": lambda row: row["concurrency"] > 1,
    "GPU MB": lambda row: row["device_mb"] is not None,
    "J/image": lambda row: row["joules_per_image"] is not None,
}


def target_name(row: Row) -> str:
    """What a row is of: source, backend and precision."""
    short = row["source"] if row["kind"] == "service" else Path(row["source"]).name
    # Portable operators go without saying, unless they were asked for.
    operators = row["operators"].partition(" ")[0]
    how = f", {operators}" if operators == "native" or row["native"] is False else ""
    how += " in NCHW" if row["native"] == NCHW else ""
    return f"{short}, {row['backend']}{how}, {row['precision']}"


def cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of text, for people."""
    rows = report["rows"]
    shown = {
        title: cell
        for title, cell in _COLUMNS.items()
        if title not in _ONLY_WHERE or any(map(_ONLY_WHERE[title], rows))
    }
    found = [[target_name(row), *(cell(row) for cell in shown.values())] for row in rows]
    place = ["", *shown].index("vs. first")
    for row, line in zip(rows, found, strict=True):
        if _first(report, row) is row:
            line[place] = "1"
    return ["", *shown], found


def _first(report: Report, row: Row) -> Row:
    """The row that another one is compared with."""
    fields = row["batch"], row["concurrency"]
    return next(one for one in report["rows"] if (one["batch"], one["concurrency"]) == fields)


def _of_other_size(report: Report, row: Row) -> bool:
    return row["over_first"] is None and _first(report, row) is not row


def head(report: Report) -> str:
    """What is inside a latency, to stand above the table."""
    rows = report["rows"]
    local = [row for row in rows if row["kind"] != "service"]
    said = []
    if any(row["whole"] for row in local):
        said.append("ms: one request, from decoded pixels to labels or objects.")
    elif local:
        said.append("ms: one request, from inputs in host memory to outputs in host memory.")
    if len(local) < len(rows):
        said.append(
            "A service is timed over its network: from an encoded image to a mask, or to objects."
        )
    if any(row["phases_ms"] for row in rows):
        said.append(
            "H2D, compute, D2H: the GPU's time for copies to it, its work and copies back, in runs "
            "apart that wait after each; no copies: by the clock, inputs and outputs on the GPU."
        )
    return " ".join(said)


def trtexec(row: Row) -> str | None:
    """NVIDIA's own benchmark of the same engine, one request at a time; None of other backends."""
    if row["engine"] is None:
        return None
    options = "--useCudaGraph --exposeDMA --infStreams=1 --warmUp=500 --duration=10"
    return f"trtexec --loadEngine={shlex.quote(row['engine'])} {options}"


def notes(report: Report) -> Iterator[str]:
    """What a reader must know beside the figures."""
    rows, settings = report["rows"], report["settings"]
    for row in rows:
        state = row["gpu"]
        if state is not None and _clock_moved(row) > MOVED:
            yield (
                f"! {target_name(row)}, batch {row['batch']}: the GPU's clock moved by "
                f"{_clock_moved(row):.0%} while it was timed ({_span(row, 'sm_mhz')} MHz). Lock it "
                "(nvidia-smi --lock-gpu-clocks), or compare ratios."
            )
        if state is not None and state["throttled"]:
            why = ", ".join(f"{name} {share:.0%}" for name, share in state["throttled"].items())
            name = f"{target_name(row)}, batch {row['batch']}"
            yield f"{name}: the GPU was throttled ({why} of the time)."
    for row in {(target_name(row), row["manner"]): row for row in rows if row["manner"]}.values():
        yield f"{target_name(row)}: {row['manner']}."
    for command in dict.fromkeys(filter(None, map(trtexec, rows))):
        yield f"The same engine by NVIDIA's own tool: {command}"
    if any(not row["steady"] for row in rows):
        yield (
            f"~ not steady: no three windows in a row agreed within {settings['agree']:.0%} "
            f"before {settings['seconds']:g} s were over."
        )
    if any(_of_other_size(report, row) for row in rows):
        yield "No ratio where the input has another size than the first target's: other work."
    networks = {row["network"]: target_name(row) for row in reversed(rows) if row["network"]}
    if len(networks) > 1:
        named = "; ".join(f"{name} is {network}" for network, name in reversed(networks.items()))
        yield f"Different networks do different work, so their ratio is not an export's: {named}."
    if shared := machine.shared_machine(report["others_cpu"]):
        yield shared
    for one in report["skipped"]:
        yield f"Skipped: {one['what']}. {one['why']}"
    yield f"{machine.say(report['machine'])}."


def broken_limits(
    report: Report,
    images_per_second: float | None = None,
    milliseconds: float | None = None,
    ratio: float | None = None,
) -> Iterator[str]:
    """A sentence for every limit that a row does not keep, for continuous integration.

    Args:
        images_per_second: the least throughput; None for any.
        milliseconds: the longest median.
        ratio: how many times the first target's median another may take.
    """
    for row in report["rows"]:
        many = f", concurrency {row['concurrency']}" if row["concurrency"] > 1 else ""
        name = f"{target_name(row)}, batch {row['batch']}{many}"
        rate, median, over = row["images_per_second"], row["ms"]["p50"], row["over_first"]
        if images_per_second is not None and rate < images_per_second:
            yield f"{name}: {rate:.2f} images/s; at least {images_per_second:g} are required."
        if milliseconds is not None and median > milliseconds:
            yield f"{name}: {median:.2f} ms; at most {milliseconds:g} are allowed."
        if ratio is not None and _of_other_size(report, row):
            yield f"{name}: its input has another size than the first target's: there is no ratio."
        if ratio is not None and over is not None and over["value"] > ratio:
            yield (
                f"{name}: {over['value']:.3f} times the first target's time; at most {ratio:g} "
                "are allowed."
            )


def as_json(report: Report) -> str:
    """The whole report."""
    return json.dumps(report, indent=2, ensure_ascii=False) + "\n"


def markdown(report: Report) -> str:
    """Tables and notes, to be pasted."""
    titles, rows = cells(report)
    lines = [
        head(report),
        "",
        *_table(titles, [[cell.replace("|", "\\|") for cell in row] for row in rows]),
    ]
    lines += ["", *(f"- {note}" for note in notes(report))]
    for profile in report.get("profiles", []):
        parts = profile["parts"]
        layers = [*profile["layers"], LayerTime(name="**sum**", ms=profile["sums"])]
        spent = [[layer["ms"].get(part, 0.0) for part in parts] for layer in layers]
        rows = [
            [layer["name"], *(f"{one:.2f}" for one in (*times, sum(times)))]
            for layer, times in zip(layers, spent, strict=True)
        ]
        lines += ["", f"Milliseconds by layer: {profile['title']}", ""]
        lines += _table(["", *parts, "sum"], rows)
    for found in report.get("divergences", []):
        rows = [[x["name"], f"{x['max_rel']:.1e}", f"{x['angle']:.1e}"] for x in found["layers"]]
        lines += ["", f"Divergence by layer: {found['title']}", ""]
        lines += _table(["", "largest error / largest value", "1 − cosine"], rows)
    return "\n".join(lines) + "\n"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(row)} |" for row in (titles, ["---", *["---:"] * (len(titles) - 1)], *rows)
    ]


def csv(report: Report) -> str:
    """One line per row, nested values under dotted names."""
    flat = [dict(_flat(row)) for row in report["rows"]]
    titles = list(dict.fromkeys(title for row in flat for title in row))
    file = io.StringIO()
    writer = comma_separated.DictWriter(file, titles, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def _flat(row: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            yield f"{before}{key}", text
