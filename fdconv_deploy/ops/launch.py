"""What a GPU kernel is launched with, in plain numbers: no Triton, no torch.

One description serves PyTorch's launches, the compilation to PTX and TensorRT's plugins.
Kernels take pointers only; everything else is a constant of the specialisation.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor

# Triton's names of types by numpy's.
TYPES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "u8", "int32": "i32",
}  # fmt: skip
THREADS_PER_WARP = 32
MODULES = tuple(
    f"fdconv_deploy.ops.{operator}.kernels"
    for operator in ("attention", "frequency_assembly", "frequency_band_modulation")
)


class Constants(dict[str, Any]):
    """What a kernel is specialised to: its last argument, whose entries are its attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def constants_of(source: object, names: str) -> dict[str, Any]:
    """Attributes of ``source`` by name."""
    return {name: getattr(source, name) for name in names.split()}


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel, specialised: its arguments, constants and grid.

    kernel: name of the Triton function. arguments: name and Triton type of each pointer, in order;
    the last is the output. blocks: the grid's second and third axes (its first is the batch).
    warps: per program. stages: of loads that a loop issues ahead.
    """

    kernel: str
    arguments: tuple[tuple[str, str], ...]
    constants: Constants
    blocks: tuple[int, int]
    warps: int
    stages: int = 1

    def grid(self, batch: int) -> tuple[int, int, int]:
        """Programs along each axis."""
        return batch, *self.blocks

    @property
    def threads(self) -> int:
        """Threads per program."""
        return self.warps * THREADS_PER_WARP

    def early(self) -> KernelLaunch:
        """The same, started while the kernel before it in the stream ends: sm_90 and newer."""
        return replace(self, constants=Constants(self.constants, dependent=True))

    def specialised(self) -> Constants:
        """The kernel's last argument: plain where Triton interprets, else constants of its own."""
        if interpreting():
            return self.constants
        from triton.language import constexpr  # type: ignore[import-untyped,import-not-found,unused-ignore]

        return Constants({name: constexpr(value) for name, value in self.constants.items()})

    def options(self) -> dict[str, Any]:
        """Of the compiler, which may fuse products and sums."""
        early = {"launch_pdl": True} if self.constants.dependent else {}
        of = {"enable_fp_fusion": True, "num_warps": self.warps, "num_stages": self.stages}
        return of | early


def make_launch(
    kernel: str,
    pointers: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    blocks: tuple[int, int],
    warps: int,
    stages: int = 1,
) -> KernelLaunch:
    """A launch whose ``pointers`` are to float32 but for ``types``, by numpy's names."""
    arguments = tuple((n, "*" + TYPES[types.get(n, "float32")]) for n in pointers.split())
    known = Constants(constants, dependent=False)
    return KernelLaunch(kernel, arguments, known, blocks, warps, stages)


def power_of_two(number: int) -> int:
    """The least power of two that is not less than ``number``."""
    return 1 << (max(number, 1) - 1).bit_length()


def warps_for(elements: int, most: int) -> int:
    """Warps that give each thread one of ``elements`` (a power of two), within 1 to ``most``."""
    return max(1, min(most, elements // THREADS_PER_WARP))


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def run_kernel(launch: KernelLaunch, *tensors: Tensor | None) -> None:
    """Run a Triton kernel for the images of its first tensor, on the current CUDA stream.

    None is a pointer that the kernel never follows, and may point anywhere. From sm_90 on it starts
    while the kernel before it ends.

    Raises:
        BackendError: the tensors are not on a CUDA device, and Triton does not interpret.
    """
    pairs = [(kind, one) for (_, kind), one in zip(launch.arguments, tensors, strict=True)]
    of_kind = {kind: tensor for kind, tensor in pairs if tensor is not None}
    given = [of_kind[kind] if tensor is None else tensor for kind, tensor in pairs]
    early = False
    if not interpreting():
        if not given[0].is_cuda:
            raise BackendError(
                f"{launch.kernel} runs on an NVIDIA GPU, and its input is on {given[0].device}. "
                "Move the network and its inputs to 'cuda', or use the folded network or ONNX "
                "Runtime on the CPU."
            )
        early = starts_early(*_capability(given[0].device.index))
    function, constants, options = _started(launch, early, interpreting())
    function[launch.grid(len(given[0]))](*given, constants, **options)


# Networks launch the same few hundred over and over.
@lru_cache(maxsize=2048)
def _started(
    launch: KernelLaunch, early: bool, _interpreting: bool
) -> tuple[Any, Constants, dict[str, Any]]:
    """What a kernel is started by: its function, last argument and options."""
    launch = launch.early() if early else launch
    return kernel_function(launch.kernel), launch.specialised(), launch.options()


@lru_cache
def kernel_function(name: str) -> Any:
    """The Triton function of a `KernelLaunch`."""
    for module in MODULES:
        function = getattr(importlib.import_module(module), name, None)
        if function is not None:
            return function
    raise KeyError(name)


@lru_cache
def _capability(device: int) -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability(device)


def starts_early(major: int, minor: int = 0) -> bool:
    """Whether a GPU of this compute capability starts a kernel while the one before it ends.

    FDCONV_EARLY_START=0 in the environment: none does, for comparison.
    """
    return major >= 9 and os.environ.get("FDCONV_EARLY_START", "1") != "0"


# What a plugin's node says of its layer, in the order its operator names them.
Sizes = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Plugin:
    """A kernel as a plugin of one output.

    inputs: their names, in the kernel's order. kinds: numpy's names of the inputs' types and then
    the output's. shape, launch: the output's shape and the kernel's launch for a node's ``sizes``.
    channels_last: the launch that writes the output with its channels last, where there is one
    (then float16 outputs have a multiple of eight channels).
    """

    inputs: tuple[str, ...]
    kinds: tuple[str, ...]
    shape: Callable[[Sizes], tuple[int, ...]]
    launch: Callable[[Sizes], KernelLaunch]
    channels_last: Callable[[Sizes], KernelLaunch | None] = lambda _sizes: None
