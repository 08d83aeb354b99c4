"""A bundle's graph -> the same in ONNX Runtime's blocked layout, for this machine.

ONNX Runtime's CPU provider convolves features whose channels lie in blocks of a vector's length,
``(N, C/b, H, W, b)``, in three quarters of the time. Its own optimizer brings a network into that
layout only where kernels are constant; the operators of its domain ``com.microsoft.nchwc`` take
kernels made at run time just as well. So the graph is rewritten with them before it is loaded:
constant convolutions, FDConv layers, pools and sums stay in blocks, and features are reordered
only where an operator that knows no blocks reads them. The block's length is the machine's, which
is why this is done as a session is opened; what is not rewritten runs as it did.

A blocked tensor has the shape (N, C, H, W), C filled up with zeros to whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.runtime.bundle import Bytes
from fdconv_deploy.runtime.native_layers import (
    ASSEMBLY,
    BAND_ATTRIBUTES,
    BANDS,
    FUNCTIONS,
    NativeGraph,
    fuse_layers,
    gates_of,
    is_assembly,
)
from fdconv_deploy.runtime.native_layers import DOMAIN as OURS
from fdconv_deploy.runtime.onnx_graph import (
    FLOAT,
    ExternalTensors,
    GraphIndex,
    Shape,
    add_value,
    attributes,
    captured,
    copied,
    import_domain,
    make_node,
    set_nodes,
    shape_of,
)

RUNTIMES = "com.microsoft.nchwc"
# Operators on single numbers which keep zeros finite; padded channels are zeros, and whatever
# becomes of them meets kernels of zeros.
_UNARY = {"Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "HardSwish", "HardSigmoid", "Elu", "Erf"}
_BINARY = {"Add", "Mul", "Sub"}
_UPSAMPLED = {b"half_pixel", b"align_corners", b"asymmetric"}
# Channels of whole blocks for each channel: with more, plain convolutions are faster.
MOST_FILLED = 1.5


@dataclass
class _Layer:
    """An FDConv layer of a graph: its assembly and all that convolves with its kernels.

    gates: the matrix of all attentions; offsets: where in it each gate that scales kernels is.
    x, y: what the layer convolves, and its answer. bias: of a single image.
    """

    named: dict[str, str]
    given: dict[str, Any]
    gates: str
    offsets: dict[str, int]
    x: str
    y: str
    batch: int
    scale: str | None
    bias: NDArray[Any] | None
    geometry: dict[str, Any]


def block_graph(model: bytes, external: Mapping[str, Bytes], block: int) -> NativeGraph | None:
    """Rewrite a graph for blocks of 8 or 16 channels; None where no FDConv layer of it can be."""
    return _Rewriting(fuse_layers(model, external), block).run()


class _Rewriting:
    """One graph on its way. Nodes are appended in order; what nobody reads is left out at last."""

    def __init__(self, fused: NativeGraph, block: int) -> None:
        self.model, self.files, self.block = fused.model, fused.files, block
        graph = self.graph = self.model.graph
        self.index = GraphIndex(graph, fused.files)
        self.nodes, self.constants = self.index.nodes, self.index.constants
        self.shapes: dict[str, Shape] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            shape = shape_of(value)
            if shape is not None and value.type.tensor_type.elem_type == FLOAT:
                self.shapes[value.name] = shape
        self.plain = {value.name for value in graph.input} | set(self.constants)
        self.blocked: dict[str, tuple[str, Shape]] = {}
        self.out: list[Any] = []
        self.done: set[int] = set()
        self.added = ExternalTensors("blocked constants")
        self.weights: dict[str, str] = {}

    def run(self) -> NativeGraph | None:
        # By the names that they have once their rows are joined.
        functions = {f.name.replace("_ByRows", ""): list(f.input) for f in self.model.functions}
        layers = {}
        for node in self.nodes:
            if is_assembly(node):
                named = dict(zip(functions.get(node.op_type, ()), node.input, strict=False))
                layer = self._layer(node, named) if len(named) == len(node.input) else None
                if layer is not None:
                    layers[self.index.producers[layer.y]] = layer
        if not layers:
            return None
        for number, node in enumerate(self.nodes):
            if number in self.done:
                continue
            if number in layers and self._write_layer(layers[number]):
                continue
            handler = _HANDLERS.get(node.op_type.partition("_")[0])
            if node.domain not in ("", OURS, FUNCTIONS):
                handler = None
            if handler is None or not handler(self, node):
                self._write_plain(node)
        for value in self.graph.output:
            self._as_plain(value.name)
        return self._finished()

    # Tensors

    def _as_plain(self, name: str) -> str:
        """A tensor in the layout that the graph was exported in."""
        if name and name not in self.plain and name in self.blocked:
            source, shape = self.blocked[name]
            self._write(
                "ReorderOutput", [source], name, RUNTIMES, channels=shape[1], channels_last=0
            )
            self.plain.add(name)
        return name

    def _as_blocked(self, name: str) -> str | None:
        """A tensor in blocks; None where it cannot be brought there."""
        if name not in self.blocked:
            shape = self.shapes.get(name)
            if shape is None or len(shape) != 4 or not self._fills(shape[1]):
                return None
            source, y = name, f"{name}/blocked"
            if shape[1] % 4:  # the runtime reorders four channels at a time
                source = f"{name}/filled"
                ends = np.array([0] * 5 + [-shape[1] % 4, 0, 0], np.int64)
                self._write("Pad", [name, self.added.add(f"{name}/ends", ends)], source, "")
            self._write("ReorderInput", [source], y, RUNTIMES, channels_last=0)
            self.blocked[name] = y, shape
        return self.blocked[name][0]

    def _shape(self, name: str) -> Shape | None:
        return self.blocked[name][1] if name in self.blocked else self.shapes.get(name)

    def _filled(self, channels: int) -> int:
        return -(-channels // self.block) * self.block

    def _fills(self, channels: int) -> bool:
        """Whether most of the blocks' channels are there: zeros take as long as numbers."""
        return self._filled(channels) <= MOST_FILLED * channels

    def _write(self, op: str, inputs: list[str], output: str, domain: str, **given: Any) -> None:
        node = make_node(op, inputs, [output], domain, **given)
        node.name = f"{output}/{op}"  # an exported node may be called by its output
        self.out.append(node)

    def _write_blocked(
        self, op: str, inputs: list[str], output: str, shape: Shape, domain: str, **given: Any
    ) -> bool:
        """Write a node that gives in blocks what ``output`` was; True."""
        self.blocked[output] = f"{output}/blocked", shape
        self._write(op, inputs, f"{output}/blocked", domain, **given)
        return True

    def _write_plain(self, node: Any) -> None:
        for name in (*node.input, *captured(node)):
            self._as_plain(name)
        self.out.append(node)
        self.plain.update(node.output)

    # Convolutions

    def _convolution(self, node: Any) -> bool:
        weight = self.constants.get(node.input[1])
        given = attributes(node)
        if weight is None or weight.data_type != FLOAT or len(weight.dims) != 4:
            return False
        x, (filters, channels, *kernel) = node.input[0], weight.dims
        shape, group, b = self._shape(x), given.get("group", 1), self.block
        if shape is None or given.get("auto_pad", b"NOTSET") != b"NOTSET":
            return False
        if not self._fills(filters):
            return False
        depthwise = group == filters and channels == 1 and filters % b == 0
        direct = group == 1 and channels < b and x not in self.blocked
        if group > 1 and not depthwise and (channels % b or filters // group % b):
            return False
        if not direct and not self._fills(group * channels):
            return False
        source = self._as_plain(x) if direct else self._as_blocked(x)
        if source is None:
            return False
        kernels = self._blocked_weight(node.input[1], whole=not direct and not depthwise)
        known, bias = self._bias(node)
        if not known:
            return False
        self._convolve(
            source, kernels, bias, node.output[0], (shape[0], filters), shape[2:], kernel, given
        )
        return True

    def _bias(self, node: Any) -> tuple[bool, NDArray[Any] | None]:
        """Whether a convolution's bias is a constant, or there is none, and its values."""
        name = node.input[2] if len(node.input) > 2 else ""
        values = self.index.values(name)
        return not name or values is not None, values

    def _blocked_weight(self, name: str, *, whole: bool) -> str:
        """A constant kernel in blocks of output channels and, if ``whole``, of input channels."""
        key = f"{name}/{'blocked' if whole else 'outputs'}"
        if key not in self.weights:
            values, b = self.index.values(name), self.block
            assert values is not None
            filters, channels, *kernel = values.shape
            pads = [(0, self._filled(filters) - filters), (0, 0), (0, 0), (0, 0)]
            if whole:
                pads[1] = (0, self._filled(channels) - channels)
            values = np.pad(values, pads) if any(p[1] for p in pads) else values
            if whole:
                ordered = blocked_kernel(values, b)
            else:
                ordered = blocked(values.reshape(1, len(values), -1, kernel[1]), b)
            self.weights[key] = self.added.add(key, ordered.reshape(values.shape))
        return self.weights[key]

    def _convolve(
        self,
        x: str,
        kernels: str,
        bias: NDArray[Any] | None,
        output: str,
        channels: tuple[int, int],
        size: Shape,
        kernel: list[int],
        given: dict[str, Any],
    ) -> None:
        """Write a convolution, with a sum and an activation that alone read its answer."""
        strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])
        pads = given.get("pads", [0, 0, 0, 0])
        shape = *channels, *_convolved(size, kernel, strides, pads, dilations)
        name, inputs, more = output, [x, kernels], {}
        if bias is not None:
            filled = np.pad(bias, (0, self._filled(channels[1]) - channels[1]))
            inputs.append(self.added.add(f"{output}/bias", filled.astype(np.float32)))
        while (node := self.index.only_reader(name)) is not None and "activation" not in more:
            if node.op_type == "Add" and len(inputs) < 4:
                (other,) = [i for i in node.input if i != name] or [name]
                if other == name or self.blocked.get(other, ("", ()))[1] != shape:
                    break
                inputs += [""] * (3 - len(inputs)) + [self.blocked[other][0]]
            elif node.op_type == "Relu":
                more["activation"] = "Relu"
            else:
                break
            name = node.output[0]
            self.done.add(self.index.producers[name])
        self._write_blocked(
            "Conv", inputs, name, shape, RUNTIMES, kernel_shape=kernel, strides=strides,
            pads=pads, dilations=dilations, group=given.get("group", 1), **more,
        )  # fmt: skip

    # FDConv layers

    def _layer(self, node: Any, named: dict[str, str]) -> _Layer | None:
        """An assembly and what it is for, where that is as exports have it."""
        given = attributes(node)
        gates = gates_of(self.index, named["attention"])
        offsets = {
            gate: given[f"{gate}_at"]
            for gate in ("filter", "spatial", "channel")
            if given.get(f"{gate}_at", -1) >= 0
        }
        if gates == named["attention"] and offsets:
            return None
        kernels = node.output[0]
        conv = self.index.only_reader(kernels, "Conv")
        if conv is None or conv.input[1] != kernels:
            return None
        known, bias = self._bias(conv)
        if not known:
            return None
        geometry: dict[str, Any] = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1]}
        geometry |= {"group": 1} | attributes(conv)
        batch = geometry["group"]
        layer = _Layer(
            named, given, gates, offsets, conv.input[0], conv.output[0], batch, None, bias, geometry
        )  # fmt: skip
        if "row_scale" in named:
            gate, layer.scale = self._traced(named["row_scale"], layer.gates)
            if gate != offsets.get("filter"):
                return None
        if bias is None:
            self._scaled_after(layer)
        self._scaled_before(layer)
        if batch > 1 and (given["in_channels"] % self.block or given["out_channels"] % self.block):
            return None
        return layer

    def _traced(self, name: str, gates: str) -> tuple[int | None, str | None]:
        """Where in the attentions a gate begins, and the constant that it is multiplied by."""
        constant = None
        while name not in self.constants:
            node = self.index.producer(name, "Mul", "Split", "Reshape")
            if node is None:
                return -1, None  # no gate
            if node.op_type == "Split":
                sizes = self.index.values(node.input[1])
                if node.input[0] != gates or sizes is None:
                    return -1, None
                return int(sizes[: list(node.output).index(name)].sum()), constant
            if node.op_type == "Mul":
                if constant is not None or node.input[1] not in self.constants:
                    return -1, None
                constant = node.input[1]
            name = node.input[0]
        return None, name

    def _scaled_after(self, layer: _Layer) -> None:
        """Gates and constants that scale the answer scale kernels instead; a shift is the bias."""
        y, node = layer.y, self.index.only_reader(layer.y)
        if node is not None and node.op_type == "Reshape" and layer.batch > 1:
            y = node.output[0]
            node = self.index.only_reader(y)
        if node is None or node.op_type != "Mul" or node.input[0] != y:
            return
        if "filter" in layer.offsets or layer.scale is not None:
            return
        gate, layer.scale = self._traced(node.input[1], layer.gates)
        if gate == -1:
            return
        layer.y = node.output[0]
        if gate is not None:
            layer.offsets["filter"] = gate
        shift = self.index.only_reader(layer.y, "Add")
        if shift is not None and shift.input[0] == layer.y:
            values = self.index.values(shift.input[1])
            if values is not None and values.shape == (1, layer.given["out_channels"], 1, 1):
                layer.y, layer.bias = shift.output[0], np.tile(values.reshape(-1), layer.batch)

    def _scaled_before(self, layer: _Layer) -> None:
        """Kernels see what comes before a batch is joined, and a gate of its channels."""
        node = self.index.producer(layer.x)
        if layer.batch > 1 and node is not None and node.op_type == "Reshape":
            layer.x = node.input[0]
            node = self.index.producer(layer.x)
        if node is None or node.op_type != "Mul" or "channel" in layer.offsets:
            return
        gate, constant = self._traced(node.input[1], layer.gates)
        if gate is not None and gate >= 0 and constant is None:
            layer.offsets["channel"] = gate
            layer.x = node.input[0]

    def _write_layer(self, layer: _Layer) -> bool:
        given, batch, b = layer.given, layer.batch, self.block
        filters, channels = given["out_channels"], given["in_channels"]
        shape = self._shape(layer.x)
        if shape is None or len(shape) != 4 or not self._fills(filters):
            return False
        if (batch > 1 and shape[:2] not in ((batch, channels), (1, batch * channels))) or (
            batch == 1 and shape[1] != channels
        ):
            return False
        x = self._as_blocked(layer.x)
        if x is None:
            return False
        y = layer.y
        kernels = f"{y}/kernels"
        taps = {"local_input", "local_weight"} & set(layer.named)
        inputs = [layer.gates, *(layer.named[n] for n in ("spectrum", "patterns", "blocks"))]
        inputs += [layer.named[n] for n in ("local_input", "local_weight") if taps]
        inputs += [layer.scale] if layer.scale is not None else []
        for name in inputs:
            self._as_plain(name)
        self._write(
            ASSEMBLY, inputs, kernels, OURS, block=b,
            scaled=int(layer.scale is not None),
            **{f"{gate}_at": at for gate, at in layer.offsets.items()},
            **{name: given[name] for name in _ASSEMBLY},
        )  # fmt: skip
        size = list(shape[2:])
        if batch > 1 and shape[0] == batch:
            joined = [1, batch * channels, *size]
            x = self._reshaped(x, joined, f"{y}/joined")
        answer = (1, batch * filters) if batch > 1 else (shape[0], filters)
        kernel = given["kernel_size"]
        parts = self._shape(y) if batch > 1 else None
        if parts is not None and parts[0] == batch:
            whole = f"{y}/whole"
            self._convolve(x, kernels, layer.bias, whole, answer, shape[2:], kernel, layer.geometry)
            name, found = self.blocked[whole]
            split = [batch, filters, *found[2:]]
            self.blocked[y] = self._reshaped(name, split, f"{y}/blocked"), tuple(split)
        else:
            self._convolve(x, kernels, layer.bias, y, answer, shape[2:], kernel, layer.geometry)
        return True

    def _reshaped(self, name: str, shape: list[int], output: str) -> str:
        """A blocked tensor whose channels are whole blocks, images joined or taken apart."""
        constant = self.added.add(f"{output}/shape", np.array(shape, np.int64))
        self._write("Reshape", [name, constant], output, "")
        return output

    # Others

    def _attention(self, node: Any) -> bool:
        source = self.blocked.get(node.input[0])
        if source is None:
            return False
        copy = copied(node, [source[0], *node.input[1:]], list(node.output))
        (block,) = (each for each in copy.attribute if each.name == "block")
        block.i = self.block
        self.out.append(copy)
        self.plain.update(node.output)
        return True

    def _bands(self, node: Any) -> bool:
        given, y = attributes(node), node.output[0]
        shape = self._shape(node.input[0])
        if shape is not None:
            self.shapes[y] = shape  # the runtime cannot tell
        x = self._as_blocked(node.input[0])
        if x is None or shape is None:
            return False
        kept = {name: given[name] for name in BAND_ATTRIBUTES}
        inputs = [x, *node.input[1:]]
        return self._write_blocked(BANDS, inputs, y, shape, OURS, block=self.block, **kept)

    def _pool(self, node: Any) -> bool:
        given = attributes(node)
        x, shape = node.input[0], self.shapes.get(node.output[0])
        known = given.get("auto_pad", b"NOTSET") == b"NOTSET" and not given.get("storage_order", 0)
        if len(node.output) > 1 or shape is None or x not in self.blocked or not known:
            return False
        if given.get("ceil_mode", 0):
            return False
        kept = "kernel_shape strides pads dilations count_include_pad".split()
        given = {key: value for key, value in given.items() if key in kept}
        source = [self.blocked[x][0]]
        return self._write_blocked(node.op_type, source, node.output[0], shape, RUNTIMES, **given)

    def _concatenation(self, node: Any) -> bool:
        shapes = [shape for name in node.input if (shape := self._shape(name)) is not None]
        if attributes(node).get("axis") != 1 or len(shapes) < len(node.input):
            return False
        if any(len(shape) != 4 or shape[1] % self.block for shape in shapes):
            return False
        # Of so many channels most had to be reordered for a convolution behind this anyway.
        sizes = zip(node.input, (int(np.prod(shape)) for shape in shapes), strict=True)
        parts = [(size, name in self.blocked) for name, size in sizes]
        if 2 * sum(size for size, there in parts if there) < sum(size for size, _ in parts):
            return False
        found = [self._as_blocked(name) for name in node.input]
        shape = shapes[0][0], sum(s[1] for s in shapes), *shapes[0][2:]
        return self._same_operator(node, [name for name in found if name], shape)

    def _resize(self, node: Any) -> bool:
        """To a multiple of the size, by linear interpolation."""
        given, y = attributes(node), node.output[0]
        source, to = self.blocked.get(node.input[0]), self.shapes.get(y)
        mode = given.get("coordinate_transformation_mode", b"half_pixel")
        if source is None or to is None or given.get("mode") != b"linear":
            return False
        if given.get("antialias") or given.get("exclude_outside") or mode not in _UPSAMPLED:
            return False
        name, shape = source
        if to[:2] != shape[:2] or any(n % of for n, of in zip(to[2:], shape[2:], strict=True)):
            return False
        scales = [1, 1, to[2] // shape[2], to[3] // shape[3]]
        if len(node.input) < 4:  # no lengths, but factors, which may be of 5 to 10 by 2.05, too
            factors = self.index.values(node.input[2])
            wanted = scales if "axes" not in given else [scales[a] for a in given["axes"]]
            if factors is None or factors.tolist() != wanted:
                return False
        return self._write_blocked(
            "Upsample", [name], y, to, RUNTIMES, scales=scales, mode="linear",
            coordinate_transformation_mode=mode,
        )  # fmt: skip

    def _reshape(self, node: Any) -> bool:
        """Images joined into one of as many channels, or taken apart."""
        source, sizes = self.blocked.get(node.input[0]), self.index.values(node.input[1])
        if source is None or sizes is None:
            return False
        (images, channels, *size), to = source[1], tuple(int(n) for n in sizes)
        if len(to) != 4 or to[2:] != tuple(size) or to[0] * to[1] != images * channels:
            return False
        if min(to[:2]) < 1 or channels % self.block or to[1] % self.block:
            return False
        return self._same_operator(node, [source[0], node.input[1]], to)

    def _unary(self, node: Any) -> bool:
        source = self.blocked.get(node.input[0])
        if source is None or any(name in self.blocked for name in node.input[1:]):
            return False
        return self._same_operator(node, [source[0], *node.input[1:]], source[1])

    def _binary(self, node: Any) -> bool:
        blocked = [name for name in node.input if name in self.blocked]
        if not blocked:
            return False
        shape = self.blocked[blocked[0]][1]
        inputs: list[str] = []
        for name in node.input:
            if self._shape(name) == shape:
                other = self._as_blocked(name)
                if other is None:
                    return False
                inputs.append(other)
            elif name in self.constants and _is_scalar(self.constants[name].dims):
                inputs.append(name)
            else:
                return False
        return self._same_operator(node, inputs, shape)

    def _same_operator(self, node: Any, inputs: list[str], shape: Shape) -> bool:
        """An operator that means the same in blocks."""
        name = f"{node.output[0]}/blocked"
        self.out.append(copied(node, inputs, [name]))
        self.blocked[node.output[0]] = name, shape
        return True

    def _finished(self) -> NativeGraph:
        graph = self.graph
        graph.initializer.extend(self.added.tensors)
        # The runtime infers no shapes past a custom operator, and without them writes no sum into
        # the buffer of what is added, and takes half as much memory again for a run.
        for name, (images, channels, *size) in self.blocked.values():
            add_value(graph.value_info, name, (images, self._filled(channels), *size))
        set_nodes(graph, self.out)
        import_domain(self.model, RUNTIMES)
        return NativeGraph(self.model, {**self.files, self.added.location: self.added.content()})


# Not of an instance: each would be a cycle, and hold the files' bytes until one is looked for.
_HANDLERS: dict[str, Callable[[_Rewriting, Any], bool]] = {
    "Conv": _Rewriting._convolution,
    "MaxPool": _Rewriting._pool,
    "AveragePool": _Rewriting._pool,
    "Concat": _Rewriting._concatenation,
    "Reshape": _Rewriting._reshape,
    "Resize": _Rewriting._resize,
    "KernelAttention": _Rewriting._attention,
    BANDS: _Rewriting._bands,
    **dict.fromkeys(_UNARY, _Rewriting._unary),
    **dict.fromkeys(_BINARY, _Rewriting._binary),
}
_ASSEMBLY = (
    "layer out_channels in_channels kernel_size taps row_frequencies column_frequencies".split()
)


def _is_scalar(dims: Sequence[int]) -> bool:
    """Whether a constant is one number, which leaves features four axes."""
    return len(dims) <= 4 and np.prod(dims) == 1


def _convolved(
    size: Shape, kernel: list[int], strides: list[int], pads: list[int], dilations: list[int]
) -> Shape:
    """Height and width of a convolution's answer."""
    return tuple(
        (size[i] + pads[i] + pads[i + 2] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1
        for i in range(2)
    )


def blocked(x: NDArray[Any], block: int) -> NDArray[Any]:
    """(N, C, H, W) in blocks, C a multiple of their length; the shape is kept."""
    images, channels, *size = x.shape
    split = x.reshape(images, channels // block, block, *size)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 2)).reshape(x.shape)


def blocked_kernel(x: NDArray[Any], block: int) -> NDArray[Any]:
    """A kernel (O, I, kh, kw) in blocks of output and of input channels; the shape is kept."""
    filters, channels, *kernel = x.shape
    split = x.reshape(filters // block, block, channels // block, block, *kernel)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 5, 3, 1)).reshape(x.shape)
