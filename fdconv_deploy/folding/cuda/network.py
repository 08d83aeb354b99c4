"""Any network with FDConv layers -> the same network on a GPU for one input shape."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fdconv_deploy.errors import BackendError, ExportError
from fdconv_deploy.folding.cuda.trace import trace_fused
from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.folding.network import fold_layers
from fdconv_deploy.ops.launch import interpreting


def require_cuda() -> None:
    """Raise BackendError where PyTorch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    build = torch.version.cuda
    found = "this PyTorch is built without CUDA" if build is None else "PyTorch sees no CUDA device"
    raise BackendError(
        f"the fused kernels need an NVIDIA GPU, and {found} ({torch.__version__}). Use "
        "fold_network for PyTorch on the CPU, or an exported bundle with ONNX Runtime."
    )


class FusedNetwork(nn.Module):
    """A network on the GPU whose FDConv layers are fused. See `fuse_network`."""

    def __init__(
        self, network: nn.Module, dtype: torch.dtype, channels_last: bool, shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.network, self.dtype, self.channels_last = network, dtype, channels_last
        self.shape = shape

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        """``x``: as the example the network was fused for, float32 or ``dtype``.

        Raises:
            BackendError: x is of another shape.
        """
        if tuple(x.shape) != self.shape:
            raise BackendError(
                f"the network was fused for inputs {self.shape}, got {tuple(x.shape)}. Fuse it "
                "again with an example of this shape."
            )
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        return self.network(x.to(self.dtype).contiguous(memory_format=memory))


def fuse_network(
    network: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    folded: Mapping[str, FoldedConv] | None = None,
) -> FusedNetwork:
    """A copy of ``network`` on the GPU, its layers fused for ``example``'s shape.

    FDConv layers become fused kernels. BatchNorm is folded into the convolution before it, dynamic
    or plain; its bias, a sum with a shortcut, ReLU and the next layer's pooling become its end.
    So a network without FDConv layers is its fair baseline, fused by the same means.

    Args:
        network: in eval mode, on the CPU; not changed.
        example: one input, e.g. ``(1, 3, H, W)`` float32; the network takes its shape alone.
        dtype: of weights and features: float32, float16 or bfloat16. Kernel assembly is
            float32 in any case. Outputs are of this type.
        channels_last: the memory format; the faster one with float16.
        folded: the layers, as `fold_layers` gives them for this example, where they are there.

    Raises:
        BackendError: PyTorch sees no CUDA device.
        ExportError: the network is in training mode, a layer has no one input size, or torch
            cannot trace the network.
    """
    if network.training:
        raise ExportError("the network is in training mode; call .eval() before fusing it.")
    if not interpreting():
        require_cuda()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if folded is None:
        folded = fold_layers(network, example)
    fused = trace_fused(network, example, folded, dtype, channels_last, device)
    return FusedNetwork(fused, dtype, channels_last, tuple(example.shape)).eval()


WARM_UP = 3


class CapturedNetwork:
    """`FusedNetwork` at one batch size as a CUDA graph. Thread-safe: callers take turns.

    example: one input, of the shape and batch size every call will have. ``BackendError`` where
    PyTorch sees no CUDA device.
    """

    def __init__(self, network: FusedNetwork, example: Tensor) -> None:
        require_cuda()
        self._network, self._lock = network, threading.Lock()
        self._input = example.to("cuda", network.dtype).clone()
        if network.channels_last:
            self._input = self._input.contiguous(memory_format=torch.channels_last)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(WARM_UP):  # compiles kernels and lets libraries choose theirs
                network(self._input)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.no_grad():
            self._output = network(self._input)

    def replay(self) -> Any:
        """Run on the input of the last call; the outputs are overwritten by the next run."""
        self._graph.replay()
        return self._output

    def __call__(self, x: Tensor) -> Any:
        """``x``: of the example's shape, on any device, float32 or the network's type.

        What the network returns is in tensors of the caller's own.
        """
        if x.shape != self._input.shape:
            raise BackendError(
                f"the network was captured for inputs {tuple(self._input.shape)}, got "
                f"{tuple(x.shape)}. Capture it again for this batch size."
            )
        with self._lock:
            self._input.copy_(x, non_blocking=True)
            self._graph.replay()
            return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self._output)
