"""Plugins through the plugin layer of NVIDIA's own Python bindings, without a GPU.

    LD_LIBRARY_PATH=<stub libraries> python -m tests.ops.tensorrt_stub REQUESTS.json [--real N]

A request is a node that asks for a plugin: operator, ``sizes``, shapes and types of its inputs.
This does what TensorRT's builder does with each: creates it by its field
collection, asks for output types and shapes, supported formats, launch parameters and code. The
bindings are real (``tensorrt-cu13-bindings``); the libraries under them are a stub whose registry
holds nothing, so expressions are plain numbers. Kernels are compiled to PTX for the first N
distinct launches, and stood in for by their launch plans for the rest. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt_bindings

sys.modules["tensorrt"] = tensorrt_bindings  # as the metapackage's module stands for it
import tensorrt as trt  # noqa: E402
import tensorrt.plugin as trtp  # noqa: E402
from tensorrt.plugin import _lib, _tensor  # noqa: E402

from fdconv_deploy.ops import tensorrt_plugins as plugins  # noqa: E402
from fdconv_deploy.ops.compile_kernels import CompiledKernel, compile_kernel  # noqa: E402

asked: list[Any] = []  # launches, in order
KINDS = {1: trt.float32, 10: trt.float16, 6: trt.int32}


class Number:
    """A dimension expression that is a constant."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value

    def is_size_tensor(self) -> bool:
        return False


class Builder:
    def constant(self, value: int) -> Number:
        return Number(value)

    def operation(self, kind: Any, left: Number, right: Number) -> Number:
        assert kind == trt.DimensionOperation.SUM  # a clone adds zero
        return Number(left.value + right.value)


class Setter:
    nbSymExprs = 0


def tensor_descs(shapes: list[tuple[int, ...]], kinds: list[Any]) -> list[Any]:
    result = []
    for shape, kind in zip(shapes, kinds, strict=True):
        desc = trt.DynamicPluginTensorDesc()
        desc.desc.dims, desc.min, desc.max, desc.opt = shape, shape, shape, shape
        desc.desc.type, desc.desc.format = kind, trt.TensorFormat.LINEAR
        result.append(desc)
    return result


def exercise(
    op: str, given: list[int], shapes: list[Any], kinds: list[Any], last: bool
) -> dict[str, Any]:
    """What the builder would learn about one node; ``last``: it takes the second layout offered."""
    sizes = np.array(given, np.int32)
    creator = _lib._TemplatePluginCreator(op, "fdconv", {"sizes": (False, np.int32)})
    fields = trt.PluginFieldCollection([trt.PluginField("sizes", sizes, trt.PluginFieldType.INT32)])
    plugin = creator.create_plugin(
        op, "fdconv", fields, trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )  # fmt: skip
    count = len(shapes)
    ranks = [len(s) for s in shapes]
    types = plugin.get_output_data_types(kinds, ranks)
    expressions = [[Number(n) for n in shape] for shape in shapes]
    outputs = plugin.get_output_shapes(expressions, [], Builder())
    shape = [[n.value for n in output] for output in outputs]
    descs = tensor_descs([*shapes, *map(tuple, shape)], [*kinds, *types])
    formats = plugin.get_supported_format_combinations(descs, count)
    every = count + len(types)
    layouts = [
        [str(f.format) for f in formats[at : at + every]] for at in range(0, len(formats), every)
    ]
    if last:
        descs[-1].desc.format = formats[2 * every - 1].format
    plugin.configure_plugin(descs[:count], descs[count:])
    valid = plugin.get_valid_tactics()
    plugin.set_tactic(valid[0] if valid else 0)
    launch = SimpleNamespace()
    plugin.get_launch_params(expressions, descs, count, launch, Setter(), Builder())
    name, code = plugin.get_kernel([d.desc for d in descs[:count]], [d.desc for d in descs[count:]])
    return {
        "op": op,
        "shape": shape[0],
        "type": str(types[0]),
        "formats": [str(f.type) for f in formats]
        == [str(k) for k in (*kinds, *types)] * len(layouts),
        "layouts": layouts,
        "last": asked[-1].constants.get("channels_last", False),
        "launch": {k: v.value for k, v in vars(launch).items()},
        "kernel": name,
        "ptx": len(code),
        "head": code[:400].decode(),
        "parameters": code.count(b".param .u64"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("requests")
    parser.add_argument("--real", type=int, default=0)
    options = parser.parse_args()
    trt.IDimensionExpr, trt.DimsExprs = Number, lambda length: [None] * length
    _tensor.SymExprImpl = lambda expression: expression._expr
    compiled = {"real": 0, "stood in for": 0}

    def compile_some(launch: Any, capability: int, version: int | None = None) -> Any:
        if compiled["real"] < options.real:
            compiled["real"] += 1
            return compile_kernel(launch, capability, version)
        compiled["stood in for"] += 1
        kinds = ("u64",) * len(launch.arguments)
        return CompiledKernel(launch.kernel, capability, ".ptx", kinds, launch.threads, 0)

    kernel_ptx = plugins.kernel_ptx

    def noted(launch: Any) -> Any:
        asked.append(launch)
        return kernel_ptx(launch)

    plugins.kernel_ptx = noted  # type: ignore[assignment]
    plugins.compile_kernel = compile_some  # type: ignore[attr-defined]
    plugins.set_target(90)
    requests = json.loads(Path(options.requests).read_text())
    names = {r["op"] for r in requests}
    registered = plugins.register_plugins(trt, trtp, names)
    again = plugins.register_plugins(trt, trtp, names)
    found = [
        exercise(
            r["op"],
            r["sizes"],
            [tuple(s) for s in r["shapes"]],
            [KINDS[k] for k in r["kinds"]],
            r.get("last", False),
        )
        for r in requests
    ]
    print(json.dumps({
        "version": trt.__version__, "registered": registered, "again": again,
        "nodes": found, "compiled": compiled,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
