"""The clock's columns of Table 1: each method as published and as deployed.

`prepare` makes and exports every network once and keeps them in a folder, which takes minutes
and needs no quiet; `measure` times what is there, which does. Every side is a process of its
own, so its memory is its own, and sides of one form (eager PyTorch, ONNX Runtime) take turns:
what is compared was measured at the same time.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from benchmarks.networks import trained_like
from benchmarks.table1_rows import FDCONV, PLAIN, Frame, make
from benchmarks.table1_side import WEIGHTS, open_session
from benchmarks.timing import spread
from fdconv_deploy.export import export_module
from fdconv_deploy.export.validation.sample_inputs import sample_tensor
from fdconv_deploy.latency import machine, ratio
from fdconv_deploy.latency.measure import Schedule, Series, sample_until_steady
from fdconv_deploy.latency.networks import RunOptions, Target
from fdconv_deploy.latency.workers import Worker
from fdconv_deploy.ops.native import native_library

FORMS = ("eager", "exported")
RECORD = "prepared.json"
# FDConv's bundle with its operators in C, where they are built.
NATIVE = "fdconv-native"


def prepare(
    names: Sequence[str],
    frame: Frame,
    size: tuple[int, int],
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Make every row's network and write its weights and its ONNX file below ``folder``.

    Rows that are there already are kept, so an interrupted run can be taken up again.
    """
    made = {"frame": asdict(frame), "size": list(size)}
    for name in names:
        place = folder / name
        if (place / RECORD).exists():
            if json.loads((place / RECORD).read_text())["of"] != made:
                raise SystemExit(f"{place} holds another network or size. Give another folder.")
            continue
        progress(f"making and exporting {name}")
        shutil.rmtree(place, ignore_errors=True)  # what an interrupted run left
        row = _prepare(name, frame, size, place)
        (place / RECORD).write_text(json.dumps({"of": made, **row}))
        gc.collect()
    (folder / RECORD).write_text(json.dumps({**made, "names": list(names)}))


def _prepare(name: str, frame: Frame, size: tuple[int, int], place: Path) -> dict[str, float]:
    """One row: the exported file's size in MB, and its largest error against PyTorch."""
    x = sample_tensor(1, size, seed=1)
    torch.manual_seed(0)
    network = trained_like(make(name, frame))
    place.mkdir(parents=True)
    save_model(network, str(place / WEIGHTS))
    file = export(name, network, x, place / "onnx")
    megabytes = sum(f.stat().st_size for f in file.parent.rglob("*")) / 1e6
    with torch.inference_mode():
        expected = network(x).numpy()
    session = open_session(file, torch.get_num_threads())
    answer = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    error = float(np.abs(answer - expected).max() / np.abs(expected).max())
    return {"onnx_mb": round(megabytes, 1), "max_rel_error": error}


def export(row: str, network: nn.Module, x: Tensor, folder: Path) -> Path:
    """Export a network into ``folder``: the ONNX file."""
    if row == FDCONV:
        # Parity has tests of its own; here a random network's rounding must not stop the clock.
        return export_module(network, x, folder, tolerance=1e-2).model_path(1)
    folder.mkdir()
    program = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
    assert program is not None
    file = folder / "model.onnx"
    program.save(file, external_data=True)
    return file


def measure(
    folder: Path,
    *,
    threads: int,
    schedule: Schedule,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time every row that `prepare` left in ``folder``, in both forms: JSON."""
    prepared = json.loads((folder / RECORD).read_text())
    names = prepared.pop("names")
    rows = {name: json.loads((folder / name / RECORD).read_text()) for name in names}
    for key in ("onnx_mb", "max_rel_error"):
        prepared[key] = {name: row[key] for name, row in rows.items()}
    result: dict[str, Any] = {**prepared, "ms": {}, "over_plain": {}, "memory_mb": {}, "steady": {}}
    library, _ = native_library()
    shares = []
    for form in FORMS:
        with ExitStack() as stack:
            workers = {}
            natively = [NATIVE] if form == "exported" and FDCONV in names and library else []
            for name in [*names, *natively]:
                progress(f"{form}: opening {name}")
                given = {"library": str(library)} if name == NATIVE else {}
                row = FDCONV if name == NATIVE else name
                target = _target(form, row, folder, {**prepared, **given}, threads)
                workers[name] = stack.enter_context(Worker(target))
            cases = {name: Series(worker.sample) for name, worker in workers.items()}
            shares.append(_take_turns(form, cases, list(workers.values()), schedule, progress))
        plain = cases[PLAIN].medians
        for name, case in cases.items():
            key = f"{form}/{name}"
            result["ms"][key] = spread(case.seconds)
            result["steady"][key] = case.steady
            result["memory_mb"][key] = workers[name].opened.peak_mb
            if name != PLAIN:
                result["over_plain"][key] = ratio(case.medians, plain)
    return {**result, "others_cpu": max(shares)}


def _take_turns(
    form: str,
    cases: dict[str, Series],
    workers: list[Worker],
    schedule: Schedule,
    progress: Callable[[str], None],
) -> float:
    """The share of the CPUs that other processes used meanwhile."""

    def told(rounds: int, steady: int, spent: float) -> None:
        progress(f"{form}: {rounds} rounds, {steady} of {len(cases)} steady, {spent:.0f} s")

    with machine.Bystanders(lambda: sum(one.opened.cpu_seconds for one in workers)) as others:
        sample_until_steady(list(cases.values()), schedule, told)
    return others.share or 0.0


def _target(form: str, name: str, folder: Path, prepared: dict[str, Any], threads: int) -> Target:
    given = {"form": form, "name": name, "folder": str(folder), **prepared}
    source = "benchmarks.table1_side:open_side"
    options = RunOptions(threads=threads, overrides=given)
    return Target(kind="call", source=source, backend=form, options=options)
