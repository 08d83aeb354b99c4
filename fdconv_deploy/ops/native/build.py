"""Compiles the native operators: one shared library, by the C compiler there is.

For OpenVINO there is a second one, an extension, which needs its headers and a C++ compiler.

Standard library only: the package's own build runs this file before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
# No -ffast-math: rounding by adding a large number must stay as written.
OBJECT_FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"]
FLAGS = [*OBJECT_FLAGS, "-shared"]
CPP_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-attributes"]
# Threads keep workspaces beyond the sessions that made them: the library stays loaded.
STAYS = ["-Wl,-z,nodelete"] if sys.platform == "linux" else []
Command = list[str] | None


class BuildError(Exception):
    """The library cannot be built here; the text says why and what to do."""


def library_name(openvino: str | None = None) -> str:
    """Of the library, or the extension of a version of OpenVINO, that this source makes here.

    It changes with the source, so that a library of another version is never taken for it.
    """
    digest = hashlib.sha256()
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    kind = "native" if openvino is None else f"openvino{openvino}"
    return f"fdconv_{kind}_{digest.hexdigest()[:12]}_{platform}.so"


def compiler(variable: str = "CC", names: tuple[str, ...] = ("cc", "gcc", "clang")) -> Command:
    """The C compiler's command: ``$CC``, or the first of cc, gcc and clang on the path."""
    if os.environ.get(variable):
        command = shlex.split(os.environ[variable])
        return command if shutil.which(command[0]) else None
    return next(([name] for name in names if shutil.which(name)), None)


def build(folder: Path) -> Path:
    """Compile the library into ``folder``; libraries of other versions there are removed.

    Raises:
        BuildError: no compiler, an unknown system, or the compiler failed.
    """
    if sys.platform == "win32":
        raise BuildError("The native operators are built on Linux and macOS, not on Windows.")
    command = compiler()
    if command is None:
        raise BuildError(
            "The native operators need a C compiler (cc, gcc, clang or $CC), and none was found. "
            "Install one, e.g. apt-get install gcc libc6-dev; without them bundles run all the "
            "same, slower."
        )
    sources = sorted(str(path) for path in SOURCE.glob("*.c"))
    return _install(
        folder,
        library_name(),
        "fdconv_native_*.so",
        lambda made: _compile([*command, *FLAGS, *STAYS, *sources, "-o", made, "-lm"]),
    )


def build_openvino(folder: Path, package: Path, version: str) -> Path:
    """Compile OpenVINO's extension into ``folder``; others there are removed.

    Args:
        folder: where to.
        package, version: OpenVINO's folder, which holds its headers and libraries, and version.

    Raises:
        BuildError: no compiler, an unknown system, or the compiler failed.
    """
    c, cpp = compiler(), compiler("CXX", ("c++", "g++", "clang++"))
    if sys.platform != "linux" or c is None or cpp is None:
        raise BuildError(
            "The native operators for OpenVINO are built on Linux, by a C and a C++ compiler ($CC, "
            "$CXX). Install them, e.g. apt-get install g++; without, OpenVINO runs bundles all the "
            "same, slower."
        )
    wanted = ("libopenvino.so", "libopenvino_onnx_frontend.so", "libtbb.so")
    found = [sorted((package / "libs").glob(f"{name}.*")) for name in wanted]
    if not all(found) or not (package / "include/tbb/parallel_for.h").exists():
        raise BuildError(
            f"{package} lacks the headers or libraries that PyPI's wheel of OpenVINO has: install "
            "that, e.g. pip install openvino."
        )

    def make(made: str) -> None:
        objects = []
        for path in sorted(SOURCE.glob("*.c")):
            objects.append(str(Path(made).with_name(path.stem + ".o")))
            _compile([*c, *OBJECT_FLAGS, "-c", str(path), "-o", objects[-1]])
        flags = [*CPP_FLAGS, f"-I{package}/include", "-Wl,-Bsymbolic", *STAYS]
        libraries = [str(paths[0]) for paths in found]
        source = str(SOURCE / "openvino_extension.cpp")
        _compile([*cpp, *flags, source, *objects, *libraries, "-o", made, "-lm"])

    return _install(folder, library_name(version), "fdconv_openvino*.so", make)


def _compile(command: list[str]) -> None:
    # The user's own compiler.
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise BuildError(
            f"The compiler {command[0]} could not build the native operators: {lines[0].strip()}"
        )


def _install(folder: Path, name: str, others: str, make: Callable[[str], None]) -> Path:
    """Make a library and move it into place; those of other versions go."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    # In the target's own folder, so that the renaming is one step.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fdconv_native_") as scratch:
        made = Path(scratch) / target.name
        make(str(made))
        made.replace(target)
    for old in folder.glob(others):
        if old != target:
            old.unlink()
    return target
