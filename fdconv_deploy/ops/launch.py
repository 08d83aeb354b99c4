"""What a GPU kernel is launched with, in plain numbers: no Triton, no torch.

One description serves PyTorch's launches, the compilation to PTX and TensorRT's plugins.
Kernels take pointers only; everything else is a constant of the specialisation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
THREADS_PER_WARP = 32
# Of the compiler: products and sums may be fused.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel, specialised: its arguments, constants and grid.

    kernel: name of the Triton function. arguments: name and Triton type of each pointer, in order;
    the last is the output. constants: by name. blocks:
    the grid's second and third axes (its first is the batch). warps: per program. stages: of loads
    that a loop issues ahead.
    """

    kernel: str
    arguments: tuple[tuple[str, str], ...]
    constants: Mapping[str, int | bool | float | tuple[int, ...]]
    blocks: tuple[int, int]
    warps: int
    stages: int = 1

    def __hash__(self) -> int:
        return hash((self.kernel, self.arguments, self.blocks, self.warps, self.stages))

    def grid(self, batch: int) -> tuple[int, int, int]:
        """Programs along each axis."""
        return batch, *self.blocks

    @property
    def threads(self) -> int:
        """Threads per program."""
        return self.warps * THREADS_PER_WARP

    def early(self) -> KernelLaunch:
        """The same, started while the kernel before it in the stream ends: sm_90 and newer."""
        return replace(self, constants={**self.constants, "dependent": True})

    def options(self) -> dict[str, Any]:
        """Of the compiler."""
        early = {"launch_pdl": True} if self.constants["dependent"] else {}
        return OPTIONS | {"num_warps": self.warps, "num_stages": self.stages} | early

    def typed(self, **types: str) -> KernelLaunch:
        """The same with other argument types, e.g. ``weight="float16"``."""
        unknown = types.keys() - dict(self.arguments).keys()
        assert not unknown, f"{self.kernel} has no arguments {unknown}"
        arguments = tuple(
            (name, "*" + FLOAT_TYPES[types[name]] if name in types else kind)
            for name, kind in self.arguments
        )
        return replace(self, arguments=arguments)


def power_of_two(number: int) -> int:
    """The least power of two that is not less than ``number``."""
    return 1 << (max(number, 1) - 1).bit_length()


def warps_for(elements: int, most: int) -> int:
    """Warps that give each thread one of ``elements`` (a power of two), within 1 to ``most``."""
    return max(1, min(most, elements // THREADS_PER_WARP))


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def require_device(tensor: Tensor, what: str) -> None:
    """Raise unless kernels can run where ``tensor`` is.

    Raises:
        BackendError: it is not on a CUDA device, and Triton does not interpret.
    """
    if not tensor.is_cuda and not interpreting():
        raise BackendError(
            f"{what} runs on an NVIDIA GPU, and its input is on {tensor.device}. Move the network "
            "and its inputs to 'cuda', or use the folded network or ONNX Runtime on the CPU."
        )


_collected: list[KernelLaunch] | None = None


@contextmanager
def collected_launches() -> Iterator[list[KernelLaunch]]:
    """Within this context `run_kernel` lists the launches that it is asked for, and runs none."""
    global _collected
    found: list[KernelLaunch] = []
    _collected = found
    try:
        yield found
    finally:
        _collected = None


def run_kernel(module: ModuleType, launch: KernelLaunch, batch: int, *tensors: Any) -> None:
    """Run a Triton kernel of ``module`` for ``batch`` images on the current CUDA stream.

    From sm_90 on it starts while the kernel before it ends.
    """
    assert len(tensors) == len(launch.arguments)
    if _collected is not None:
        _collected.append(launch)
        return
    if not interpreting() and starts_early(*_capability(tensors[0].device.index)):
        launch = launch.early()
    function = getattr(module, launch.kernel)
    function[launch.grid(batch)](*tensors, **launch.constants, **launch.options())


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
