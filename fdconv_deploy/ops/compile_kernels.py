"""GPU kernels to PTX and machine code, on a machine that may have no GPU.

Triton, and the ptxas in its wheel, are all this takes; no torch. It must not be interpreting
(``TRITON_INTERPRET``), for then its functions are Python.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fdconv_deploy.environment import install
from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.launch import OPTIONS, THREADS_PER_WARP, KernelLaunch, interpreting

# Turing, Ampere (data centre and consumer), Ada, Hopper, Blackwell (both).
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
MODULES = (
    "fdconv_deploy.ops.frequency_assembly.kernel_rows",
    "fdconv_deploy.ops.frequency_assembly.kernels",
    "fdconv_deploy.ops.frequency_band_modulation.kernel",
)
# Scratch pointers that Triton's own launcher passes after a kernel's arguments.
HIDDEN_PARAMETERS = 2


@dataclass(frozen=True)
class Resources:
    """What ptxas says a kernel takes: registers a thread, spilled bytes, stack bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int


@dataclass(frozen=True)
class CompiledKernel:
    """PTX for one compute capability.

    name: of the entry; parameters: types of its parameters, e.g. ``u64``, the hidden ones
    removed; threads: per program; shared: bytes of dynamic shared memory.
    """

    name: str
    capability: int
    ptx: str
    parameters: tuple[str, ...]
    threads: int
    shared: int

    @property
    def ptx_version(self) -> str:
        """Of the instruction set, e.g. ``8.7``: what a driver must be able to read."""
        match = re.search(r"^\.version\s+(\S+)", self.ptx, re.MULTILINE)
        assert match is not None
        return match.group(1)

    def resources(self) -> Resources:
        """Assemble it for real and read ptxas' report."""
        return _assembled(self.ptx, self.capability)


def _triton() -> Any:
    try:
        import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        raise BackendError(
            "compiling GPU kernels needs Triton, which is not installed. "
            f"Install it ({install('triton')})."
        ) from None
    if interpreting():
        raise BackendError(
            "Triton interprets kernels here (TRITON_INTERPRET=1) and cannot compile them. "
            "Unset the variable in a new process."
        )
    return triton


def kernel_function(name: str) -> Any:
    """The Triton function of a `KernelLaunch`."""
    for module in MODULES:
        function = getattr(importlib.import_module(module), name, None)
        if function is not None:
            return function
    raise KeyError(name)


def compile_kernel(
    launch: KernelLaunch, capability: int, ptx_version: int | None = None
) -> CompiledKernel:
    """Compile one specialisation.

    Args:
        launch: its pointers are taken to be aligned to 16 bytes, as every allocation is.
        capability: compute capability, e.g. 90 for sm_90.
        ptx_version: of the instruction set, e.g. 80 for 8.0, so that older drivers can read
            it; by default the newest that Triton's ptxas knows.

    Raises:
        BackendError: no Triton, Triton interprets, or a kernel would need scratch memory.
    """
    triton = _triton()
    from triton.backends.compiler import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
        GPUTarget,
    )
    from triton.compiler import ASTSource  # type: ignore[import-untyped,import-not-found,unused-ignore]

    function = kernel_function(launch.kernel)
    places = {name: (i,) for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        signature={n: dict(launch.arguments).get(n, "constexpr") for n in function.arg_names},
        constexprs={places[name]: value for name, value in launch.constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name, _ in launch.arguments},
    )
    options: dict[str, Any] = {"num_warps": launch.warps} | OPTIONS
    if ptx_version is not None:
        options["ptx_version"] = ptx_version
    target = GPUTarget("cuda", capability, THREADS_PER_WARP)
    compiled = triton.compile(source, target=target, options=options)
    metadata = compiled.metadata
    if metadata.global_scratch_size or getattr(metadata, "profile_scratch_size", 0):
        raise BackendError(
            f"{launch.kernel} for sm_{capability} would need scratch memory, which TensorRT does "
            "not pass. Use another version of Triton."
        )
    ptx, parameters = without_hidden_parameters(compiled.asm["ptx"], metadata.name)
    assert len(parameters) == len(launch.arguments), (launch.kernel, parameters)
    # Triton may have added warps of its own; what it asks to be launched with counts.
    threads = _required_threads(ptx)
    return CompiledKernel(metadata.name, capability, ptx, parameters, threads, metadata.shared)


def _required_threads(ptx: str) -> int:
    match = re.search(r"\.reqntid\s+(\d+)", ptx)
    assert match is not None
    return int(match.group(1))


def without_hidden_parameters(ptx: str, name: str) -> tuple[str, tuple[str, ...]]:
    """Strip the scratch pointers that only Triton's launcher passes.

    Returns:
        The PTX, and the types of the parameters that are left.
    """
    head = re.search(rf"\.entry {re.escape(name)}\((.*?)\)", ptx, re.DOTALL)
    assert head is not None
    parameters = [p.strip() for p in head.group(1).split(",")]
    kept, hidden = parameters[:-HIDDEN_PARAMETERS], parameters[-HIDDEN_PARAMETERS:]
    rest = ptx[head.end() :]
    for parameter in hidden:
        symbol = parameter.split()[-1]
        if re.search(rf"\b{re.escape(symbol)}\b", rest):
            raise BackendError(
                f"{name} reads its scratch pointer {symbol}, which TensorRT does not pass. "
                "Use another version of Triton."
            )
    start, stop = head.span(1)
    types = []
    for parameter in kept:
        match = re.match(r"\.param\s+\.(\w+)", parameter)
        assert match is not None
        types.append(match.group(1))
    return ptx[:start] + "\n\t" + ",\n\t".join(kept) + "\n" + ptx[stop:], tuple(types)


@lru_cache(maxsize=1)
def _assemblers() -> list[Path]:
    """The versions of ptxas in Triton's wheel, oldest first."""
    from triton import backends  # type: ignore[import-untyped,import-not-found,unused-ignore]

    folder = Path(next(iter(backends.__path__))) / "nvidia" / "bin"
    return [p for name in ("ptxas", "ptxas-blackwell") if (p := folder / name).is_file()]


def _assembled(ptx: str, capability: int) -> Resources:
    architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        options = ["-v", f"--gpu-name={architecture}", str(source)]
        options += ["-o", str(Path(folder) / "kernel.cubin")]
        for assembler in _assemblers():
            result = subprocess.run(  # noqa: S603
                [str(assembler), *options], capture_output=True, text=True, check=False
            )
            # Only the newest knows the newest GPUs and instruction sets.
            if result.returncode == 0:
                break
        else:
            reason = result.stderr.strip()
            raise BackendError(f"ptxas refuses a kernel for {architecture}: {reason}")
    report = result.stderr

    def number(pattern: str) -> int:
        match = re.search(pattern, report)
        assert match is not None, report
        return int(match.group(1))

    return Resources(
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
    )
