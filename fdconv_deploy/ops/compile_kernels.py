"""GPU kernels to PTX and machine code, on a machine that may have no GPU.

Triton, and the ptxas in its wheel, are all this takes; no torch. It must not be interpreting
(``TRITON_INTERPRET``), for then its functions are Python.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fdconv_deploy.environment import install
from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.launch import THREADS_PER_WARP, KernelLaunch, interpreting, kernel_function

# Turing, Ampere (data centre and consumer), Ada, Hopper, Blackwell (both).
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
_KNOWN = {*CAPABILITIES, 87, 103, 121}
# The least instruction set that knows an architecture: any driver that runs the GPU reads it.
_PTX_VERSIONS = {100: 86, 103: 88, 120: 87, 121: 88}
INTERPRET = "TRITON_INTERPRET"
# Scratch pointers that Triton's own launcher passes after a kernel's arguments.
HIDDEN_PARAMETERS = 2


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel's PTX for one compute capability.

    name: the entry's; parameters: the types of its parameters, e.g. ``u64``, without the hidden
    ones; threads: per program; shared: bytes of dynamic shared memory.
    """

    name: str
    capability: int
    ptx: str
    parameters: tuple[str, ...]
    threads: int
    shared: int

    @property
    def ptx_version(self) -> str:
        """Version of the PTX instruction set, e.g. ``8.7``, which the driver must know."""
        return _found(r"(?m)^\.version\s+(\S+)", self.ptx)


def compile_kernel(
    launch: KernelLaunch, capability: int, ptx_version: int | None = None
) -> CompiledKernel:
    """Compile one specialisation, for pointers aligned to 16 bytes, as every allocation is.

    Args:
        launch: the kernel.
        capability: compute capability, e.g. 90 for sm_90.
        ptx_version: of the instruction set, e.g. 80 for 8.0, so that older drivers can read
            it; by default the newest that Triton's ptxas knows.

    Raises:
        BackendError: no Triton, Triton interprets, or a kernel would need scratch memory.
    """
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
    function, pointers = kernel_function(launch.kernel), launch.arguments
    *names, constants = function.arg_names
    assert names == [name for name, _ in pointers], launch.kernel
    source = triton.compiler.ASTSource(
        function,
        signature={**dict(pointers), constants: "constexpr"},
        constexprs={(len(pointers),): launch.specialised()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )
    options: dict[str, Any] = launch.options()
    if ptx_version is not None:
        options["ptx_version"] = ptx_version
    target = triton.backends.compiler.GPUTarget("cuda", capability, THREADS_PER_WARP)
    with triton.knobs.compilation.scope():
        # Else PTX names the files it comes from, on the machine that it was made on.
        triton.knobs.compilation.disable_line_info = True
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
    threads = int(_found(r"\.reqntid\s+(\d+)", ptx))
    return CompiledKernel(metadata.name, capability, ptx, parameters, threads, metadata.shared)


def target_for(capability: int) -> int:
    """What to compile for, so that a GPU of this compute capability runs it.

    Its own, where Triton's compiler knows it; asked for another, it ends the process. Then 8.0,
    whose PTX the driver of any later GPU translates.

    Raises:
        BackendError: it is older than the oldest that the kernels are compiled for.
    """
    if capability < CAPABILITIES[0]:
        raise BackendError(
            f"this GPU is of compute capability {capability / 10}; this package's kernels need "
            f"{CAPABILITIES[0] / 10} (Turing) or later. Backend 'onnxruntime-cpu' runs bundles."
        )
    return capability if capability in _KNOWN else 80


def oldest_ptx(capability: int) -> int:
    """The least instruction set that knows a compute capability, e.g. 80 for 8.0."""
    return _PTX_VERSIONS.get(capability, 80)


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.DOTALL)
    assert match is not None, pattern
    return match.group(1)


def without_hidden_parameters(ptx: str, name: str) -> tuple[str, tuple[str, ...]]:
    """PTX without the scratch pointers that only Triton's launcher passes, and its parameters."""
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
    types = tuple(_found(r"^\.param\s+\.(\w+)", parameter) for parameter in kept)
    return ptx[:start] + "\n\t" + ",\n\t".join(kept) + "\n" + ptx[stop:], types


def precompile(
    launches: Iterable[KernelLaunch],
    capability: int,
    done: Callable[[int, int], None] = lambda _done, _of: None,
    *,
    ptx_version: int | None = None,
    workers: int | None = None,
) -> None:
    """Compile kernels in several processes at once, for Triton's cache to hold.

    A kernel takes seconds. Who compiles it later, by `compile_kernel` with the same arguments or,
    under ``TRITON_DISABLE_LINE_INFO=1``, by launching it, finds it there.

    Args:
        launches: may repeat themselves.
        capability, ptx_version: as for `compile_kernel`.
        done: called with the number of kernels compiled so far and of all.
        workers: processes; one a core, at most 8, if not given.

    Raises:
        BackendError: as `compile_kernel`.
    """
    distinct = list(dict.fromkeys(launches))
    if workers is None:
        from fdconv_deploy.runtime.backends.threads import available_cores

        workers = min(8, available_cores())
    workers = min(len(distinct), workers)
    # Processes of their own kind, not multiprocessing's: those run the caller's script again,
    # whose main need not be guarded.
    environment = {k: v for k, v in os.environ.items() if k != INTERPRET}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    running = []
    for first in range(workers):
        process = subprocess.Popen(  # noqa: S603 - this module, in this interpreter
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((distinct[first::workers], capability, ptx_version)))
        process.stdin.close()
        running.append(process)
    count = 0
    try:
        for process in running:
            assert process.stdout is not None
            said = b""
            for line in process.stdout:
                said = line.strip() or said
                if line == DONE:
                    count += 1
                    done(count, len(distinct))
            if process.wait():
                raise BackendError(f"a kernel was not compiled: {said.decode(errors='replace')}")
    finally:
        for process in running:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


DONE = b"compiled\n"


def _worker() -> None:
    launches, capability, ptx_version = pickle.load(sys.stdin.buffer)  # noqa: S301 - of `precompile`
    for launch in launches:
        compile_kernel(launch, capability, ptx_version)
        sys.stdout.buffer.write(DONE)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _worker()
