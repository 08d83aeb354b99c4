"""What to install when a package that not everybody needs is missing.

Hints name the packages themselves, as the installed metadata lists them under an extra: that is
true of a clone and of an installed wheel alike, and needs no index to know this project.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from fdconv_deploy.errors import FDConvError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_PROJECT = "fdconv-deploy"
# Modules that are not called as their packages are.
_PACKAGES = {
    "PIL": "pillow",
    "cuda": "cuda-bindings",
    "cuda.bindings": "cuda-bindings",
    "cv2": "opencv-python-headless",
    "google": "protobuf",
    "google.protobuf": "protobuf",
    "grpc": "grpcio",
    "opentelemetry": "opentelemetry-sdk",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-http",
    "pynvml": "nvidia-ml-py",
}
_MODULES = {package: module for module, package in _PACKAGES.items()} | {
    "onnxruntime-gpu": "onnxruntime"
}


def install(*names: str, extra: str | None = None) -> str:
    """The command line that installs packages: ``pip install 'onnx>=1.17' safetensors …``.

    torch comes first and by itself, since beside other packages pip may pick a build of another
    kind; without an NVIDIA driver it comes from PyTorch's CPU index (PyPI's Linux build holds
    gigabytes of CUDA). Another package of ONNX Runtime that is in the way is uninstalled before.

    Args:
        names: modules or packages that are wanted, installed or not.
        extra: of this project's; what else of it is not installed is named too, so that the next
            attempt does not end at the next package.
    """
    known = list(_requirements())
    wanted = dict.fromkeys(_package(name) for name in names)
    if extra is not None:
        wanted |= dict.fromkeys(r.name for e, r in known if e == extra and not _installed(r.name))
    # As the extra has it, where several do.
    text = {r.name: str(r).partition(";")[0] for _, r in known}
    text |= {r.name: str(r).partition(";")[0] for e, r in known if e == extra}
    specified = {name: shlex.quote(text.get(name, name)) for name in wanted}
    steps = []
    here = [name for name in _RUNTIMES if installed_version(name)]
    if set(wanted) & set(_RUNTIMES) and set(here) - set(wanted):
        steps.append(" ".join(["pip uninstall -y", *here]))
    if torch := specified.pop("torch", None):
        # Where PyPI's build would be the CUDA one in vain.
        plain = sys.platform == "linux" and not nvidia_driver()
        index = ["--index-url", "https://download.pytorch.org/whl/cpu"] if plain else []
        steps.append(" ".join(["pip install", torch, *index]))
    if specified:
        steps.append(" ".join(["pip install", *specified.values()]))
    return " && ".join(steps)


def nvidia_driver() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def missing(error: ImportError, extra: str | None = None) -> str | None:
    """A package that an import did not find, and what installs it, to end a sentence with.

    Args:
        extra: it belongs to; the smallest that has it when not given, or when that has it not.

    Returns:
        "onnx, which is not installed: pip install …", or None where the error is another: a package
        that does not load, or none that this project asks for.
    """
    if error.name is None or not isinstance(error, ModuleNotFoundError):
        return None
    package = _package(error.name)
    known = extras()
    having = [name for name, packages in known.items() if package in packages]
    if known and not having:
        return None
    if extra not in having:
        extra = min(having, key=lambda name: len(known[name]), default=None)
    return f"{package}, which is not installed: {install(package, extra=extra)}"


@contextmanager
def needed_by(what: str, extra: str | None = None) -> Iterator[None]:
    """Around imports: a missing package is an ``FDConvError``, as `missing` says it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (package := missing(error, extra)) is None:
            raise
        raise FDConvError(f"{what} needs {package}") from error


def extras() -> dict[str, list[str]]:
    """The packages that each extra of this project asks for on this machine; "" is the core."""
    found: dict[str, list[str]] = {}
    for extra, requirement in _requirements():
        found.setdefault(extra, []).append(requirement.name)
    return found


# They all unpack into the folder ``onnxruntime``.
_RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
)


def clashing_runtimes() -> str | None:
    """That several packages of ONNX Runtime are installed, and what to do; None if not."""
    here = [name for name in _RUNTIMES if installed_version(name)]
    if len(here) < 2:
        return None
    wanted = "onnxruntime-gpu" if "onnxruntime-gpu" in here else here[-1]
    return (
        f"{' and '.join(here)} are installed and unpack into one folder, where the later has "
        f"overwritten the earlier: {install(wanted)}"
    )


def installed_for(package: str) -> tuple[str, str] | None:
    """The installed package that serves for one and its version; None if there is none.

    Every package of ONNX Runtime runs on CPUs, as ``onnxruntime`` does.
    """
    serving = _RUNTIMES if package == _RUNTIMES[0] else (package,)
    found = ((name, installed_version(name)) for name in serving)
    return next(((name, version) for name, version in found if version), None)


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str) -> str:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if found := _PACKAGES.get(".".join(parts[:length])):
            return found
    return parts[0].replace("_", "-")


def _installed(package: str) -> bool:
    try:
        return (
            importlib.util.find_spec(_MODULES.get(package, package.replace("-", "_"))) is not None
        )
    except ImportError:  # what it lies in is missing
        return False


def _requirements() -> Iterator[tuple[str, Requirement]]:
    """(extra, "" for everybody; what it asks for on this machine), without other extras."""
    from packaging.requirements import Requirement

    try:
        found = metadata.metadata(_PROJECT)
    except metadata.PackageNotFoundError:  # run from its source: names without versions, then
        return
    for extra in ("", *(found.get_all("Provides-Extra") or ())):
        for text in found.get_all("Requires-Dist") or ():
            requirement = Requirement(text)
            of_extra = "extra" in str(requirement.marker)
            fits = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if fits and of_extra == bool(extra) and requirement.name != _PROJECT:
                yield extra, requirement
