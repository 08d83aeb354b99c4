"""GPU kernels as TensorRT plugins whose code goes into the engine, ahead of time.

TensorRT calls a plugin while it builds, for the shapes and types of its tensors and for PTX with
launch parameters; the engine then holds all of that, and runs without this package or Python.
A plugin is one kernel; what it computes also stands in the graph as a function of standard
operators, which TensorRT takes where the plugin is not registered.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fdconv_deploy.environment import install
from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.compile_kernels import CompiledKernel, compile_kernel, oldest_ptx
from fdconv_deploy.ops.launch import KernelLaunch, Plugin, Sizes

NAMESPACE = "fdconv"
# TensorRT's types by numpy's names, as TensorRT's plugin layer writes them.
TYPE_NAMES = {"float32": "FP32", "float16": "FP16", "int32": "INT32"}

# TensorRT's layouts with channels last, by numpy's names of types.
LAYOUTS_LAST = {"float32": "HWC", "float16": "HWC8"}

_capability: int | None = None


def set_target(capability: int) -> None:
    """Choose the compute capability that plugins compile for from now on, e.g. 90 for sm_90."""
    global _capability
    _capability = capability


def kernel_ptx(launch: KernelLaunch) -> CompiledKernel:
    """The kernel for the chosen target; each specialisation is compiled once."""
    if _capability is None:
        raise BackendError("no compute capability was chosen for the plugins; call set_target.")
    return _compiled(launch, _capability)


@lru_cache(maxsize=512)
def _compiled(launch: KernelLaunch, capability: int) -> CompiledKernel:
    return compile_kernel(launch, capability, oldest_ptx(capability))


def _define(trt: Any, trtp: Any, name: str, plugin: Plugin) -> None:
    """Register a plugin under its operator's name."""
    identity = f"{NAMESPACE}::{name}"
    desc: Any = trtp.TensorDesc
    outputs: Any = tuple[trtp.TensorDesc]
    given = dict.fromkeys(plugin.inputs, desc) | {"sizes": Sizes}
    place = len(plugin.inputs)

    # TensorRT reads parameters and types from the functions' signatures.
    def signed(returned: Any, **more: Any) -> Callable[[Any], Any]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(n, kind, annotation=a) for n, a in (given | more).items()]

        def sign(function: Any) -> Any:
            function.__signature__ = inspect.Signature(parameters, return_annotation=returned)
            return function

        return sign

    @trtp.register(identity)
    @signed(desc)
    def describe(*_descs: Any, sizes: Sizes) -> Any:
        kind = trt.float16 if plugin.kinds[-1] == "float16" else trt.float32
        return trtp.from_shape_expr(plugin.shape(sizes), kind)

    @trtp.autotune(identity)
    @signed(list[trtp.AutoTuneCombination], outputs=outputs)
    def types(*arguments: Any) -> list[Any]:
        kinds = ", ".join(TYPE_NAMES[kind] for kind in plugin.kinds)
        layouts = ["LINEAR"]
        if plugin.channels_last(arguments[place]) is not None:
            # A convolution that wants its kernel so is spared a copy of it.
            last = LAYOUTS_LAST[plugin.kinds[-1]]
            layouts.append(", ".join(["LINEAR"] * place + [last]))
        return [trtp.AutoTuneCombination(kinds, layout) for layout in layouts]

    answer = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]

    @trtp.aot_impl(identity)
    @signed(answer, outputs=outputs, tactic=int)
    def kernel(*arguments: Any) -> Any:
        sizes, (output, *_) = arguments[place], arguments[place + 1]
        last = None
        if output.format != trt.TensorFormat.LINEAR:
            last = plugin.channels_last(sizes)
            assert last is not None, f"{name} was never offered as {output.format}"
        return _implementation(trtp, last or plugin.launch(sizes), int(sizes[-1]))


def _implementation(trtp: Any, launch: KernelLaunch, batch: int) -> tuple[str, str, Any, Any]:
    """Entry name, PTX, launch parameters, extra arguments (none: kernels take pointers only)."""
    kernel = kernel_ptx(launch)
    x, y, z = launch.grid(batch)
    parameters = trtp.KernelLaunchParams(
        grid_x=x, grid_y=y, grid_z=z, block_x=kernel.threads, shared_mem=kernel.shared
    )
    return kernel.name, kernel.ptx, parameters, trtp.SymIntExprs(0)


def plugin_module(trt: Any) -> tuple[Any, str | None]:
    """TensorRT's module of ahead-of-time plugins, or None and why they cannot be built here."""
    if importlib.util.find_spec("triton") is None:
        return None, f"Triton is not installed ({install('triton')})"
    try:
        trtp = importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError:
        return None, f"TensorRT {trt.__version__} has no plugin module"
    if not hasattr(trtp, "aot_impl"):
        return None, (
            f"TensorRT {trt.__version__} has no ahead-of-time plugins; they came with 10.9, and "
            "this package is written for 11: update TensorRT"
        )
    return trtp, None


def plugin_of(name: str) -> Plugin | None:
    """The plugin of an operator, in whatever form; None if there is none."""
    from fdconv_deploy.ops.frequency_assembly import plugin as assembly
    from fdconv_deploy.ops.frequency_band_modulation import plugin as bands

    maker = {**assembly.PLUGINS, **bands.PLUGINS}.get(name.partition("_")[0])
    return None if maker is None else maker(name)


def launch_of(name: str, sizes: Sequence[int]) -> KernelLaunch:
    """The kernel that a node of an operator stands for; ``sizes`` is the node's attribute."""
    plugin = plugin_of(name)
    if plugin is None:
        raise KeyError(name)
    return plugin.launch(np.array(sizes, np.int32))


_registered: set[str] = set()


def register_plugins(trt: Any, trtp: Any, names: Iterable[str]) -> list[str]:
    """Register a plugin for each operator ``names`` that is one of ours, and list those.

    Args:
        trt, trtp: the modules ``tensorrt`` and ``tensorrt.plugin``.
        names: operators of the ``fdconv`` domain in a graph.
    """
    done = []
    for name in sorted(set(names)):
        plugin = plugin_of(name)
        if plugin is None:
            continue
        if name not in _registered:
            _define(trt, trtp, name, plugin)
            _registered.add(name)
        done.append(name)
    return done
