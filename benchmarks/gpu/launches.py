"""Every kernel that a network launches on a GPU, counted without one.

    python -m benchmarks.gpu.launches              # a ResNet-50 with FDConv and a plain one

The network runs on PyTorch's fake tensors, which have shapes and a device and no numbers. Each
operator that does work is one kernel, two for a convolution with a bias (PyTorch's cuDNN adds it
afterwards); views are none. Triton kernels are noted where they would be started.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdconv_deploy.folding.cuda.layer import Fork
from fdconv_deploy.ops import launch as kernel_launch
from fdconv_deploy.ops.launch import KernelLaunch

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
# They take memory and leave it as it is.
ALLOCATIONS = {
    aten.empty,
    aten.empty_like,
    aten.new_empty,
    aten.empty_strided,
    aten.new_empty_strided,
}


@dataclass(frozen=True)
class Launched:
    """One kernel.

    operator: PyTorch's, or the Triton kernel's name. read, written: bytes of its tensors. product:
    of a product or convolution (matrices, rows, columns, inner length). launch, batch: of a Triton
    kernel. beside: whether it runs on a stream beside those that come after it, until a
    convolution or product joins them.
    """

    operator: str
    read: int
    written: int
    product: tuple[int, int, int, int] | None = None
    launch: KernelLaunch | None = None
    batch: int = 1
    beside: bool = field(default_factory=lambda: Fork.active)


def launches(network: nn.Module, x: Tensor) -> list[Launched]:
    """The kernels of one call, in order.

    Args:
        network: on the CPU; its tensors are not changed.
        x: its input; only its shape and type count.
    """
    noted: list[Launched] = []
    with FakeTensorMode() as mode, torch.no_grad():
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        state: dict[str, Tensor] = {
            name: mode.from_tensor(tensor) for name, tensor in tensors.items()
        }
        with without_gpu(), noting_kernels(partial(_note, noted)), _Noting(noted):
            functional_call(network, state, (mode.from_tensor(x),))
    return noted


def count_launches(network: nn.Module, x: Tensor) -> Counter[str]:
    """Kernels of one call by operator, see `launches`."""
    return Counter(one.operator for one in launches(network, x))


def _bytes(values: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))


def _note(noted: list[Launched], launch: KernelLaunch, *tensors: Tensor | None) -> None:
    *inputs, output = tensors
    assert inputs[0] is not None
    batch = len(inputs[0])
    read = _bytes(list({id(tensor): tensor for tensor in inputs}.values()))
    read += _read_again(launch, batch)
    one = Launched(launch.kernel, read, _bytes(output), launch=launch, batch=batch)
    noted.append(one)


@contextmanager
def noting_kernels(note: Callable[..., None]) -> Iterator[None]:
    """Let ``note`` be called with what `run_kernel` is asked for, and nothing be run."""
    run = kernel_launch.run_kernel
    modules = [m for m in list(sys.modules.values()) if getattr(m, "run_kernel", None) is run]
    for module in modules:
        module.run_kernel = note  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.run_kernel = run  # type: ignore[attr-defined]


def _read_again(launch: KernelLaunch, batch: int) -> int:
    """Bytes of attentions that every program of the assembly's first kernel reads for itself."""
    if launch.kernel != "attend_rows_kernel":
        return 0
    known: Any = launch.constants
    each = known["units"] * (known["splits"] * known["blocks"] + known["kernel"])
    return 4 * each * (math.prod(launch.grid(batch)) - batch)


class _Noting(TorchDispatchMode):
    def __init__(self, noted: list[Launched]) -> None:
        super().__init__()
        self._noted = noted

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fdconv":
            with self:
                return OPDEFS[func.name().split(".")[0]]._init_fn(*args, **kwargs)
        answer = func(*args, **kwargs)
        packet = func.overloadpacket
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if packet in ALLOCATIONS or func.namespace == "prim":
            return answer
        outputs = [t for t in tree_leaves(answer) if isinstance(t, Tensor) and t.numel()]
        storages = {t.untyped_storage()._cdata for t in given}
        if not func._schema.is_mutable and all(
            t.untyped_storage()._cdata in storages for t in outputs
        ):
            return answer  # a view
        name = str(packet).removeprefix("aten.")
        product = None
        if packet is aten.convolution:
            weight, groups = args[1], args[-1]
            pixels = outputs[0].numel() // outputs[0].shape[1]
            inner = math.prod(weight.shape[1:])
            product = groups, pixels, weight.shape[0] // groups, inner
            if args[2] is not None:
                self._noted.append(Launched("bias", _bytes(outputs), _bytes(outputs)))
        elif packet in PRODUCTS:
            *_, left, right = (t for t in given if t.ndim >= 2)
            many = left.shape[0] if left.ndim == 3 else 1
            product = many, left.shape[-2], right.shape[-1], left.shape[-1]
        self._noted.append(Launched(name, _bytes(given), _bytes(outputs), product))
        return answer


@contextmanager
def without_gpu() -> Iterator[None]:
    """Let fused networks be made and called on the CPU, where their kernels are not run."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def resnet50(kernel_num: int | None, batch: int = 1, size: int = 512) -> list[Launched]:
    """Kernels of the fused half-precision ResNet-50; of the plain one where ``kernel_num=None``."""
    from benchmarks.gpu.networks import LastFeature
    from benchmarks.networks import backbone
    from fdconv_deploy.folding.cuda import fuse_network
    from fdconv_deploy.nn import ResNet

    torch.manual_seed(0)
    network = LastFeature(ResNet(backbone(50, kernel_num))).eval()
    x = torch.zeros(batch, 3, size, size)
    with without_gpu():
        fused = fuse_network(network, x, dtype=torch.float16, channels_last=True)
    return launches(fused, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    for kernel_num in (None, 64):
        found = resnet50(kernel_num, options.batch, options.size)
        print(f"\n{'plain' if kernel_num is None else 'FDConv'}: {len(found)} kernels")
        for name, count in Counter(one.operator for one in found).most_common():
            print(f"  {count:5} {name}")


if __name__ == "__main__":
    main()
