"""A CUDA runtime that is none: libraries by which programs built for CUDA start without a GPU.

ONNX Runtime's real CUDA provider asks the CUDA runtime for a device, memory and streams while it
makes a session: it places nodes, inserts copies, checks a graph for capture. None of that starts a
kernel. `build` compiles libraries that answer such questions (`cuda_stub.c`), and in which every
other function succeeds without doing anything. Nothing can be computed with them.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

ANSWERS = Path(__file__).with_suffix(".c")


def needed_functions(library: Path) -> dict[str, list[str]]:
    """Functions that a shared object takes from CUDA's libraries, by the library's file name."""
    listing = subprocess.check_output(["nm", "-D", "--undefined-only", str(library)], text=True)
    found: dict[str, list[str]] = defaultdict(list)
    for function, name in re.findall(r" U (\w+)@(lib(?:cu|nv)\S+)", listing):
        found[name].append(function)
    # The driver's functions carry no version.
    found["libcuda.so.1"] = re.findall(r"(?m) U (cu[A-Z]\w+)$", listing)
    sections = subprocess.check_output(["objdump", "-p", str(library)], text=True)
    for name in re.findall(r"NEEDED\s+(lib(?:cu|nv)\S+)", sections):
        found.setdefault(name, [])
    return dict(found)


def build(provider: Path, folder: Path) -> list[str]:
    """Compile every library that ``provider`` needs into ``folder``.

    Returns:
        The names of the functions that it takes from them.

    Raises:
        subprocess.CalledProcessError: the compiler (cc), nm or objdump failed.
    """
    answered = set(re.findall(r"(?m)^\w[\w ]* \**(\w+)\(", ANSWERS.read_text()))
    needed = needed_functions(provider)
    for name, functions in needed.items():
        others = folder / "others.c"
        silent = [f for f in functions if f not in answered]
        others.write_text("".join(f"int {one}(void) {{ return 0; }}\n" for one in silent))
        versions = folder / "versions"
        versions.write_text(f"{name} {{ global: *; }};\n")
        # A versioned library would not do for the driver's functions.
        script = [] if name == "libcuda.so.1" else [f"-Wl,--version-script={versions}"]
        options = ["-shared", "-fPIC", "-o", str(folder / name), f"-Wl,-soname,{name}", *script]
        subprocess.run(["cc", *options, str(ANSWERS), str(others)], check=True)
    return sorted(function for functions in needed.values() for function in functions)
