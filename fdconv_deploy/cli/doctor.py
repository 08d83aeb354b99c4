"""``fdconv doctor``."""

from __future__ import annotations

import json
import platform
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fdconv_deploy.cli.options import Json, say
from fdconv_deploy.environment import (
    clashing_runtimes,
    extras,
    install,
    installed_for,
    nvidia_driver,
)
from fdconv_deploy.errors import BackendError
from fdconv_deploy.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fdconv_deploy.runtime import Session

# What each extra of the package is for.
_PURPOSES = {
    "": "open and run bundles",
    "cpu": "run on CPUs",
    "openvino": "run on CPUs, in OpenVINO",
    "gpu": "run on NVIDIA GPUs, build TensorRT engines",
    "export": "read checkpoints, export, verify",
    "serve": "serve over HTTP",
    "grpc": "serve over gRPC",
    "tracing": "OpenTelemetry traces of the service",
    "bands": "images of many bands (GeoTIFF)",
    "coco": "box and mask AP of detectors",
    "bench": "plots and memory figures of fdconv bench",
}
# Answers that differ by more than this are not float32's; rounding itself costs 1e-6 to 1e-5.
_FLOAT32 = 1e-3


@dataclass
class Timing:
    """What a bundle's run took here in one backend."""

    backend: str
    operators: str
    milliseconds: float
    # Of answers from those of ONNX Runtime with portable operators, relative to the largest value.
    difference: float


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE",
            help="A bundle to time in every backend that is usable here; the fastest in float32 is "
            "recommended.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show versions, backends, native operators and GPUs, and what to install for the rest.

    Exit code 1 if no backend can run a bundle here.
    """
    found = _diagnose()
    if bundle is not None:
        usable = [name for name, problem in found["backends"].items() if problem is None]
        timings, found["refused"] = _timings(bundle, usable)
        found["recommended"] = recommended(timings)
        found["timings"] = [asdict(timing) for timing in timings]
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    if all(problem is not None for problem in found["backends"].values()):
        sys.exit(1)


def _diagnose() -> dict[str, Any]:
    """For JSON: what this machine has of what FDConv Deploy can use; see also `_timings`."""
    from fdconv_deploy.latency import machine
    from fdconv_deploy.ops.native import native_library
    from fdconv_deploy.runtime.backends.threads import available_cores

    library, why = native_library()
    described = [gpu.describe() for gpu in machine.gpus()]
    gpus = [f"{gpu['name']}, driver {gpu['driver']}" for gpu in described]
    if not gpus and nvidia_driver():
        gpus = ["an NVIDIA driver is installed; nvidia-ml-py (extra gpu) would tell its GPUs"]
    providers, wanted = None, extras()
    with suppress(ImportError):
        import onnxruntime

        providers = list(onnxruntime.get_available_providers())
    return {
        "fdconv_deploy": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": available_cores(),
        "native_operators": f"{'in use' if library else 'not in use'}: {why}",
        "onnxruntime_providers": providers,
        "clash": clashing_runtimes(),
        "backends": _backends(),
        "gpus": gpus,
        "purposes": [_purpose(extra, wanted.get(extra, [])) for extra in _PURPOSES],
        "recommended": "auto; to have a bundle timed in every backend: fdconv doctor BUNDLE",
        "timings": [],
        "refused": {},
    }


def _timings(path: Path, backends: Sequence[str]) -> tuple[list[Timing], dict[str, str]]:
    """One run of the smallest batch in each backend, interleaved; and why others refuse it."""
    from fdconv_deploy.runtime import Bundle, open_session
    from fdconv_deploy.runtime.backends.base import differences
    from fdconv_deploy.runtime.batching import least_seconds
    from fdconv_deploy.sample_images import manifest_feeds

    bundle = Bundle.open(path)
    feeds = manifest_feeds(bundle.manifest, bundle.batch_sizes[0])
    with ExitStack() as stack:

        def opened(name: str, native: bool | None = None) -> Session:
            return stack.enter_context(open_session(bundle, name, native=native))

        expected = opened("onnxruntime-cpu", native=False).run_raw(feeds)
        found, runs, refused = {}, {}, {}
        for name in backends:
            try:
                session = opened(name)
                furthest = max(differences(session.run_raw(feeds), expected).values())
            except BackendError as error:  # noqa: PERF203 - TensorRT without engines, say
                refused[name] = str(error)
            else:
                found[name] = session.operators, furthest
                runs[name] = partial(session.run_raw, feeds)
        seconds = least_seconds(runs)
        timings = [
            Timing(name, operators, round(seconds[name] * 1e3, 2), furthest)
            for name, (operators, furthest) in found.items()
        ]
        return timings, refused


def recommended(timings: Sequence[Timing]) -> str:
    """The fastest backend whose answers are float32's, and any that is faster by rounding more."""
    exact = [timing for timing in timings if timing.difference <= _FLOAT32]
    if not exact:
        return "none: no backend's answers are those of ONNX Runtime's portable operators"
    best = min(exact, key=lambda timing: timing.milliseconds)
    said = [f"{best.backend}, {best.milliseconds:.1f} ms a run"]
    said += [
        f"{other.backend} takes {other.milliseconds:.1f} ms, and its answers differ by "
        f"{other.difference:.1e} of the largest value"
        for other in timings
        if other not in exact and other.milliseconds < best.milliseconds
    ]
    return "; ".join(said)


def _backends() -> dict[str, str | None]:
    """Why each backend of the runtime cannot be used here; None where it can."""
    from fdconv_deploy.runtime.backends import BACKENDS, BackendOptions
    from fdconv_deploy.runtime.backends.onnxruntime import cuda_problem

    def problem(name: str) -> str | None:
        try:
            BACKENDS[name](BackendOptions())
        except BackendError as error:
            return error.cause  # the advice is of a bundle
        return cuda_problem() if name == "onnxruntime-cuda" else None

    return {name: problem(name) for name in BACKENDS}


def _purpose(extra: str, packages: Sequence[str]) -> dict[str, Any]:
    """What an extra is for, what of it is here, and what installs the rest."""
    serving = {package: installed_for(package) for package in packages}
    missing = [package for package, found in serving.items() if found is None]
    return {
        "extra": extra,
        "purpose": _PURPOSES[extra],
        "installed": dict(filter(None, serving.values())),
        "missing": missing,
        "install": install(*missing, extra=extra or None) if missing else None,
    }


def _print(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    providers = found["onnxruntime_providers"]
    runtime = "not installed" if providers is None else ", ".join(providers)
    facts = {
        "fdconv-deploy": "{fdconv_deploy} (Python {python}, {system})".format(**found),
        "CPU cores": str(found["cpu_cores"]),
        "Native operators": found["native_operators"],
        "GPUs": "; ".join(found["gpus"]) or "none found",
        "ONNX Runtime": f"{runtime} ({found['clash']})" if found["clash"] else runtime,
    }
    for name, fact in facts.items():
        console.print(f"[bold]{name}[/]: ", end="")
        say(fact)
    table = Table("Backend", "Usable", box=None, pad_edge=False)
    for name, problem in found["backends"].items():
        table.add_row(name, "yes" if problem is None else f"no: {problem}")
    console.print(table)
    if found["timings"]:
        table = Table("Backend", "ms", "Difference", "Operators", box=None, pad_edge=False)
        for one in found["timings"]:
            figures = f"{one['milliseconds']:.1f}", f"{one['difference']:.1e}"
            table.add_row(one["backend"], *figures, one["operators"])
        console.print(table)
    for name, why in found["refused"].items():
        say(f"{name} refuses the bundle: {why}")
    console.print("[bold]Recommended[/]: ", end="")
    say(found["recommended"])
    table = Table("Extra", "For", "Installed", "Missing", box=None, pad_edge=False)
    for one in found["purposes"]:
        have = ", ".join(f"{name} {version}" for name, version in one["installed"].items())
        table.add_row(one["extra"] or "(core)", one["purpose"], have, ", ".join(one["missing"]))
    console.print(table)
    for one in found["purposes"]:
        if one["install"]:
            say(f"{one['extra'] or 'core'} ({one['purpose']}): {one['install']}")
