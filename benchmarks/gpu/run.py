"""The body of `benchmarks/gpu.sh`: environment, kernels, networks; one JSON record.

What must be true first: every kernel, then the networks, the plugins' code, and the rest as long as
time is left. The record is written before and after each part; what fails, is wrong or does not fit
is in it, never left out. After an illegal access CUDA gives a process nothing any more: the script
then starts itself again, and goes on with the next part.

Exit code 0: all that ran is right, though some may not have been run, for want of time or of a
package. 1: an answer is wrong, a part failed, or nothing could be measured. 130: interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from fdconv_deploy.errors import FDConvError

# What the measurements are made with, and what some of them need besides.
NEEDED = ("numpy", "torch", "triton")
OPTIONAL = ("cuda.bindings.driver", "onnx", "onnx_graphsurgeon", "onnxruntime", "tensorrt")
OURS = ("gpu.own_ptx", "gpu.kernels", "gpu.networks", "networks")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=450, help="start nothing that may end after this"
    )
    parser.add_argument("--output", type=Path, default=None, help="folder of the record")
    parser.add_argument("--dry-run", action="store_true", help="a toy network, no GPU")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)  # given by itself
    return parser.parse_args()


class Record:
    """What has been found so far, the clock, and the GPU's clocks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.start, self.seconds = time.monotonic(), options.seconds
        self.folder = options.output or Path(
            os.environ.get("OUT") or Path(__file__).parents[1] / "results"
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            sys.exit(f"error: the record cannot be written to {self.folder}: {e}")
        self.clocks: Any = None
        self.path: Path | None = options.resume
        self.done: set[str] = set()  # by the process before this one
        if options.resume is not None:
            self.content: dict[str, Any] = json.loads(options.resume.read_text())
            self.start -= self.content["elapsed"]
            self.done = set(self.content["seconds"])
            return
        self.content = {
            "date": datetime.now().isoformat(timespec="seconds"),
            "dry_run": options.dry_run,
            "elapsed": 0.0,
            "running": None,
            "imports": {},
            "environment": {"python": platform.python_version()},
            "summary": [],
            "seconds": {},
            "own_ptx": [],
            "kernels": [],
            "networks": [],
            "not_run": [],
            "failed": [],  # of those, not for want of time or of a package
        }

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def attempt(self, what: str, run: Callable[[], None], seconds: float = 5) -> bool:
        """Run one part that takes about so many seconds, or say why not; whether it ran.

        What takes 0 is run in any case.
        """
        if what in self.done and seconds:
            return False
        started = self.elapsed()
        reason, interrupted = None, False
        if seconds and started + seconds > self.seconds:
            reason = f"no time left of {self.seconds:.0f} s"
        else:
            self.content["running"] = what  # what hangs is named, too
            self.write()
            try:
                run()
            except (Exception, KeyboardInterrupt) as e:
                reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
                interrupted = isinstance(e, KeyboardInterrupt)
                if not isinstance(e, (ImportError, FDConvError)):  # those say what is not here
                    self.content["failed"].append(what)
            self.content["seconds"][what] = round(self.elapsed() - started, 2)
            self.content["running"] = None
        if reason is not None:
            self.content["not_run"].append({"what": what, "reason": reason[:300]})
            print(f"  {what}: not run ({reason[:200]})", flush=True)
        path = self.write()
        if interrupted:
            print(f"interrupted; what was measured before is in {path}", file=sys.stderr)
            sys.exit(130)
        if reason is not None and what in self.content["failed"] and seconds and poisoned():
            self.start_again()
        return reason is None

    def start_again(self) -> None:
        """Go on in a fresh process, since CUDA gives this one nothing any more."""
        print("  CUDA gives this process nothing any more: starting again", flush=True)
        if self.clocks is not None:
            self.clocks.close()
        command = [sys.executable, "-m", "benchmarks.gpu.run", *sys.argv[1:]]
        os.execv(sys.executable, [*command, "--resume", str(self.write())])

    def add(self, kind: str, measure: Callable[[], dict[str, Any]]) -> None:
        """A row of what was measured, right or wrong, with the clocks seen meanwhile."""
        start = time.monotonic()
        row = measure()
        if row["error"] is not None:
            row["within"] = row["error"] <= row["limit"]  # False for NaN
        if self.clocks is not None:
            row["clocks"] = self.clocks.between(start, time.monotonic())
        self.content[kind].append(row)
        print("  " + describe(kind, row), flush=True)

    def wrong(self) -> list[dict[str, Any]]:
        """Rows whose error is above their limit."""
        kinds = "own_ptx", "kernels", "networks"
        return [r for k in kinds for r in self.content[k] if not r.get("within", True)]

    def write(self) -> Path:
        """The record so far, whole at any time; its name has the day, the GPU and the time."""
        self.content["elapsed"] = round(self.elapsed(), 1)
        gpu = self.content["environment"].get("gpu", "gpu")
        name = "dry-run" if self.content["dry_run"] else gpu
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        day, _, clock = self.content["date"].partition("T")
        path = self.folder / f"{day}-gpu-{slug}-{clock.replace(':', '')}.json"
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")
        part.replace(path)
        if self.path is not None and self.path != path:
            self.path.unlink(missing_ok=True)  # before the GPU's name was known
        self.path = path
        return path


def poisoned() -> bool:
    """Whether CUDA refuses this process everything, as it does after an illegal access."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """FDConv beside the plain network and beside eager PyTorch, by backend, type and batch."""
    times = {(r["backend"], r["dtype"], r["batch"], r["network"]): r["ms"] for r in rows}
    found = []
    for (backend, dtype, batch, network), ms in times.items():
        if network != "FDConv":
            continue
        plain = times.get((backend, dtype, batch, "baseline"))
        eager = times.get(("eager", dtype, batch, "FDConv"))
        row = {"backend": backend, "dtype": dtype, "batch": batch, "ms": ms, "baseline_ms": plain}
        row["vs_baseline"] = None if plain is None else ms / plain
        row["eager_vs_this"] = None if eager is None else eager / ms
        found.append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Of `summarise`, for people."""
    titles = "FDConv ms", "baseline ms", "vs. baseline", "eager takes"
    lines = [f"{'':34}" + "".join(f"{title:>14}" for title in titles)]
    for row in rows:
        what = f"{row['backend']}, {row['dtype']}, batch {row['batch']}"
        figures = [(row[name], "") for name in ("ms", "baseline_ms")]
        figures += [(row[name], "×") for name in ("vs_baseline", "eager_vs_this")]
        cells = ("–" if value is None else f"{value:.3f}{unit}" for value, unit in figures)
        lines.append(f"{what:34}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def describe(kind: str, row: dict[str, Any]) -> str:
    """A row in a line."""
    what = row.get("layer") or f"{row['network']}, {row['backend']}"
    parts = [f"{what:40} {row['dtype']:8} batch {row.get('batch', 1)}"]
    if kind == "kernels":
        us = row["us"]
        parts.append(f"rows {us['rows']:.1f} columns {us['columns']:.1f} pair {us['pair']:.1f} µs")
        parts.append(f"floor {row['floor_us']:.1f} ({row['share']:.0%})")
    elif kind == "networks":
        parts.append(f"{row['ms']:.3f} ms {row['timed']}")
        if "h2d_ms" in row:
            parts.append(f"copies {row['h2d_ms']:.3f} in, {row['d2h_ms']:.3f} out")
    else:
        parts.append(f"PTX {row['ptx']}, launched by the driver")
    if row["error"] is not None:
        parts.append(f"error {row['error']:.1e}" + ("" if row["within"] else " WRONG"))
    if row.get("clocks"):
        seen = row["clocks"]
        parts.append(f"{seen['sm_mhz'][1]:.0f} MHz" + ("" if seen["steady"] else " (moved)"))
        parts += seen["throttled"]
    return ", ".join(parts)


def imports(record: Record) -> None:
    """Everything that is measured with, at once, so that what is missing is known in seconds."""
    from benchmarks.gpu.pydantic_stand_in import install_if_missing

    found: dict[str, Any] = record.content["imports"]
    if install_if_missing():
        found["pydantic"] = "not installed; a stand-in with defaults and no validation is used"
    for name in (*NEEDED, *(f"benchmarks.{ours}" for ours in OURS), *OPTIONAL):
        try:
            found[name] = getattr(importlib.import_module(name), "__version__", "here")
        except Exception as e:  # noqa: PERF203 - whatever a broken installation raises
            found[name] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            if name not in OPTIONAL:
                raise
    # Triton compiles its launcher by one; without, no kernel starts.
    compilers = filter(None, (os.environ.get("CC"), *map(shutil.which, ("gcc", "clang", "cc"))))
    found["C compiler"] = next(compilers, "none: Triton needs one to launch kernels; install gcc")
    record.write()


def environment(record: Record) -> int:
    """Describe the machine; its compute capability, e.g. 90."""
    import torch

    found = record.content["environment"]
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit()}
    if not torch.cuda.is_available():
        return 90
    from benchmarks.gpu.timing import Clocks, driver_state

    properties = torch.cuda.get_device_properties(0)
    found |= {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cache_mib": round(properties.L2_cache_size / 2**20, 1),
        "cudnn": torch.backends.cudnn.version(),
        "tf32": False,
    }
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # The visible device, which need not be the first that nvidia-smi lists.
    uuid = getattr(properties, "uuid", None)
    name = f"GPU-{uuid}" if uuid else "0"
    found["driver"] = driver_state(name)
    record.clocks = Clocks(name)
    return 10 * properties.major + properties.minor


def commit() -> str | None:
    """Of this repository; None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def compile_all(record: Record, networks: Any, capability: int) -> None:
    """All kernels at once, in processes, for Triton's cache: launching them finds them there."""
    import torch

    from benchmarks.gpu.kernels import Assembly
    from benchmarks.gpu.launches import noting_kernels
    from benchmarks.gpu.own_ptx import plugin_launches
    from fdconv_deploy.ops.compile_kernels import oldest_ptx, precompile, target_for
    from fdconv_deploy.ops.launch import starts_early

    workers = len(os.sched_getaffinity(0))
    dry = record.content["dry_run"]
    layers = dict(list(networks.layers.items())[:1]) if dry else networks.layers
    plugins = plugin_launches(layers)
    target = target_for(capability)
    precompile(plugins, target, ptx_version=oldest_ptx(target), workers=workers)
    launched: list[Any] = []
    if not dry and target == capability:
        with noting_kernels(lambda launch, *_: launched.append(launch)), torch.no_grad():
            for dtype in (torch.float16, torch.float32):
                networks.fused("FDConv", dtype, 1)(networks.image.to("cuda"))
        for layer, folded in layers.values():
            assembly = Assembly(layer, folded, 1, "cpu")
            forms = (torch.float16, True), (torch.float32, False), (torch.float32, True)
            launched += [assembly.rows(), *(assembly.columns(*form) for form in forms)]
        if starts_early(capability // 10):
            launched = [launch.early() for launch in launched]
        precompile(launched, capability, workers=workers)
    record.content["environment"]["compiled"] = len(set(plugins)) + len(set(launched))


def own_driver() -> Any:
    """The module ``cuda.bindings.driver``, of the package cuda-bindings."""
    return importlib.import_module("cuda.bindings.driver")


def main() -> None:
    options = arguments()
    dry = options.dry_run
    # Both are read when Triton is imported or compiles, here and in processes of their own.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    record = Record(options)
    if not record.attempt("imports", lambda: imports(record), 0):
        sys.exit(f"error: nothing can be measured here; see {record.write()}")
    print(json.dumps(record.content["imports"], indent=1))
    from fdconv_deploy.errors import BackendError
    from fdconv_deploy.folding.cuda import require_cuda
    from fdconv_deploy.ops.compile_kernels import target_for

    try:
        if not dry:
            require_cuda()
        capability = environment(record)
        target = target_for(capability)
    except BackendError as e:
        record.write().unlink()
        sys.exit(f"error: {e}\nTo see that this script works, run it with --dry-run.")
    print(json.dumps(record.content["environment"], indent=1), flush=True)
    from benchmarks.gpu.kernels import measure_kernels
    from benchmarks.gpu.networks import Networks, in_other_runtimes, in_pytorch, measure_networks
    from benchmarks.gpu.own_ptx import measure_own_ptx

    made: list[Networks] = []
    if record.attempt("building and folding the networks", lambda: made.append(Networks(dry)), 0):
        networks = made[0]
        record.attempt("compiling", lambda: compile_all(record, networks, capability))
        measure_kernels(record, networks.layers)
        measure_networks(record, in_pytorch(networks))
        driver: list[Any] = []
        # A wrong pointer would end all that this process does on the GPU: not first.
        found = not dry and record.attempt(
            "cuda.bindings.driver", lambda: driver.append(own_driver()), 0
        )
        if found:
            measure_own_ptx(record, networks.layers, target, *driver)
        measure_networks(record, in_other_runtimes(networks))
    if record.clocks is not None:
        record.clocks.close()
        record.content["environment"]["clocks"] = record.clocks.problem or "sampled"
    record.content["summary"] = summarise(record.content["networks"])
    print(f"\n{table(record.content['summary'])}\n\n{record.write()}")
    problems = [f"failed: {what}" for what in record.content["failed"]]
    if wrong := record.wrong():
        problems.append(f"{len(wrong)} of the answers are further off than their limits")
    if problems:
        sys.exit("\n".join(f"error: {problem}" for problem in problems))


if __name__ == "__main__":
    main()
