"""``fdconv doctor``."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fdconv_deploy.cli.options import Json
from fdconv_deploy.environment import clashing_runtimes, extras, install, installed_version
from fdconv_deploy.errors import BackendError
from fdconv_deploy.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

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


@dataclass
class Purpose:
    """What one extra is for, what of it is here, and what installs the rest."""

    extra: str
    purpose: str
    installed: dict[str, str]
    missing: list[str]
    install: str | None


@dataclass
class Diagnosis:
    """What this machine has of what FDConv Deploy can use."""

    fdconv_deploy: str
    python: str
    system: str
    cpu_cores: int
    native_operators: str
    onnxruntime_providers: list[str] | None
    clash: str | None
    backends: dict[str, str | None]
    gpus: list[str]
    purposes: list[Purpose]


def doctor(as_json: Json = False) -> None:
    """Show versions, backends, native operators and GPUs, and what to install for the rest.

    Exit code 1 if no backend can run a bundle here.
    """
    found = _diagnose()
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print(found)
    if all(problem is not None for problem in found.backends.values()):
        sys.exit(1)


def _diagnose() -> Diagnosis:
    from fdconv_deploy.environment import nvidia_driver
    from fdconv_deploy.latency.machine import describe_gpus
    from fdconv_deploy.ops.native import native_library
    from fdconv_deploy.runtime.backends.threads import available_cores

    library, why = native_library()
    gpus = [f"{gpu['name']}, driver {gpu['driver']}" for gpu in describe_gpus()]
    if not gpus and nvidia_driver():
        gpus = ["an NVIDIA driver is installed; nvidia-ml-py (extra gpu) would tell its GPUs"]
    return Diagnosis(
        fdconv_deploy=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu_cores=available_cores(),
        native_operators=f"{'in use' if library else 'not in use'}: {why}",
        onnxruntime_providers=_providers(),
        clash=clashing_runtimes(),
        backends=_backends(),
        gpus=gpus,
        purposes=[_purpose(extra, extras().get(extra, [])) for extra in _PURPOSES],
    )


def _backends() -> dict[str, str | None]:
    """Each backend of the runtime, and why it cannot be used here; None where it can."""
    from fdconv_deploy.runtime.backends import BACKENDS, BackendOptions
    from fdconv_deploy.runtime.backends.onnxruntime import cuda_problem

    def problem(name: str) -> str | None:
        try:
            BACKENDS[name](BackendOptions())
        except BackendError as error:
            return error.cause  # the advice is of a bundle
        return cuda_problem() if name == "onnxruntime-cuda" else None

    return {name: problem(name) for name in BACKENDS}


def _providers() -> list[str] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    return list(onnxruntime.get_available_providers())


def _purpose(extra: str, packages: Sequence[str]) -> Purpose:
    here = {package: version for package in packages if (version := installed_version(package))}
    missing = [package for package in packages if package not in here]
    command = install(*missing, extra=extra or None) if missing else None
    return Purpose(extra, _PURPOSES[extra], here, missing, command)


def _print(found: Diagnosis) -> None:
    console = Console(highlight=False)
    facts = {
        "fdconv-deploy": f"{found.fdconv_deploy} (Python {found.python}, {found.system})",
        "CPU cores": str(found.cpu_cores),
        "Native operators": found.native_operators,
        "GPUs": "; ".join(found.gpus) or "none found",
        "ONNX Runtime": "not installed"
        if found.onnxruntime_providers is None
        else ", ".join(found.onnxruntime_providers),
    }
    if found.clash:
        facts["ONNX Runtime"] += f" ({found.clash})"
    for name, fact in facts.items():
        console.print(f"[bold]{name}[/]: ", end="")
        console.print(fact, markup=False, soft_wrap=True)
    table = Table("Backend", "Usable", box=None, pad_edge=False)
    for name, problem in found.backends.items():
        table.add_row(name, "yes" if problem is None else f"no: {problem}")
    console.print(table)
    table = Table("Extra", "For", "Installed", "Missing", box=None, pad_edge=False)
    for purpose in found.purposes:
        have = ", ".join(f"{name} {version}" for name, version in purpose.installed.items())
        lack = ", ".join(purpose.missing)
        table.add_row(purpose.extra or "(core)", purpose.purpose, have, lack)
    console.print(table)
    for purpose in found.purposes:
        if purpose.install:
            console.print(
                f"{purpose.extra or 'core'} ({purpose.purpose}): {purpose.install}",
                markup=False,
                soft_wrap=True,
            )
