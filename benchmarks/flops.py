"""The arithmetic of a network, counted from the operations it runs, without running them.

The network and its input are on PyTorch's meta device, so a count takes no memory and no
arithmetic, at any image size. What is counted is what the Python code asks for, not what an
exporter or compiler makes of it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_CONVOLUTIONS = {aten.convolution, aten._convolution}
_ARITHMETIC = {
    aten.add, aten.add_, aten.sub, aten.sub_, aten.rsub, aten.mul, aten.mul_, aten.div, aten.div_,
}  # fmt: skip
_REDUCTIONS = {aten.sum, aten.mean}
_REAL_TRANSFORMS = {aten._fft_r2c, aten._fft_c2r}


@dataclass(frozen=True)
class Operations:
    """What one forward pass computes.

    Attributes:
        convolution: multiply-adds of convolutions; an addition and a multiplication
            together count as one, as the papers' tables count.
        matrix: multiply-adds of matrix products: attention, mixing of kernels.
        elementwise: one for each number that an addition, subtraction, multiplication or
            division of tensors gives, two where it is complex. Activations, normalisation,
            pooling windows and copies are counted nowhere.
        reduction: one for each number that a sum or an average of a tensor takes in.
        transform: floating-point operations of Fourier transforms, 5 N log₂ N for a complex
            one of N numbers, half of it for a real one.
    """

    convolution: int
    matrix: int
    elementwise: int
    reduction: int
    transform: int

    @property
    def multiply_adds(self) -> int:
        """Of convolutions and matrix products: what FLOP counters of the field count."""
        return self.convolution + self.matrix

    def __sub__(self, other: Operations) -> Operations:
        return Operations(
            self.convolution - other.convolution,
            self.matrix - other.matrix,
            self.elementwise - other.elementwise,
            self.reduction - other.reduction,
            self.transform - other.transform,
        )


def count_operations(network: nn.Module, shape: tuple[int, ...]) -> Operations:
    """Count a forward pass.

    Args:
        network: in eval mode; a copy of it goes to the meta device, if it is not there.
        shape: of the one float32 input.
    """
    if any(p.device.type != "meta" for p in network.parameters()):
        network = copy.deepcopy(network).to("meta")
    with torch.no_grad(), _Counter() as counter:
        network(torch.empty(shape, device="meta"))
    return Operations(**counter.counts)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = {field.name: 0 for field in fields(Operations)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in flop_registry:
            # PyTorch counts two per multiply-add.
            amount = flop_registry[packet](*args, **kwargs, out_val=out) // 2
            self.counts["convolution" if packet in _CONVOLUTIONS else "matrix"] += amount
        elif packet in _ARITHMETIC:
            self.counts["elementwise"] += _numbers(out)
        elif packet in _REDUCTIONS:
            self.counts["reduction"] += _numbers(args[0])
        elif packet in _REAL_TRANSFORMS or packet is aten._fft_c2c:
            self.counts["transform"] += _transform(packet, args[0], out, args[1])
        return out


def _numbers(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _transform(packet: Any, source: Tensor, out: Tensor, axes: list[int]) -> int:
    real = out if packet is aten._fft_c2r else source
    length = math.prod(real.shape[axis] for axis in axes)
    cost = 5.0 if packet is aten._fft_c2c else 2.5
    return round(cost * real.numel() * math.log2(length)) if length > 1 else 0
