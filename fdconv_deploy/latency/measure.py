"""From sides to a report: children are opened, take turns, and are asked what they took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.latency import machine
from fdconv_deploy.latency.interleaving import Case, Rules, take_turns
from fdconv_deploy.latency.targets import Plan, Side, Skipped, UnavailableError
from benchmarks.timing import ratio
from fdconv_deploy.latency.worker_handle import Child

FORMAT = 1
# What stays free when another side is opened.
SPARE = 300e6


def measure(
    plan: Plan,
    rules: Rules,
    *,
    concurrency: Sequence[int] = (1,),
    progress: Callable[[str, float], None] = lambda *_: None,
) -> dict[str, Any]:
    """Time every side: the report, as JSON.

    Sides of one batch size are alive together and take turns; batch sizes follow one another.

    :param progress: told what is going on, and what share of all (0–1) is done at the most.
    :raises FDConvError: a side that was asked for by name cannot be had, or none can.
    """
    where = machine.describe(plan.sides[0].threads)
    skipped = list(plan.skipped)
    rows: list[dict[str, Any]] = []
    others: list[float] = []
    groups = [(batch, list(sides)) for batch, sides in _by_batch(plan.sides)]
    for number, (batch, sides) in enumerate(groups):

        def said(text: str, share: float, number: int = number) -> None:
            progress(text, (number + share) / len(groups))

        found, busy, missing = _group(sides, batch, rules, concurrency, said)
        rows += found
        skipped += missing
        others += [] if busy is None else [busy]
    if not rows:
        raise FDConvError(f"Nothing could be timed. {skipped[0].what}: {skipped[0].why}")
    return {
        "kind": "bench",
        "format": FORMAT,
        "machine": where,
        "settings": {**asdict(rules), "concurrency": list(concurrency)},
        "rows": rows,
        "skipped": [asdict(one) for one in skipped],
        "others_cpu": max(others) if others else None,
    }


def _by_batch(sides: Sequence[Side]) -> Iterator[tuple[int, Iterator[Side]]]:
    yield from groupby(sorted(sides, key=lambda side: side.batch), key=lambda side: side.batch)


def _group(
    sides: Sequence[Side],
    batch: int,
    rules: Rules,
    concurrency: Sequence[int],
    progress: Callable[[str, float], None],
) -> tuple[list[dict[str, Any]], float | None, list[Skipped]]:
    with ExitStack() as stack:
        children: list[Child] = []
        skipped: list[Skipped] = []
        for side in sides:
            progress(f"opening {side.name}", 0.0)
            try:
                _check_memory(side, children)
                children.append(stack.enter_context(Child(side)))
            except FDConvError as error:
                if side.named:
                    raise
                skipped.append(Skipped(side.name, str(error)))
        if not children:
            return [], None, skipped
        cases = [Case(child, each) for child in children for each in concurrency]

        def told(turns: int, steady: int, seconds: float) -> None:
            text = f"batch {batch}: {turns} turns, {steady} of {len(cases)} steady"
            progress(text, min(seconds / rules.seconds, 1.0) if rules.seconds else 1.0)

        progress(f"batch {batch}: warming up", 0.0)
        served = any(side.kind == "service" for side in sides)
        with machine.Bystanders(lambda: sum(child.cpu_seconds for child in children)) as others:
            take_turns(cases, rules, told)
        rows = []
        for case, child in zip(cases, [c for c in children for _ in concurrency], strict=True):
            base = next(one for one in cases if one.concurrency == case.concurrency)
            rows.append(_row(case, child, None if base is case else base))
        # A service's own work is not told from that of others.
        return rows, None if served else others.share, skipped


def _check_memory(side: Side, alive: Sequence[Child]) -> None:
    """Raise `UnavailableError` where another child would most likely end them all."""
    free = machine.memory()
    held = max((child.opened["loaded_mb"] for child in alive), default=0.0) * 1e6
    if free and free < held + SPARE:
        raise UnavailableError(
            f"{free / 1e6:,.0f} MB of memory are free, and a side held {held / 1e6:,.0f} MB. Time "
            f"fewer at once; {side.name} is the first too many."
        )


def _row(case: Case, child: Child, base: Case | None) -> dict[str, Any]:
    side, opened = child.side, child.opened
    details = opened["details"]
    seconds, images = case.seconds, side.batch * len(case.seconds)
    backend = details.get("backend", side.backend)
    joules = sum(case.joules) / images if case.joules else None
    return {
        "kind": side.kind,
        "source": side.source,
        "backend": backend if side.backend in ("auto", "http") else side.backend,
        "choice": details.get("choice", ""),
        "native": side.native,
        "operators": details.get("operators", ""),
        "device": opened["device"],
        "precision": details.get("precision", side.precision),
        "batch": side.batch,
        "concurrency": case.concurrency,
        "size": details.get("size"),
        "whole": side.whole or side.kind == "service",
        "threads": side.threads,
        "runs": len(seconds),
        "ms": _quantiles(seconds),
        "images_per_second": round(images / sum(case.walls), 3),
        "steady": case.steady,
        "windows_ms": [round(median * 1e3, 4) for median in case.windows],
        "over_first": _over(case, base),
        "import_seconds": round(opened["import_seconds"], 3),
        "load_seconds": round(opened["load_seconds"], 3),
        "first_ms": round(opened["first_seconds"] * 1e3, 2),
        "loaded_mb": _memory(child, opened["loaded_mb"]),
        "peak_mb": _memory(child, child.peak_mb),
        "device_mb": None if child.device_mb is None else round(child.device_mb),
        "joules_per_image": None if joules is None else round(joules, 4),
    }


def _memory(child: Child, megabytes: float) -> int | None:
    """None for a service: the child is only its client."""
    return None if child.side.kind == "service" else round(megabytes)


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    shares = {"p50": 50, "p90": 90, "p99": 99, "q1": 25, "q3": 75}
    found = np.percentile(seconds, list(shares.values())) * 1e3
    made = {name: round(float(value), 4) for name, value in zip(shares, found, strict=True)}
    return {
        **made,
        "min": round(min(seconds) * 1e3, 4),
        "mean": round(float(np.mean(seconds)) * 1e3, 4),
    }


def _over(case: Case, base: Case | None) -> dict[str, float] | None:
    """How many times the first side's time this one takes; None for the first itself."""
    if base is None:
        return None
    return ratio(*([float(np.median(one)) for one in c.rounds] for c in (case, base)))
