"""Compiles the native operators: one shared library, by the C compiler there is.

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
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
# No -ffast-math: rounding by adding a large number must stay as written.
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"]
# Threads keep workspaces beyond the sessions that made them: the library stays loaded.
STAYS = ["-Wl,-z,nodelete"] if sys.platform == "linux" else []


class BuildError(Exception):
    """The library cannot be built here; the text says why and what to do."""


def library_name() -> str:
    """Of the library that this source makes on this platform.

    It changes with the source, so that a library of another version is never taken for it.
    """
    digest = hashlib.sha256()
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"fdconv_native_{digest.hexdigest()[:12]}_{platform}.so"


def compiler() -> list[str] | None:
    """The C compiler's command: ``$CC``, or the first of cc, gcc and clang on the path."""
    if os.environ.get("CC"):
        command = shlex.split(os.environ["CC"])
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


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
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / library_name()
    sources = sorted(str(path) for path in SOURCE.glob("*.c"))
    # In the target's own folder, so that the renaming is one step.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fdconv_native_") as scratch:
        made = Path(scratch) / target.name
        done = subprocess.run(  # noqa: S603 - the user's own compiler
            [*command, *FLAGS, *STAYS, *sources, "-o", str(made), "-lm"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            raise BuildError(
                f"The C compiler {shlex.join(command)} could not build the native operators: "
                f"{lines[0].strip()}"
            )
        made.replace(target)
    for old in folder.glob("fdconv_native_*.so"):
        if old != target:
            old.unlink()
    return target
