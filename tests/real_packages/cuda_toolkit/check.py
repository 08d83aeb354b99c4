"""The project's PTX in the newest ptxas; its use of cuda-bindings and pynvml against the real ones.

    python -m tests.real_packages.cuda_toolkit.check SITE_PACKAGES [--capability 90 …]

README.md says what has to be installed there. Needs no GPU; with one, the bindings' error is not
looked at.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

from benchmarks.gpu.resources import resources
from benchmarks.gpu.shapes import RESNET50, layer_sizes
from fdconv_deploy.errors import BackendError
from fdconv_deploy.latency.machine import THROTTLES
from fdconv_deploy.ops.compile_kernels import CAPABILITIES, compile_kernel, oldest_ptx
from fdconv_deploy.ops.frequency_assembly.launch import column_launch, row_launch
from fdconv_deploy.ops.frequency_band_modulation.launch import combination_launch
from fdconv_deploy.ops.launch import KernelLaunch
from fdconv_deploy.runtime.backends import tensorrt


def plugin_launches() -> list[KernelLaunch]:
    """Of every distinct plugin kernel in a ResNet-50's engine, in both precisions."""
    found: list[KernelLaunch] = []
    for shape in RESNET50:
        sizes = layer_sizes(shape.out_channels, shape.in_channels, shape.kernel)
        made = [row_launch(sizes), column_launch(sizes), column_launch(sizes, dtype="float16")]
        if shape.kernel == 3:
            made += [
                combination_launch(
                    channels=shape.in_channels, pixels=shape.feature**2, groups=1, weighted=3,
                    terms=4, sigmoid=True, dtype=dtype,
                )
                for dtype in ("float32", "float16")
            ]  # fmt: skip
        found += [launch for launch in made if launch not in found]
    return found


def check_ptx(ptxas: Path, capabilities: list[int]) -> None:
    kernels = plugin_launches()
    for capability in capabilities:
        spilled = 0
        for launch in kernels:
            kernel = compile_kernel(launch, capability, oldest_ptx(capability))
            used = resources(kernel, ptxas)
            spilled += used.spill_stores + used.spill_loads > 0
        print(f"sm_{capability}: {len(kernels)} kernels assembled, {spilled} spill", flush=True)
        assert not spilled


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
