"""``fdconv bench`` against itself and an outside clock: ``python -m benchmarks.stopwatch``.

Of one bundle, one after another: a stopwatch, ``fdconv bench``, the stopwatch, ``fdconv bench``,
the stopwatch. The stopwatch is a process that knows nothing of this project: it opens the graph
in ONNX Runtime, runs it over and over, and says the median. The two medians of ``fdconv bench``
must lie within 3 % of each other, and each within 5 % of the stopwatch's (the middle one of
three), on a quiet machine: exit 1 where they do not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import keep, script
from fdconv_deploy.latency import machine
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.runtime.bundle import Bundle

TWICE, OUTSIDE = 0.03, 0.05
SECONDS = 10.0

# Nothing of this project but its native operators where they are built: inputs of the same shape,
# and ONNX Runtime with its own defaults but for threads and the settings that the runtime makes.
LOOP = """
import sys, time
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
times = []
for _ in range(runs):
    start = time.perf_counter()
    session.run(None, feeds)
    times.append(time.perf_counter() - start)
print(np.median(times[len(times) // 5:]) * 1e3)
"""


def bench(bundle: Path, batch: int, threads: int, seconds: float) -> dict[str, Any]:
    """``fdconv bench`` as a user types it: its row."""
    command = [sys.executable, "-m", "fdconv_deploy", "bench", str(bundle), "--quiet"]
    command += ["--backend", "onnxruntime-cpu", "--batch", str(batch), "--threads", str(threads)]
    command += ["--seconds", str(seconds), "--json", "-"]
    output = subprocess.check_output(command, text=True, cwd=machine.ROOT)
    report: dict[str, Any] = json.loads(output)
    return {**report["rows"][0], "others_cpu": report["others_cpu"]}


def stopwatch(model: Path, threads: int, runs: int) -> float:
    """The median of some runs in milliseconds; the first fifth of them warms up."""
    library, _ = native_library()
    command = [sys.executable, "-c", LOOP, str(model), str(threads), str(runs)]
    command += [] if library is None else [str(library)]
    return float(subprocess.check_output(command, text=True))


def measure(bundle: Path, *, threads: int, seconds: float) -> dict[str, Any]:
    """All three: JSON, with ``twice`` and ``outside``, how far they are apart."""
    opened = Bundle.open(bundle)
    batch = opened.batch_sizes[0]
    model = opened.model_path(batch)
    # As long as a bench's windows take, so that both see as much of the machine's moods.
    runs = max(10, round(SECONDS * 1e3 / stopwatch(model, threads, 10)))
    outside, rows = [stopwatch(model, threads, runs)], []
    for _ in range(2):
        rows.append(bench(bundle, batch, threads, seconds))
        outside.append(stopwatch(model, threads, runs))
    medians = [row["ms"]["p50"] for row in rows]
    middle = float(np.median(outside))
    return {
        "bundle": bundle.name,
        "bench_ms": medians,
        "steady": [row["steady"] for row in rows],
        "stopwatch_ms": [round(one, 4) for one in outside],
        "twice": round(abs(medians[1] / medians[0] - 1), 4),
        "outside": round(max(abs(median / middle - 1) for median in medians), 4),
        "others_cpu": max(row["others_cpu"] or 0 for row in rows),
    }


def main() -> None:
    parser = script(__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="the packaged network if none")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each bench, at most")
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
    keep(options, "stopwatch", where, {**result, "held": held})
    sys.exit(0 if held else 1)


def _export(destination: Path) -> Path:
    from fdconv_deploy.demo import held_out, packaged_checkpoint
    from fdconv_deploy.export import export_checkpoint
    from fdconv_deploy.runtime import read_image

    # A picture it was trained on the like of: on others its own rounding may grow.
    picture = read_image(held_out()[0][0])
    return export_checkpoint(
        packaged_checkpoint(), destination, size=(384, 512), pictures=[picture]
    ).path


if __name__ == "__main__":
    main()
