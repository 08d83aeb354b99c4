"""What opening and running a bundle takes: ``python -m benchmarks.session [BUNDLE]``.

Seconds to import the runtime, to open a bundle with and without hashing it, and to warm up; the
first request after that beside the tenth; the memory held at each step beside the weights' size;
the CPU time burnt after a run. Each in fresh processes. Without BUNDLE, UPerNet-R50 at 512×512,
batches 1 and 4, is exported first.

``--variants`` runs ONNX Runtime with other settings than the runtime's, side by side;
``--binding`` compares bound outputs with returned ones; ``--mapped`` the memory of graphs whose
files ONNX Runtime maps with that of bytes it is given. They are why the settings are as they are.

``--beside BASELINE``, a bundle, or ``baseline`` for one that is exported, compares what a session
adds to a process with what the baseline's adds: opened, and after three runs. Without BUNDLE, that
is of the R50 backbone at 512×512.
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

from benchmarks import export_size
from benchmarks.cases import Case
from benchmarks.options import keep, script
from benchmarks.timing import interleave, spread
from fdconv_deploy.latency import machine
from fdconv_deploy.runtime import Bundle

REQUESTS = 10
# Changes to ONNX Runtime's own defaults; "runtime" is what fdconv_deploy.runtime sets.
VARIANTS = (
    "onnxruntime", "runtime", "pattern", "no-arena", "no-spinning", "spinning-on",
    "no-prepacking", "no-optimisation",
)  # fmt: skip

SIZES = "opened_mb", "run_mb"

IMPORT = """
import time
start = time.perf_counter()
import fdconv_deploy.runtime
print(time.perf_counter() - start)
"""

LIFE = """
import json, sys, time
import numpy as np, psutil
from fdconv_deploy.runtime import open_session
bundle, threads, verify, batch, requests = sys.argv[1:]
process, found = psutil.Process(), {}
def step(name, since):
    found[name + "_seconds"] = time.perf_counter() - since
    found[name + "_mb"] = process.memory_info().rss / 1e6
start = time.perf_counter()
session = open_session(bundle, "onnxruntime-cpu", threads=int(threads), verify=verify == "yes")
step("open", start)
batch = int(batch)
start = time.perf_counter()
session.runner._graphs.get(batch)
step("load", start)
start = time.perf_counter()
session.warm_up([batch])
step("warm_up", start)
specs = session.bundle.manifest.inputs[batch]
times = []
for number in range(int(requests)):
    random = np.random.default_rng(number)
    feeds = {s.name: random.standard_normal(s.shape, dtype=np.float32) for s in specs}
    start = time.perf_counter()
    session.run_raw(feeds)
    times.append(time.perf_counter() - start)
found["requests_seconds"] = times
found["settled_mb"] = process.memory_info().rss / 1e6
burnt = time.process_time()
time.sleep(0.5)
found["cpu_after_run_seconds"] = time.process_time() - burnt
print(json.dumps(found))
"""

MEMORY = """
import json, resource, sys
import numpy as np, psutil
from benchmarks.session import load
path, variant, threads = sys.argv[1:]
session = load(path, variant, int(threads))
loaded = psutil.Process().memory_info().rss
feeds = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()}
for _ in range(3):
    session.run(None, feeds)
print(json.dumps({
    "loaded_mb": round(loaded / 1e6),
    "settled_mb": round(psutil.Process().memory_info().rss / 1e6),
    "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
}))
"""


MAPPED = """
import json, resource, sys, time
import numpy as np, onnxruntime, psutil
from fdconv_deploy.runtime import Bundle, open_session
from fdconv_deploy.runtime.backends import BackendOptions
from fdconv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
path, threads, side = sys.argv[1:]
process, found = psutil.Process(), {}
def step(name):
    found[name + "_mb"] = round(process.memory_info().rss / 1e6)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found[name + "_peak_mb"] = round(peak * 1024 / 1e6)
bundle = Bundle.open(path)
step("empty")
start = time.perf_counter()
if side == "mapped":
    backend = OnnxRuntimeBackend("onnxruntime-cpu", BackendOptions(int(threads)))
    graphs = {
        batch: onnxruntime.InferenceSession(
            str(bundle.model_path(batch)),
            backend._session_options(int(threads)),
            providers=["CPUExecutionProvider"],
        )
        for batch in bundle.batch_sizes
    }
    run = lambda batch, feeds: graphs[batch].run(None, feeds)
else:
    session = open_session(path, "onnxruntime-cpu", threads=int(threads))
    step("opened")
    for batch in bundle.batch_sizes:
        session.runner._graphs.get(batch)
    run = lambda batch, feeds: session.run_raw(feeds)
found["load_seconds"] = round(time.perf_counter() - start, 2)
step("loaded")
for batch in bundle.batch_sizes:
    feeds = {s.name: np.zeros(s.shape, s.dtype) for s in bundle.manifest.inputs[batch]}
    run(batch, feeds)
step("run")
print(json.dumps(found))
"""


ADDED = """
import json, sys
import numpy as np, onnxruntime, psutil
from fdconv_deploy.runtime import open_session
bundle, threads, native = sys.argv[1:]
process = psutil.Process()
before = process.memory_info().rss
def added():
    return round((process.memory_info().rss - before) / 1e6, 1)
native = {"on": True, "off": False, "nchw": "nchw", "none": None}[native]
session = open_session(bundle, "onnxruntime-cpu", threads=int(threads), native=native)
batch = min(session.bundle.batch_sizes)
session.runner._graphs.get(batch)
session.runner._release()
found = {"opened_mb": added()}
specs = session.bundle.manifest.inputs[batch]
feeds = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in specs}
for _ in range(3):
    session.run_raw(feeds)
found.update(run_mb=added(), operators=session.operators)
print(json.dumps(found))
"""


def fresh(program: str, *arguments: object) -> Any:
    """The JSON that a program prints, run in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    output = subprocess.check_output(command, text=True, cwd=machine.ROOT)
    return json.loads(output.splitlines()[-1])


def measure(bundle: Path, *, threads: int, repeats: int = 5) -> dict[str, Any]:
    """A session's life, for each of the bundle's batch sizes."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    lives: dict[str, Any] = {}
    for batch in opened.batch_sizes:
        runs = [fresh(LIFE, bundle, threads, "yes", batch, REQUESTS) for _ in range(repeats)]
        quick = [fresh(LIFE, bundle, threads, "no", batch, 0) for _ in range(repeats)]
        firsts, tenths = ([run["requests_seconds"][n] for run in runs] for n in (0, -1))
        keys = ("open_seconds", "load_seconds", "warm_up_seconds", "cpu_after_run_seconds")
        lives[str(batch)] = {
            **{key: spread([run[key] for run in runs], 3, 1.0) for key in keys},
            "open_unhashed_seconds": spread([run["open_seconds"] for run in quick], 3, 1.0),
            "first_request_ms": spread(firsts, 3),
            "tenth_request_ms": spread(tenths),
            **{
                key: round(float(np.median([run[key] for run in runs])))
                for key in ("open_mb", "load_mb", "warm_up_mb", "settled_mb")
            },
        }
    size = manifest.files[manifest.weights].bytes if manifest.weights else 0
    imports = [fresh(IMPORT) for _ in range(repeats)]
    return {
        "weights_mb": round(size / 1e6, 1),
        "import_seconds": spread(imports, 3, 1.0),
        "batches": lives,
    }


def mapped(bundle: Path, *, threads: int) -> dict[str, Any]:
    """Memory of all the bundle's graphs: of files that are mapped, and of bytes."""
    return {side: fresh(MAPPED, bundle, threads, side) for side in ("mapped", "bytes")}


def beside(bundle: Path, baseline: Path, *, threads: int, repeats: int) -> dict[str, Any]:
    """What a session adds to a process: the baseline's, and this bundle's by its operators."""
    sides = {"baseline": (baseline, "none")}
    sides |= {f"native {native}": (bundle, native) for native in ("on", "nchw", "off")}
    found: dict[str, Any] = {}
    for side, (path, native) in sides.items():
        runs = [fresh(ADDED, path, threads, native) for _ in range(repeats)]
        found[side] = {key: spread([run[key] for run in runs], 1, 1.0) for key in SIZES}
        found[side]["operators"] = runs[0]["operators"]
    for side in found.values():
        own, other = (each["run_mb"]["median"] for each in (side, found["baseline"]))
        side["ratio"] = round(own / other, 2)
    return found


def load(path: str | Path, variant: str, threads: int) -> Any:
    """An ONNX Runtime session of one of ``VARIANTS``."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if variant != "onnxruntime":
        options.enable_mem_pattern = variant == "pattern"
        stop = "0" if variant == "spinning-on" else "1"
        options.add_session_config_entry("session.force_spinning_stop", stop)
    if variant == "no-arena":
        options.enable_cpu_mem_arena = False
    if variant == "no-spinning":
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if variant == "no-prepacking":
        options.add_session_config_entry("session.disable_prepacking", "1")
    if variant == "no-optimisation":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def variants(model: Path, *, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Load time, run time (interleaved in this process) and memory (fresh ones) by variant."""
    sides, loads = {}, {}
    for variant in VARIANTS:
        start = time.perf_counter()
        session = load(model, variant, threads)
        loads[variant] = round(time.perf_counter() - start, 2)
        feeds = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()}
        sides[variant] = lambda session=session, feeds=feeds: session.run(None, feeds)
    times = interleave(sides, rounds=rounds, seconds=seconds)
    return {
        variant: {
            "load_seconds": loads[variant],
            "ms": spread(times[variant]),
            **fresh(MEMORY, model, variant, threads),
        }
        for variant in VARIANTS
    }


def binding(model: Path, *, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Runs whose outputs ONNX Runtime returns, or writes into a new or a kept array."""
    session = load(model, "runtime", threads)
    inputs = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()}
    shapes = {o.name: tuple(o.shape) for o in session.get_outputs()}
    kept = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}

    def bound(outputs: dict[str, np.ndarray]) -> None:
        bind = session.io_binding()
        for name, array in inputs.items():
            bind.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            bind.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        session.run_with_iobinding(bind)

    sides = {
        "returned": lambda: session.run(None, inputs),
        "new": lambda: bound({n: np.empty(s, np.float32) for n, s in shapes.items()}),
        "kept": lambda: bound(kept),
    }
    times = interleave(sides, rounds=rounds, seconds=seconds)
    megabytes = round(sum(array.nbytes for array in kept.values()) / 1e6, 1)
    return {
        "outputs_mb": megabytes,
        "ms": {side: spread(values, 2) for side, values in times.items()},
    }


def show(result: dict[str, Any]) -> None:
    """Print a result for people."""
    for side, found in result.get("beside", {}).items():
        opened, run = (found[key]["median"] for key in SIZES)
        print(
            f"  {side:12} adds {opened:6} MB opened, {run:6} after three runs: "
            f"{found['ratio']:.2f}× ({found['operators']})"
        )
    if "batches" not in result:
        return
    print(f"weights {result['weights_mb']} MB; import {result['import_seconds']['median']} s")
    for batch, life in result["batches"].items():
        print(f"batch {batch}")
        for key, value in life.items():
            if isinstance(value, dict):
                print(f"  {key:24} {value['median']:9} [{value['q1']} to {value['q3']}]")
            else:
                print(f"  {key:24} {value:9}")
    for variant, found in result.get("variants", {}).items():
        ms = found["ms"]
        print(
            f"  {variant:16} load {found['load_seconds']:5.2f} s, run {ms['median']:8.1f} ms "
            f"[{ms['q1']} to {ms['q3']}], memory {found['loaded_mb']} MB loaded, "
            f"{found['settled_mb']} after three runs, {found['peak_mb']} at most"
        )
    for side, found in result.get("mapped", {}).items():
        print(f"  {side:8} {', '.join(f'{key} {value}' for key, value in found.items())}")
    if "binding" in result:
        print(f"outputs of {result['binding']['outputs_mb']} MB")
        for side, ms in result["binding"]["ms"].items():
            print(f"  {side:16} {ms['median']:8.2f} ms [{ms['q1']} to {ms['q3']}]")


def main() -> None:
    parser = script(__doc__)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes for each figure")
    parser.add_argument("--variants", action="store_true", help="compare other settings too")
    parser.add_argument("--binding", action="store_true", help="compare IO binding too")
    parser.add_argument("--mapped", action="store_true", help="compare mapped files too")
    parser.add_argument("--beside", metavar="BASELINE", help="compare memory with another's")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=180.0)
    options = parser.parse_args()
    machine.warn_if_busy()
    where = machine.describe(options.threads)
    with tempfile.TemporaryDirectory(prefix="fdconv-bench-") as folder:
        how = dict(threads=options.threads, repeats=options.repeats)
        if options.beside:
            result, name = _beside(options, Path(folder), how)
            print(name)
            show(result)
            keep(options, "session-memory", where, {"title": name, **result})
            return
        bundle = options.bundle or _export(Path(folder) / "upernet-r50")
        name = "UPerNet-R50, 512×512" if options.bundle is None else bundle.name
        result = measure(bundle, **how)
        model = Bundle.open(bundle).model_path(min(Bundle.open(bundle).batch_sizes))
        how = dict(threads=options.threads, rounds=options.rounds, seconds=options.seconds)
        if options.variants:
            result["variants"] = variants(model, **how)
        if options.mapped:
            result["mapped"] = mapped(bundle, threads=options.threads)
        if options.binding:
            result["binding"] = binding(model, **how)
    print(name)
    show(result)
    keep(options, "session", where, {"title": name, **result})


def _beside(
    options: argparse.Namespace, folder: Path, how: dict[str, int]
) -> tuple[dict[str, Any], str]:
    """Its result and title, of the bundles that the options name or of exported ones."""
    case = Case("backbone", 50, 512, 512, 1)
    bundle, baseline = options.bundle, Path(options.beside)
    if bundle is None:
        bundle = folder / "fdconv"
        export_size.measure(case, case.make(), bundle)
    if options.beside == "baseline":
        baseline = folder / "baseline"
        export_size.measure(case, case.make(dynamic=False), baseline, dynamic=False)
    title = case.title if options.bundle is None else options.bundle.name
    return {"beside": beside(bundle, baseline, **how)}, title


def _export(destination: Path) -> Path:
    from benchmarks.networks import build, upernet
    from fdconv_deploy.export.api import export_network

    network = build(upernet(50))
    export_network(network, destination, size=(512, 512), batches=(1, 4), tolerance=1e-2)
    return destination


if __name__ == "__main__":
    main()
