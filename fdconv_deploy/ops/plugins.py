"""GPU kernels as TensorRT plugins whose code goes into the engine, ahead of time.

TensorRT calls a plugin while it builds, for the shapes and types of its tensors and for PTX with
launch parameters; the engine then holds all of that, and runs without this package or Python.
A plugin is one kernel; what it computes also stands in the graph as a function of standard
operators, which TensorRT takes where the plugin is not registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.compile import CompiledKernel, compile_kernel
from fdconv_deploy.ops.launch import KernelLaunch

NAMESPACE = "fdconv"
# TensorRT's types by numpy's names, as TensorRT's plugin layer writes them.
TYPE_NAMES = {"float32": "FP32", "float16": "FP16", "int32": "INT32"}
# The least instruction set that knows an architecture: any driver that runs the GPU reads it.
PTX_VERSIONS = {100: 86, 103: 88, 120: 87, 121: 88}
OLDEST_PTX = 80


@dataclass
class Target:
    """What plugins compile for. ``capability``: e.g. 90 for sm_90."""

    capability: int


_target: Target | None = None


def set_target(capability: int) -> None:
    """Choose the compute capability that plugins compile for from now on."""
    global _target
    _target = Target(capability)


def kernel_ptx(launch: KernelLaunch) -> CompiledKernel:
    """The kernel for the chosen target; each specialisation is compiled once.

    Raises:
        BackendError: no target was chosen, no Triton, or the kernel does not compile.
    """
    if _target is None:
        raise BackendError("no compute capability was chosen for the plugins; call set_target.")
    return _compiled(_Key(launch), _target.capability)


class _Key:
    """A launch as something to cache by: its constants are a dict."""

    def __init__(self, launch: KernelLaunch) -> None:
        self.launch = launch
        constants = tuple(sorted(launch.constants.items()))
        self._key = launch.kernel, launch.arguments, constants, launch.blocks, launch.warps

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._key == other._key


@lru_cache(maxsize=512)
def _compiled(key: _Key, capability: int) -> CompiledKernel:
    version = PTX_VERSIONS.get(capability, OLDEST_PTX)
    return compile_kernel(key.launch, capability, version)


def implement(plugin: Any, launch: KernelLaunch, batch: int) -> tuple[str, str, Any, Any]:
    """A plugin's answer to TensorRT: entry name, PTX, launch parameters, extra arguments.

    Args:
        plugin: the module ``tensorrt.plugin``.
        batch: images; the first axis of the grid.
    """
    kernel = kernel_ptx(launch)
    x, y, z = launch.grid(batch)
    parameters = plugin.KernelLaunchParams(
        grid_x=x,
        grid_y=y,
        grid_z=z,
        block_x=kernel.threads,
        shared_mem=kernel.shared,
    )
    # Kernels take pointers only.
    return kernel.name, kernel.ptx, parameters, plugin.SymIntExprs(0)


def type_name(trt: Any, kind: Any) -> str:
    """``float32``, ``float16`` or ``int32`` of a TensorRT type."""
    names = {trt.float32: "float32", trt.float16: "float16", trt.int32: "int32"}
    if kind not in names:
        raise BackendError(f"the plugins know float32, float16 and int32, not {kind}.")
    return names[kind]


def combination(plugin: Any, *kinds: str) -> list[Any]:
    """The one combination of types a plugin takes, in TensorRT's notation; all tensors linear."""
    return [plugin.AutoTuneCombination(", ".join(TYPE_NAMES[k] for k in kinds), "LINEAR")]


Registration = Callable[[Any, Any, str], None]
_registered: set[str] = set()


def register_plugins(trt: Any, plugin: Any, names: set[str]) -> list[str]:
    """Register a plugin for each operator ``names`` that is one of ours.

    Args:
        trt, plugin: the modules ``tensorrt`` and ``tensorrt.plugin``.
        names: operators of the ``fdconv`` domain in a graph.

    Returns:
        The names that have a plugin now.

    Raises:
        BackendError: this TensorRT has no ahead-of-time plugins.
    """
    from fdconv_deploy.ops.frequency_assembly import plugin as assembly
    from fdconv_deploy.ops.frequency_band_modulation import plugin as bands

    if not hasattr(plugin, "aot_impl"):
        raise BackendError(
            f"TensorRT {trt.__version__} has no ahead-of-time plugins; they came with 10.9, and "
            "this package is written for 11. Update TensorRT, or build with --plugins off."
        )
    makers: dict[str, Registration] = {**assembly.PLUGINS, **bands.PLUGINS}
    done = []
    for name in sorted(names):
        base = name.partition("_")[0]
        if base not in makers:
            continue
        if name not in _registered:
            makers[base](trt, plugin, name)
            _registered.add(name)
        done.append(name)
    return done
