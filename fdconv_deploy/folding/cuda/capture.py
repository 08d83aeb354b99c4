"""A network recorded once as a CUDA graph and replayed: no launch costs, no allocation."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fdconv_deploy.errors import BackendError
from fdconv_deploy.folding.cuda.network import FusedNetwork, require_cuda

WARM_UP = 3


class CapturedNetwork:
    """`FusedNetwork` at one batch size as a CUDA graph. Thread-safe: callers take turns.

    Args:
        network: on the GPU.
        example: one input, of the shape and batch size every call will have.

    Raises:
        BackendError: PyTorch sees no CUDA device.
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

        Returns:
            What the network returns, in tensors of the caller's own.
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
