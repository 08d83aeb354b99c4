"""The plugins' PTX, launched as TensorRT launches it: by the driver, with no Triton beside it.

A plugin gives TensorRT a kernel's name, its PTX, a grid, a block and bytes of shared memory.
Here the driver gets the same, through ``cuda.bindings.driver``, with the pointers in the order of
the plugin's inputs and output. That proves the order of parameters and that the driver reads the
instruction set, which else only TensorRT's first run would.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.kernels import LIMITS, Assembly, dtype_name
from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.ops.compile_kernels import CompiledKernel, compile_kernel, oldest_ptx
from fdconv_deploy.ops.frequency_band_modulation.launch import combination_launch
from fdconv_deploy.ops.launch import KernelLaunch


class Driver:
    """CUDA's driver interface in the context that PyTorch made.

    Args:
        driver: the module ``cuda.bindings.driver``.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *rest = getattr(self._driver, name)(*arguments)
        if int(status):
            raise RuntimeError(f"{name}: {status.name}")
        return rest[0] if rest else None

    def launch(
        self, kernel: CompiledKernel, grid: tuple[int, int, int], pointers: list[int]
    ) -> None:
        """Load a kernel's PTX, launch it and wait for it."""
        assert len(pointers) == len(kernel.parameters)
        source = ctypes.create_string_buffer(kernel.ptx.encode())
        module = self._call("cuModuleLoadData", ctypes.addressof(source))
        try:
            function = self._call("cuModuleGetFunction", module, kernel.name.encode())
            given = tuple(pointers), (ctypes.c_void_p,) * len(pointers)
            block = kernel.threads, 1, 1
            self._call("cuLaunchKernel", function, *grid, *block, kernel.shared, 0, given, 0)
            self._call("cuCtxSynchronize")
        finally:
            self._call("cuModuleUnload", module)


@dataclass(frozen=True)
class Step:
    """One plugin's kernel: what it is launched with and for how many images."""

    launch: KernelLaunch
    tensors: list[Tensor]
    batch: int = 1


def assembly_steps(assembly: Assembly, dtype: torch.dtype, weight: Tensor) -> list[Step]:
    """Both plugins of a layer: kernels in linear layout, into ``weight``."""
    half, batch = assembly.half, assembly.batch
    return [
        Step(assembly.rows(), [*assembly.rows_in, half], batch),
        Step(assembly.columns(dtype), [half, *assembly.columns_in, weight], batch),
    ]


def combination_step(device: str, dtype: torch.dtype) -> tuple[Step, Tensor]:
    """The band combination's plugin on made-up features, and what it shall answer, float64."""
    channels, side, terms, weighted = 64, 24, 4, 3
    random = torch.Generator().manual_seed(0)

    def made(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, kind)

    x, logits = made(1, channels, side, side), made(1, weighted, side, side)
    mix, shift = made(terms, weighted, kind=torch.float32), made(terms, kind=torch.float32)
    lows, y = made(terms - 1, 1, channels, side, side), torch.empty_like(x)
    factors = torch.einsum("tw,bwij->tbij", mix.double(), logits.double().sigmoid())
    every = torch.cat([x[None], lows]).double()
    expected = (every * (factors + shift.double().reshape(-1, 1, 1, 1))[:, :, None]).sum(0)
    launch = combination_launch(
        channels=channels, pixels=side**2, groups=1, weighted=weighted, terms=terms, sigmoid=True,
        dtype=dtype_name(dtype),
    )  # fmt: skip
    return Step(launch, [x, logits, mix, shift, lows, y]), expected


def run_steps(
    what: str, steps: list[Step], dtype: torch.dtype, capability: int, driver: Any
) -> dict[str, Any]:
    """Compile plugins and launch them one after another."""
    compiled = [compile_kernel(s.launch, capability, oldest_ptx(capability)) for s in steps]
    device = Driver(driver)
    for kernel, step in zip(compiled, steps, strict=True):
        pointers = [tensor.data_ptr() for tensor in step.tensors]
        device.launch(kernel, step.launch.grid(step.batch), pointers)
    return {
        "layer": what,
        "dtype": dtype_name(dtype),
        "ptx": compiled[0].ptx_version,
        "target": f"sm_{capability}",
        "kernels": [
            {"name": k.name, "threads": k.threads, "shared": k.shared, "inputs": len(k.parameters)}
            for k in compiled
        ],
        "limit": LIMITS[dtype],
    }


Layers = dict[str, tuple[FDConv2d, FoldedConv]]


def _cases(layers: Layers) -> list[tuple[str, torch.dtype]]:
    """Every layer in float16, the last in float32 as well."""
    return [(what, torch.float16) for what in layers] + [(list(layers)[-1], torch.float32)]


def plugin_launches(layers: Layers) -> list[KernelLaunch]:
    """Of everything that `measure_own_ptx` launches."""
    found = [combination_step("cpu", dtype)[0].launch for dtype in LIMITS]
    for what, dtype in _cases(layers):
        assembly = Assembly(*layers[what], 1, "cpu")
        found += [assembly.rows(), assembly.columns(dtype)]
    return found


def measure_own_ptx(record: Any, layers: Layers, capability: int, driver: Any) -> None:
    """Into ``record``; needs a GPU."""

    def layer(what: str, dtype: torch.dtype) -> dict[str, Any]:
        assembly = Assembly(*layers[what], 1, "cuda")
        weight = assembly.weight(dtype)
        torch.cuda.synchronize()
        steps = assembly_steps(assembly, dtype, weight)
        row = run_steps(what, steps, dtype, capability, driver)
        return row | {"error": assembly.error(weight)}

    def bands(dtype: torch.dtype) -> dict[str, Any]:
        step, expected = combination_step("cuda", dtype)
        torch.cuda.synchronize()
        row = run_steps("bands", [step], dtype, capability, driver)
        error = (step.tensors[-1].double() - expected).abs().max() / expected.abs().max()
        return row | {"error": float(error)}

    for what, dtype in _cases(layers):
        run = partial(record.add, "own_ptx", partial(layer, what, dtype))
        record.attempt(f"the plugins' PTX of {what}, {dtype_name(dtype)}", run)
    for dtype in LIMITS:
        run = partial(record.add, "own_ptx", partial(bands, dtype))
        record.attempt(f"the plugins' PTX of bands, {dtype_name(dtype)}", run)
