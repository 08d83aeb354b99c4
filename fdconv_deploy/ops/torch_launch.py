"""Runs a kernel on torch tensors: on a GPU, or in Triton's interpreter for tests."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.launch import OPTIONS, KernelLaunch, interpreting


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


def launch(module: ModuleType, kernel: KernelLaunch, batch: int, *tensors: Any) -> None:
    """Run a kernel of ``module`` for ``batch`` images, on the current stream."""
    assert len(tensors) == len(kernel.arguments)
    function = getattr(module, kernel.kernel)
    function[kernel.grid(batch)](*tensors, **kernel.constants, num_warps=kernel.warps, **OPTIONS)
