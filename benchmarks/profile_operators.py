"""Where an exported network's time goes: ``python -m benchmarks.profile_operators``.

Milliseconds per run by part (convolutions, kernel assembly, band modulation, attention, the
rest) and by operator, FDConv beside its baseline, both profiled in one process by ONNX
Runtime; by default the R50 backbone at 512×512.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, add_case_arguments, named_case
from benchmarks.export_size import TOLERANCE
from benchmarks.options import keep, script
from fdconv_deploy.export import export_module
from fdconv_deploy.latency import machine
from fdconv_deploy.profiling import PARTS, WARM_UP
from fdconv_deploy.profiling.profile import Cost, ProfiledGraph


def measure(case: Case, folder: Path, *, threads: int, runs: int = 10) -> dict[str, Any]:
    """Export both networks and profile them: JSON with ``fdconv`` and ``plain``."""
    x = case.images()
    result: dict[str, Any] = {"title": case.title, "case": case.as_dict()}
    for name, dynamic in (("fdconv", True), ("plain", False)):
        place = folder / name
        place.mkdir()
        network = case.make(dynamic=dynamic)
        bundle = export_module(network, x, place / "bundle", tolerance=TOLERANCE)
        model = bundle.model_path(case.batch)
        graph = ProfiledGraph(model, place, threads=threads)
        for _ in range(runs + WARM_UP):
            graph.run({"input": x.numpy()})
        result[name] = by_part(graph.costs())
    return result


def sums_by(costs: Sequence[Cost], what: str) -> dict[str, float]:
    """Milliseconds by ``part`` or by ``operator``, the largest first."""
    sums: defaultdict[str, float] = defaultdict(float)
    for cost in costs:
        sums[getattr(cost, what)] += cost.milliseconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def by_part(costs: Sequence[Cost]) -> dict[str, Any]:
    """Sums by part, by operator, and by operator within each part, in milliseconds."""

    def rounded(sums: Mapping[str, float]) -> dict[str, float]:
        return {key: round(value, 2) for key, value in sums.items()}

    within = {part: [cost for cost in costs if cost.part == part] for part in PARTS}
    return {
        "total": round(sum(cost.milliseconds for cost in costs), 2),
        "nodes": len(costs),
        "parts": {part: round(sum(c.milliseconds for c in within[part]), 2) for part in PARTS},
        "operators": rounded(sums_by(costs, "operator")),
        "operators_by_part": {part: rounded(sums_by(within[part], "operator")) for part in PARTS},
    }


def show(result: dict[str, Any]) -> None:
    """Print a result for people."""
    fdconv, plain = result["fdconv"], result["plain"]
    print(f"{result['title']}: milliseconds per run")
    print(f"{'':24} {'FDConv':>10} {'plain':>10}   of FDConv's, the largest operators")
    for part in PARTS:
        largest = list(fdconv["operators_by_part"][part].items())[:5]
        said = ", ".join(f"{operator} {spent:.1f}" for operator, spent in largest if spent >= 0.1)
        print(f"{part:24} {fdconv['parts'][part]:10.1f} {plain['parts'][part]:10.1f}   {said}")
    print(f"{'sum':24} {fdconv['total']:10.1f} {plain['total']:10.1f}\n")
    print(f"{'operator':24} {'FDConv':>10} {'plain':>10}")
    mine, others = fdconv["operators"], plain["operators"]
    for operator in sorted(mine | others, key=lambda o: -mine.get(o, 0)):
        print(f"{operator:24} {mine.get(operator, 0):10.2f} {others.get(operator, 0):10.2f}")


def main() -> None:
    parser = script(__doc__)
    add_case_arguments(parser)
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    machine.warn_if_busy()
    case = named_case(options)
    where = machine.describe(options.threads)
    with tempfile.TemporaryDirectory() as name:
        result = measure(case, Path(name), threads=options.threads, runs=options.runs)
    show(result)
    keep(options, "profile", where, result)


if __name__ == "__main__":
    main()
