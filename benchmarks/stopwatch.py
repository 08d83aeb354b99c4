"""``fdconv bench`` against itself and an outside clock: ``python -m benchmarks.stopwatch``.

Three measurements of one bundle, one after another: ``fdconv bench``, a loop that knows nothing
of it, and ``fdconv bench`` again. The loop is a process that opens the graph in ONNX Runtime and
runs it N or 3 N times, timed from outside by the wall clock; the difference over 2 N is a run,
whatever starting and loading took. The two medians must lie within 3 %, and each within 5 % of
the stopwatch, on a quiet machine: exit 1 where they do not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.records import write_json
from fdconv_deploy.benchmark import machine
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.runtime.backends.cores import available_cores
from fdconv_deploy.runtime.bundle import Bundle

TWICE, OUTSIDE = 0.03, 0.05
REPEATS = 5

# Nothing of this project but its native operators where they are built: inputs of the same shape,
# and ONNX Runtime with its own defaults but for threads and the settings that the runtime makes.
LOOP = """
import sys
import numpy as np, onnxruntime as ort
model, threads, runs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = ort.SessionOptions()
options.intra_op_num_threads = threads
options.enable_mem_pattern = False
options.add_session_config_entry("session.force_spinning_stop", "1")
if len(sys.argv) > 4:
    options.register_custom_ops_library(sys.argv[4])
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
random = np.random.default_rng(0)
feeds = {i.name: random.standard_normal(i.shape, dtype=np.float32) for i in session.get_inputs()}
for _ in range(runs):
    session.run(None, feeds)
"""


def bench(bundle: Path, batch: int, threads: int, seconds: float) -> dict[str, Any]:
    """``fdconv bench`` as a user types it: its row."""
    command = [sys.executable, "-m", "fdconv_deploy", "bench", str(bundle), "--quiet"]
    command += ["--backend", "onnxruntime-cpu", "--batch", str(batch), "--threads", str(threads)]
    command += ["--seconds", str(seconds), "--json", "-"]
    output = subprocess.check_output(command, text=True, cwd=machine.ROOT)
    report: dict[str, Any] = json.loads(output)
    return {**report["rows"][0], "others_cpu": report["others_cpu"]}


def stopwatch(model: Path, threads: int, runs: int) -> list[float]:
    """Milliseconds of a run, ``REPEATS`` times, by the wall clock of whole processes."""
    found = []
    for _ in range(REPEATS):
        short, long = (_wall(model, threads, n) for n in (runs, 3 * runs))
        found.append((long - short) / (2 * runs) * 1e3)
    return found


def _wall(model: Path, threads: int, runs: int) -> float:
    start = time.perf_counter()
    library, _ = native_library()
    command = [sys.executable, "-c", LOOP, str(model), str(threads), str(runs)]
    command += [] if library is None else [str(library)]
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def measure(bundle: Path, *, threads: int, seconds: float) -> dict[str, Any]:
    """All three: JSON, with ``twice`` and ``outside``, how far they are apart."""
    opened = Bundle.open(bundle)
    batch = opened.batch_sizes[0]
    first = bench(bundle, batch, threads, seconds)
    # Long enough that starting a process, which is never twice the same, weighs little.
    runs = max(3, round(3e3 / first["ms"]["p50"]))
    outside = stopwatch(opened.model_path(batch), threads, runs)
    second = bench(bundle, batch, threads, seconds)
    medians = [row["ms"]["p50"] for row in (first, second)]
    middle = float(np.median(outside))
    return {
        "bundle": bundle.name,
        "bench_ms": medians,
        "steady": [first["steady"], second["steady"]],
        "stopwatch_ms": round(middle, 4),
        "stopwatch_all_ms": [round(one, 4) for one in outside],
        "twice": round(abs(medians[1] / medians[0] - 1), 4),
        "outside": round(max(abs(median / middle - 1) for median in medians), 4),
        "others_cpu": max(first["others_cpu"] or 0, second["others_cpu"] or 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="the packaged network if none")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--seconds", type=float, default=30.0, help="of each bench, at most")
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    machine.warn_if_busy()
    where = machine.describe(options.threads)
    with tempfile.TemporaryDirectory(prefix="fdconv-stopwatch-") as folder:
        bundle = options.bundle or _export(Path(folder) / "streets")
        result = measure(bundle, threads=options.threads, seconds=options.seconds)
    for key, value in result.items():
        print(f"{key:18} {value}")
    held = result["twice"] <= TWICE and result["outside"] <= OUTSIDE
    print(f"{'held' if held else 'MISSED'}: twice within {TWICE:.0%}, outside within {OUTSIDE:.0%}")
    print(machine.say(where))
    if options.json:
        write_json(options.json, {"kind": "stopwatch", "machine": where, **result, "held": held})
    sys.exit(0 if held else 1)


def _export(destination: Path) -> Path:
    from export import export_checkpoint
    from fdconv_deploy.demo import held_out, packaged_checkpoint
    from fdconv_deploy.runtime import read_image

    # A picture it was trained on the like of: on others its own rounding may grow.
    picture = read_image(held_out()[0][0])
    return export_checkpoint(
        packaged_checkpoint(), destination, size=(384, 512), pictures=[picture]
    ).path


if __name__ == "__main__":
    main()
