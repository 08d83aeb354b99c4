"""The project's PTX in the newest ptxas; its use of cuda-bindings and pynvml against the real ones.

    python -m tests.real_packages.cuda_toolkit.check SITE_PACKAGES [--capability 90 …]

README.md says what has to be installed there. Needs no GPU; with one, the bindings' error is not
looked at.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton

from benchmarks.gpu.resources import resources
from benchmarks.gpu.tensorrt_kernels import RECORD as PLUGINS
from benchmarks.gpu.tensorrt_kernels import TARGETS as RECORD
from benchmarks.records import write_json
from fdconv_deploy.errors import BackendError
from fdconv_deploy.latency.machine import THROTTLES
from fdconv_deploy.ops.compile_kernels import CAPABILITIES, compile_kernel, oldest_ptx
from fdconv_deploy.ops.launch import KernelLaunch
from fdconv_deploy.ops.tensorrt_plugins import plugin_of
from fdconv_deploy.runtime.backends import tensorrt


def plugin_launches() -> list[KernelLaunch]:
    """Every distinct kernel that `fdconv build` may write for a ResNet-50, in both precisions."""
    found: list[KernelLaunch] = []
    for node in json.loads(PLUGINS.read_text())["plugins"]:
        for name in (node["operator"], node["operator"].removesuffix("_Half")):
            plugin, sizes = plugin_of(name), np.array(node["sizes"], np.int32)
            assert plugin is not None
            # Both layouts: TensorRT takes what it measures as faster.
            made = plugin.launch(sizes), plugin.channels_last(sizes)
            found += [launch for launch in made if launch is not None and launch not in found]
    return found


def launches_mark() -> str:
    """Changes with what the kernels are specialised to and launched with."""
    return hashlib.sha256(repr(plugin_launches()).encode()).hexdigest()[:16]


def assembled(ptxas: Path, capability: int) -> dict[str, Any]:
    """What the kernels take of one GPU, by name: the record's row.

    Raises:
        BackendError: ptxas refuses one.
    """
    row: dict[str, Any] = {"ptx": "", "kernels": {}}
    for launch in plugin_launches():
        kernel = compile_kernel(launch, capability, oldest_ptx(capability))
        used = resources(kernel, ptxas)
        row["ptx"] = kernel.ptx_version
        of = row["kernels"].setdefault(
            launch.kernel, {"count": 0, "registers": [], "shared": 0, "spilled": 0}
        )
        of["count"] += 1
        seen = [*of["registers"], used.registers]
        of["registers"] = [min(seen), max(seen)]
        of["shared"] = max(of["shared"], kernel.shared)
        of["spilled"] += used.spill_stores + used.spill_loads
    return row


def check_ptx(ptxas: Path, capabilities: list[int]) -> None:
    """Assemble for each, and record it; the rows of others are left."""
    said = subprocess.check_output([str(ptxas), "--version"], text=True)
    (version,) = re.findall(r"release \S+ V(\S+)", said)
    for capability in capabilities:
        row = assembled(ptxas, capability)
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {"targets": {}}
        record |= {"ptxas": version, "triton": triton.__version__, "launches": launches_mark()}
        record["targets"][str(capability)] = row
        write_json(RECORD, record)
        print(f"sm_{capability}: {row}", flush=True)
        assert not any(of["spilled"] for of in row["kernels"].values())


def check_bindings() -> None:
    from cuda.bindings import runtime

    text = inspect.getsource(tensorrt)
    called = set(re.findall(r'"(cuda[A-Z]\w+)"', text)) | set(re.findall(r"rt\.(cuda\w+)", text))
    called -= {"cudaErrorMemoryAllocation"}  # an error's name
    lacking = sorted(name for name in called if not hasattr(runtime, name))
    assert not lacking, f"cuda-bindings has no {lacking}"
    assert hasattr(runtime.cudaError_t, "cudaErrorMemoryAllocation")
    for name in ("name", "major", "minor", "uuid"):
        assert hasattr(runtime.cudaDeviceProp(), name)
    status, *_ = runtime.cudaGetDeviceCount()
    said = "with a GPU"
    if int(status):
        try:
            tensorrt.Cuda()
        except BackendError as error:
            said = str(error).splitlines()[0]
            assert status.name in said
        else:
            raise AssertionError("a machine without a driver was taken for one with a GPU")
    print(f"cuda-bindings: {len(called)} functions and constants; {said}")


def check_management_library() -> None:
    import pynvml

    for bit, why in THROTTLES.items():
        names = [
            name for name in dir(pynvml)
            if name.startswith("nvmlClocksEventReason") and getattr(pynvml, name) == bit
        ]  # fmt: skip
        print(f"pynvml: {bit:#x} {why}: {', '.join(names)}")
        assert names
    assert hasattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons")
    assert hasattr(pynvml, "nvmlDeviceGetUUID")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path, help="folder where they are installed")
    parser.add_argument("--capability", type=int, nargs="*", default=list(CAPABILITIES))
    options = parser.parse_args()
    sys.path.append(str(options.packages))
    check_bindings()
    check_management_library()
    (ptxas,) = options.packages.glob("nvidia/cu*/bin/ptxas")
    check_ptx(ptxas, options.capability)


if __name__ == "__main__":
    main()
