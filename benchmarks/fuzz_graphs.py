"""Random networks around FDConv layers, on every way of running them on a CPU.

Layers as the exporter writes them are joined with random operators that know nothing of them, and
each graph is opened as any bundle is: in ONNX Runtime with native operators, with and without its
blocked layout, and in OpenVINO where that is installed. All must answer as each operator does by
itself in ONNX Runtime, or refuse with a sentence.

    python -m benchmarks.fuzz_graphs --runs 200 --seed 0
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fdconv_deploy.export import export_module
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.runtime import open_session
from fdconv_deploy.runtime.bundle import BundleWriter
from fdconv_deploy.runtime.manifest import Manifest, TensorSpec
from tests.reference.lively import enliven, lively_input

SIZE = 12, 14
# Relative to an output's largest value; depth adds up, and attentions amplify.
TOLERANCE = 1e-4
# Input and output channels, kernel, and whatever else is unlike the published defaults.
LAYERS: list[tuple[int, int, int, dict[str, Any]]] = [
    (16, 24, 3, {"padding": 1}),
    (24, 16, 1, {}),
    (32, 32, 3, {"padding": 1, "stride": 2, "bias": False, "use_fdconv_if_stride_in": (1, 2)}),
    (20, 33, 3, {"padding": 2, "dilation": 2}),
    (33, 20, 1, {"bias": False}),
    (24, 24, 3, {"padding": 1, "ksm_global_act": "softmax", "ksm_only_kernel_att": True}),
    (64, 48, 3, {"padding": 1, "use_ksm_local": False}),
    (48, 64, 1, {"ksm_only_kernel_att": True}),
]
Array = NDArray[Any]


@dataclass
class Tensors:
    """A graph as it grows: what each of its tensors is, by running each operator alone."""

    batch: int
    random: np.random.Generator
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    functions: dict[str, Any] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)
    rounding: dict[str, float] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=lambda: {"": 18})

    def name(self, what: str) -> str:
        return f"{what}_{len(self.nodes)}_{len(self.constants)}"

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        name = self.name("constant")
        self.constants[name] = np.asarray(value, kind)
        return name

    def normal(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant(self.random.standard_normal(shape) * scale)

    def add(self, op: str, inputs: Sequence[str], outputs: int = 1, **given: Any) -> list[str]:
        """Append a node and run it; its outputs' names.

        Raises:
            Exception: ONNX Runtime takes no such node; then none is appended.
        """
        names = [self.name(f"{op.lower()}{number}") for number in range(outputs)]
        self.extend([helper.make_node(op, inputs, names, name=names[0], **given)], names)
        return names

    def extend(self, nodes: list[Any], outputs: list[str]) -> None:
        """Append nodes and run them by themselves."""
        read = {name for node in nodes for name in _read(node)}
        feeds = {name: self.values[name] for name in sorted(read & set(self.values))}
        constants = {name: self.constants[name] for name in sorted(read & set(self.constants))}
        model = self._model(nodes, feeds, constants, outputs)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        found = session.run(outputs, feeds)
        if not all(v.size and np.isfinite(v).all() for v in found if v.dtype.kind == "f"):
            raise ValueError("no finite answer")
        self.values.update(zip(outputs, found, strict=True))
        self.nodes += nodes

    def _model(
        self,
        nodes: list[Any],
        feeds: dict[str, Array],
        constants: dict[str, Array],
        outputs: list[str],
        shapes: dict[str, Array] | None = None,
    ) -> Any:
        def value(name: str, array: Array | None) -> Any:
            if array is None:
                return onnx.ValueInfoProto(name=name)
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            return helper.make_tensor_value_info(name, kind, array.shape)

        graph = helper.make_graph(
            nodes,
            "graph",
            [value(name, array) for name, array in feeds.items()],
            [value(name, self.values.get(name)) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
            value_info=[value(name, array) for name, array in (shapes or {}).items()],
        )
        opsets = [helper.make_opsetid(domain, n) for domain, n in self.opsets.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        model.functions.extend(self.functions.values())
        return model

    def write(self, folder: Path, outputs: list[str]) -> None:
        """A bundle of the whole."""
        shapes = {name: v for name, v in self.values.items() if name not in ("input", *outputs)}
        inputs = {"input": self.values["input"]}
        model = self._model(self.nodes, inputs, self.constants, outputs, shapes)
        onnx.checker.check_model(model)

        def specs(names: Sequence[str]) -> dict[int, tuple[TensorSpec, ...]]:
            found = [(name, self.values[name]) for name in names]
            return {
                self.batch: tuple(
                    TensorSpec(name=name, shape=v.shape, dtype=v.dtype.name) for name, v in found
                )
            }

        with BundleWriter(folder) as writer:
            onnx.save(model, writer.path / "model.onnx")
            writer.commit(
                Manifest(
                    created_by="benchmarks.fuzz_graphs",
                    created_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
                    kind="module",
                    models={self.batch: "model.onnx"},
                    inputs=specs(["input"]),
                    outputs=specs(outputs),
                )
            )


def _read(node: Any) -> set[str]:
    """What a node reads, and graphs in it."""
    inner = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return {*node.input, *(name for graph in inner for each in graph.node for name in _read(each))}


# Layers as exported

_Layer = tuple[Any, dict[str, Array]]


def export_layers(folder: Path, batch: int) -> list[_Layer]:
    """Graphs and constants of every layer that networks are made of."""
    found = []
    for number, (channels, filters, kernel, more) in enumerate(LAYERS):
        bins = filters * kernel * (channels * kernel // 2 + 1)
        groups = next(n for n in range(2, bins) if bins % n == 0)
        torch.manual_seed(number)
        layer = enliven(FDConv2d(channels, filters, kernel, kernel_num=groups, **more))
        network = torch.nn.Sequential(layer)
        norm = torch.nn.BatchNorm2d(filters)
        torch.nn.init.uniform_(norm.running_mean, -1, 1)
        if number % 2:
            network.append(norm)
        path = folder / f"{number}.b{batch}"
        if not path.exists():
            export_module(network.eval(), lively_input((batch, channels, *SIZE)), path)
        (name,) = (each.name for each in path.iterdir() if each.suffix == ".onnx")
        model = onnx.load(path / name)
        constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        found.append((model, constants))
    return found


def add_layer(graph: Tensors, layer: _Layer, x: str) -> str:
    """Copy a layer's nodes into a graph under names of their own; the answer's name."""
    model, constants = layer
    prefix = graph.name("layer") + "/"
    names = {model.graph.input[0].name: x, "": ""}
    nodes = []
    for original in model.graph.node:
        node = onnx.NodeProto.FromString(original.SerializeToString())
        for tensors in (node.input, node.output):
            for place, name in enumerate(tensors):
                tensors[place] = names.setdefault(name, prefix + name)
        node.name = prefix + original.name
        nodes.append(node)
    graph.constants |= {prefix + name: value for name, value in constants.items()}
    for function in model.functions:
        graph.functions[function.name] = function
    graph.opsets |= {each.domain: each.version for each in model.opset_import}
    graph.extend(nodes, [names[model.graph.output[0].name]])
    for value in model.graph.value_info:  # their shapes are in exported graphs, too
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            dims = [d.dim_value for d in kind.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            graph.values[prefix + value.name] = np.broadcast_to(np.zeros((), dtype), dims)
    return names[model.graph.output[0].name]


# Operators between them


def _four(graph: Tensors, rng: random.Random, x: str = "") -> str:
    """Another tensor of a shape, or one of four axes."""
    shape = graph.values[x].shape if x else None
    names = [n for n in graph.open if shape is None or graph.values[n].shape == shape]
    return rng.choice(names[-6:] if rng.random() < 0.7 else names)


def convolution(graph: Tensors, rng: random.Random, x: str) -> str:
    channels = graph.values[x].shape[1]
    filters = rng.choice([1, 3, 8, 16, 20, 24, 24, 32, 32, 33, 48, 64])
    group = 1
    if rng.random() < 0.3:
        group = rng.choice([n for n in (2, 3, 4, 8, 16, channels) if channels % n == 0] or [1])
        filters = group * rng.choice([1, 1, 2, 8, 16])
    kernel = [rng.choice([1, 1, 2, 3, 3, 5]), rng.choice([1, 3])] if rng.random() < 0.4 else [3, 3]
    if rng.random() < 0.3:
        kernel = [1, 1]
    given: dict[str, Any] = {
        "group": group,
        "strides": rng.choice([[1, 1], [1, 1], [2, 2], [1, 2]]),
    }
    if rng.random() < 0.15:
        given["auto_pad"] = rng.choice(["SAME_UPPER", "SAME_LOWER", "VALID"])
    else:
        given["dilations"] = rng.choice([[1, 1], [1, 1], [2, 2], [1, 3]])
        pads = [d * (k // 2) for d, k in zip(given["dilations"], kernel, strict=True)]
        given["pads"] = rng.choice([pads * 2, pads * 2, [0] * 4, [1, 0, 2, 3]])
    if rng.random() < 0.5:
        given["kernel_shape"] = kernel
    scale = (channels // group * kernel[0] * kernel[1]) ** -0.5
    shared = [
        n for n, v in graph.constants.items() if v.shape == (filters, channels // group, *kernel)
    ]
    weight = graph.normal(filters, channels // group, *kernel, scale=scale)
    if shared and rng.random() < 0.5:
        weight = rng.choice(shared)
    elif rng.random() < 0.1:  # no constant
        (weight,) = graph.add("Identity" if rng.random() < 0.5 else "Neg", [weight])
    inputs = [x, weight]
    if rng.random() < 0.6:
        inputs.append(graph.normal(filters))
        if rng.random() < 0.1:
            inputs[2] = graph.add("Neg", inputs[2:])[0]
    return graph.add("Conv", inputs, **given)[0]


def transposed(graph: Tensors, rng: random.Random, x: str) -> str:
    weight = graph.normal(graph.values[x].shape[1], rng.choice([8, 16, 24]), 2, 2, scale=0.2)
    return graph.add("ConvTranspose", [x, weight], strides=[2, 2])[0]


def pool(graph: Tensors, rng: random.Random, x: str) -> str:
    op = rng.choice(
        ["MaxPool", "AveragePool", "MaxPool", "AveragePool", "GlobalAveragePool", "LpPool"]
    )
    if op == "GlobalAveragePool":
        return graph.add(op, [x])[0]
    given: dict[str, Any] = {"kernel_shape": rng.choice([[3, 3], [2, 2], [1, 3], [5, 5]])}
    given["strides"] = rng.choice([[1, 1], [2, 2], [1, 2]])
    if rng.random() < 0.2:
        given["auto_pad"] = rng.choice(["SAME_UPPER", "SAME_LOWER"])
    elif rng.random() < 0.7:
        given["pads"] = [min(rng.choice([0, 1, 1]), k - 1) for k in given["kernel_shape"] * 2]
    if rng.random() < 0.2 and op != "LpPool":
        given["ceil_mode"] = 1
    if op == "AveragePool":
        given["count_include_pad"] = rng.choice([0, 1])
    if op == "MaxPool" and "auto_pad" not in given and rng.random() < 0.2:
        given["dilations"] = [2, 2]
    if rng.random() < 0.2:
        del given["strides"]
    names = graph.add(op, [x], 2 if op == "MaxPool" and rng.random() < 0.15 else 1, **given)
    return names[0]


def unary(graph: Tensors, rng: random.Random, x: str) -> str:
    op = rng.choice(
        "Relu Relu Relu LeakyRelu Sigmoid Tanh Clip HardSwish HardSigmoid Elu Erf Exp Softplus Abs "
        "Identity Neg PRelu Softmax Cast Selu Mish".split()
    )
    if op == "Clip":
        low, high = graph.constant(-0.5), graph.constant(0.7)
        if rng.random() < 0.3:
            (low,) = graph.add("ReduceMin", [x], keepdims=0)
        return graph.add(op, [x, low, high] if rng.random() < 0.7 else [x, "", high])[0]
    if op == "Exp":
        return graph.add(op, graph.add("Sigmoid", [x]))[0]
    if op == "PRelu":
        return graph.add(op, [x, graph.normal(graph.values[x].shape[1], 1, 1)])[0]
    if op == "Cast":
        return graph.add(op, graph.add(op, [x], to=TensorProto.DOUBLE), to=TensorProto.FLOAT)[0]
    given: dict[str, Any] = {"alpha": 0.3} if op in ("LeakyRelu", "Elu") else {}
    if op == "Softmax":
        given["axis"] = rng.choice([1, -1])
    return graph.add(op, [x], **given)[0]


def binary(graph: Tensors, rng: random.Random, x: str) -> str:
    op = rng.choice(["Add", "Add", "Add", "Mul", "Mul", "Sub", "Max", "Div"])
    n, c, h, w = graph.values[x].shape
    kind = rng.choice("same same same self scalar channels gate map full five images".split())
    if kind == "same":
        other = _four(graph, rng, x)
    elif kind == "self":
        other = x
    elif kind == "scalar":
        other = graph.normal(*[1] * rng.choice([0, 1, 3, 4]))
    elif kind == "five":
        other = graph.normal(1, 1, 1, 1, 1)
    elif kind == "channels":
        other = graph.normal(*rng.choice([(1, c, 1, 1), (c, 1, 1)]))
    elif kind == "map":
        other = graph.normal(*rng.choice([(1, 1, h, w), (h, w), (n, 1, h, w), (1, 1, 1, w)]))
    elif kind == "full":
        other = graph.normal(n, c, h, w)
    elif kind == "images":
        (other,) = graph.add("ReduceMean", [x, graph.constant([0], np.int64)])
    else:
        (gate,) = graph.add("GlobalAveragePool", [x])
        (other,) = graph.add("Sigmoid", [gate])
    if op == "Div":
        (other,) = graph.add("Exp", graph.add("Tanh", [other]))
    inputs = [x, other] if op == "Div" or rng.random() < 0.6 else [other, x]
    (y,) = graph.add(op, inputs)
    if graph.values[y].ndim == 5:
        (y,) = graph.add("Reshape", [y, graph.constant((n, c, h, w), np.int64)])
    return y


def concatenation(graph: Tensors, rng: random.Random, x: str) -> str:
    shape = graph.values[x].shape
    fits = [t for t in graph.open if graph.values[t].shape[::3] == shape[::3]]
    fits = [t for t in fits if graph.values[t].shape[2] == shape[2]]
    parts = [x, *rng.choices(fits, k=rng.choice([1, 1, 2]))]
    rng.shuffle(parts)
    if rng.random() < 0.1:
        parts = [x, _four(graph, rng, x)]
        return graph.add("Concat", parts, axis=rng.choice([2, -1]))[0]
    return graph.add("Concat", parts, axis=rng.choice([1, 1, 1, -3]))[0]


def cut(graph: Tensors, rng: random.Random, x: str) -> str:
    n, c, h, w = graph.values[x].shape
    integers = lambda *v: graph.constant(v, np.int64)  # noqa: E731
    kind = rng.choice("split slice pad transpose shuffle depth space flip join reshape".split())
    if kind == "split":
        first = rng.choice([min(c - 1, 16), c // 2, 1])
        parts = graph.add("Split", [x, integers(first, c - first)], 2, axis=1)
        graph.open.append(parts[1])
        return parts[0]
    if kind == "slice":
        return graph.add("Slice", [x, integers(1, 0), integers(h, w - 1), integers(2, 3)])[0]
    if kind == "pad":
        mode = rng.choice(["constant", "reflect", "edge"])
        return graph.add("Pad", [x, integers(0, 0, 1, 1, 0, 0, 1, 1)], mode=mode)[0]
    if kind == "transpose":
        return graph.add("Transpose", [x], perm=[0, 1, 3, 2])[0]
    if kind == "shuffle":
        parts = next(p for p in (4, 3, 2, 1) if c % p == 0)
        (y,) = graph.add("Reshape", [x, integers(n, parts, c // parts, h, w)])
        (y,) = graph.add("Transpose", [y], perm=[0, 2, 1, 3, 4])
        return graph.add("Reshape", [y, integers(0, -1, h, w)])[0]
    if kind == "depth":
        return graph.add("DepthToSpace", [x], blocksize=2)[0]
    if kind == "space":
        return graph.add("SpaceToDepth", [x], blocksize=2)[0]
    if kind == "join":
        (y,) = graph.add("Reshape", [x, integers(1, n * c, h, w)])
        (y,) = graph.add("Relu", [y])
        return graph.add("Reshape", [y, integers(n, c, h, w)])[0]
    if kind == "reshape":
        to = rng.choice([(n, c, w, h), (n, c, h * w, 1), (n, -1, h, w), (0, 0, 0, 0)])
        return graph.add("Reshape", [x, integers(*to)])[0]
    steps = integers(-1), integers(-1000), integers(1), integers(-1)
    return graph.add("Slice", [x, *steps])[0]


def resize(graph: Tensors, rng: random.Random, x: str) -> str:
    n, c, h, w = graph.values[x].shape
    modes = "half_pixel align_corners asymmetric pytorch_half_pixel half_pixel_symmetric"
    given: dict[str, Any] = {
        "mode": rng.choice(["linear", "linear", "linear", "nearest", "cubic"]),
        "coordinate_transformation_mode": rng.choice(modes.split()),
    }
    if rng.random() < 0.1:
        given["antialias"] = 1
    if rng.random() < 0.5:
        scale = rng.choice(
            [(2.0, 2.0), (2.05, 2.04), (1.0, 2.0), (0.5, 0.5), (3.0, 1.09), (1.5, 2)]
        )
        axes = {"axes": [2, 3]} if rng.random() < 0.3 else {}
        scales = graph.constant(scale if axes else (1, 1, *scale))
        return graph.add("Resize", [x, "", scales], **given, **axes)[0]
    to = rng.choice([(2 * h, 2 * w), (2 * h, 3 * w), (h, w), (h // 2, w // 2), (h + 1, w + 3)])
    return graph.add("Resize", [x, "", "", graph.constant((n, c, *to), np.int64)], **given)[0]


def norm(graph: Tensors, rng: random.Random, x: str) -> str:
    c = graph.values[x].shape[1]
    if rng.random() < 0.5:
        spread = graph.constant(graph.random.uniform(0.5, 1.5, c))
        inputs = [x, graph.normal(c), graph.normal(c), graph.normal(c, scale=0.2), spread]
        return graph.add("BatchNormalization", inputs)[0]
    if rng.random() < 0.3:
        return graph.add("LRN", [x], size=3)[0]
    return graph.add("InstanceNormalization", [x, graph.normal(c), graph.normal(c)])[0]


def branch(graph: Tensors, rng: random.Random, x: str) -> str:
    """A node that holds graphs, which read what is outside of them."""
    (mean,) = graph.add("ReduceMean", [x], keepdims=0)
    (condition,) = graph.add("Greater", [mean, graph.constant(rng.choice([-9, 9]))])
    names = [graph.name(f"inner{i}") for i in range(2)]
    graphs = [
        helper.make_graph(
            [helper.make_node(op, [x], [name])], op, [], [onnx.ValueInfoProto(name=name)]
        )
        for op, name in zip(["Relu", "Abs"], names, strict=True)
    ]
    for each, name in zip(graphs, names, strict=True):
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, graph.values[x].shape)
        each.output[0].CopyFrom(value)
    return graph.add("If", [condition], then_branch=graphs[0], else_branch=graphs[1])[0]


OPERATORS: list[tuple[Callable[[Tensors, random.Random, str], str], int]] = [
    (convolution, 8), (binary, 7), (unary, 6), (pool, 3), (concatenation, 3), (resize, 3),
    (cut, 3), (norm, 2), (transposed, 1), (branch, 1),
]  # fmt: skip


def network(seed: int, layers: list[_Layer], batch: int) -> tuple[Tensors, list[str]]:
    """A random graph of a few FDConv layers, and its outputs."""
    rng = random.Random(seed)
    graph = Tensors(batch, np.random.default_rng(seed))
    channels = rng.choice([1, 3, 3, 3, 4, 6, 16, 20])
    graph.values["input"] = lively_input((batch, channels, *SIZE), seed).numpy()
    graph.open.append("input")
    outputs = []
    for _ in range(rng.choice([1, 2, 3])):
        model, constants = rng.choice(layers)
        wanted = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
        fits = [t for t in graph.open if graph.values[t].shape == (batch, wanted, *SIZE)]
        if fits and rng.random() < 0.7:
            x = rng.choice(fits)
        else:
            sized = [t for t in graph.open if graph.values[t].shape[2:] == SIZE]
            sized = [t for t in sized if graph.values[t].shape[0] == batch]
            x = rng.choice(sized)
            weight = graph.normal(wanted, graph.values[x].shape[1], 1, 1, scale=0.3)
            (x,) = graph.add("Conv", [x, weight])
            graph.open.append(x)
        graph.open.append(add_layer(graph, (model, constants), x))
        for _ in range(rng.choice([2, 4, 8, 12])):
            operator = rng.choices(*zip(*OPERATORS, strict=True))[0]
            x = _four(graph, rng)
            with suppress(Exception):  # not of these shapes
                y = operator(graph, rng, x)
                value = graph.values[y]
                if value.ndim == 4 and value.size < 200_000 and np.abs(value).max() < 1e3:
                    graph.open.append(y)
                else:
                    outputs.append(y)
    outputs += [graph.open[-1], *rng.sample(graph.open[1:], min(2, len(graph.open) - 1))]
    return graph, list(dict.fromkeys(outputs))


def ways() -> dict[str, dict[str, Any]]:
    """How a graph is run: arguments of `open_session`."""
    found: dict[str, dict[str, Any]] = {
        "portable": {"backend": "onnxruntime-cpu", "native": False},
        "nchw": {"backend": "onnxruntime-cpu", "native": "nchw"},
        "blocked": {"backend": "onnxruntime-cpu", "native": True},
    }
    if find_spec("openvino") is not None:
        found["openvino"] = {"backend": "openvino", "native": True}
        found["openvino portable"] = {"backend": "openvino", "native": False}
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=Path, help="keep the exported layers in this folder")
    parser.add_argument("--ways", nargs="*", choices=list(ways()), default=list(ways()))
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.layers or Path(scratch)
        layers = {batch: export_layers(folder, batch) for batch in (1, 2)}
        for seed in range(chosen.seed, chosen.seed + chosen.runs):
            batch = 1 + (seed % 4 == 3)
            graph, outputs = network(seed, layers[batch], batch)
            bundle = Path(scratch) / f"bundle{seed}"
            graph.write(bundle, outputs)
            for way in chosen.ways:
                counted[run(way, bundle, graph, outputs, seed)] += 1
    for text, count in counted.most_common():
        print(f"{count:6} {text}")


def run(way: str, bundle: Path, graph: Tensors, outputs: list[str], seed: int) -> str:
    """What became of a graph in one way of running it; printed if wrong."""
    try:
        with open_session(bundle, threads=1, **ways()[way]) as session:
            found = session.run_raw({"input": graph.values["input"]})
            again = session.run_raw({"input": graph.values["input"]})
            operators = session.operators
    except Exception as error:
        print(f"seed {seed}, {way}: {type(error).__name__}: {str(error)[:400]}", flush=True)
        return f"{way}: {type(error).__name__}"
    for name in outputs:
        y = graph.values[name].astype(np.float64)
        off = np.abs(found[name] - y).max() / max(np.abs(y).max(), 1e-6)
        if way == "portable":
            graph.rounding[name] = 10 * off
        tolerance = max(TOLERANCE, graph.rounding.get(name, 0.0))
        if not off <= tolerance or not np.array_equal(found[name], again[name]):
            print(f"seed {seed}, {way}: {name} is {off:.1e} off ({operators})", flush=True)
            return f"{way}: wrong"
    return f"{way}: right; {operators.replace(', since they are built here', '')}"


if __name__ == "__main__":
    main()
