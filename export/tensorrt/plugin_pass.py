"""A bundle's graph -> the variant whose FDConv layers ask TensorRT for plugins.

Frequency assembly becomes two nodes, one for each GPU kernel, and band modulation a few matrix
products and one. Each node names a plugin and carries an ONNX function body that means the same,
so the variant is a whole ONNX model, too. It is made from the exported graph alone: what the
engine computes is what the bundle holds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.layers import Nodes, producer_of, rows_met, take_over
from fdconv_deploy.folding.spectrum import unfold_spectrum
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.ops.frequency_assembly.launch import (
    AssemblySizes,
    KernelSpectrum,
    column_transform,
    half_shape,
    kernel_spectrum,
    root_table,
    transform_of,
)
from fdconv_deploy.ops.frequency_assembly.plugin import (
    ColumnForm,
    columns_function,
    rows_function,
    rows_name,
)
from fdconv_deploy.ops.frequency_band_modulation.plugin import (
    combination_function,
    combination_name,
)
from fdconv_deploy.ops.launch import KernelLaunch
from fdconv_deploy.ops.tensorrt_plugins import NAMESPACE, launch_of

FLOAT32, FLOAT16 = 1, 10
Named = dict[str, gs.Tensor]


@dataclass(frozen=True)
class PluginGraph:
    """The variant, how many nodes ask for each plugin, and the kernels that they launch."""

    model: ModelProto
    plugins: dict[str, int]
    launches: list[KernelLaunch]


def ask_for_plugins(model: ModelProto) -> PluginGraph:
    """The plugin variant of a bundle's graph; ``model`` holds its data and is not changed.

    Raises:
        ExportError: an FDConv node is not as this version writes it.
    """
    graph = gs.import_onnx(model)
    inputs = {function.name: function.input for function in model.functions}
    nodes = Nodes(graph, graph.inputs[0].shape[0])
    replace = {"FrequencyAssembly": _replace_assembly, "FrequencyBandModulation": _replace_bands}
    for node in [n for n in graph.nodes if n.domain == DOMAIN]:
        replacement = replace.get(node.op.partition("_")[0])
        if replacement is None or node.op not in inputs or "layer" not in node.attrs:
            raise ExportError(
                f"the graph holds an operator {node.op!r} ({node.name}) that this version does "
                "not know. Export the bundle again, or build with --plugins off."
            )
        nodes.begin(f"{node.attrs['layer']}.plugin")  # not to meet the names of what stays
        replacement(nodes, node, dict(zip(inputs[node.op], node.inputs, strict=True)))
    result = nodes.model()
    del result.graph.value_info[:]  # some are float16 now; whoever reads the graph infers them
    asking = [node for node in graph.nodes if node.domain == DOMAIN]
    counts = Counter(node.op for node in asking)
    launches = [launch_of(node.op, node.attrs["sizes"]) for node in asking]
    return PluginGraph(result, dict(sorted(counts.items())), launches)


def _unknown(name: str) -> ExportError:
    return ExportError(
        f"the graph is not as this version of fdconv-deploy writes it (at {name!r}), so its "
        "layers cannot be handed to plugins. Export the bundle again, or build with "
        "--plugins off."
    )


def _values(tensor: gs.Tensor) -> NDArray[Any]:
    """A constant's values; ExportError where it is none."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    raise _unknown(tensor.name)


def _plugin_node(
    nodes: Nodes, op: str, name: str, inputs: Sequence[gs.Tensor], **attributes: Any
) -> gs.Variable:
    """A node that asks for a plugin, compiled ahead of time; without it, its function is meant."""
    return nodes(op, name, *inputs, domain=DOMAIN, plugin_namespace=NAMESPACE, aot=1, **attributes)


def _stand_for(nodes: Nodes, old: gs.Node, new: gs.Variable, half: bool) -> None:
    """Let ``new``, float16 where ``half``, stand for what ``old`` gives, a float32 tensor."""
    (output,) = old.outputs
    if half:
        for reader in [n for n in output.outputs if n.op == "Cast" and n.attrs["to"] == FLOAT16]:
            (cast,) = reader.outputs
            for other in list(cast.outputs):
                other.inputs = [new if t is cast else t for t in other.inputs]
            reader.inputs.clear()
        if output.outputs:
            new = nodes("Cast", "single", new, to=FLOAT32)
    if output.outputs or not half:
        take_over(output, new)
    else:
        old.outputs.clear()


def _replace_assembly(nodes: Nodes, node: gs.Node, named: Named) -> None:
    """Write a layer's kernel assembly anew, and its convolution as one if it was by rows."""
    spectrum = _spectrum(node, named)
    gates = _gate_matrix(node, named["attention"])
    if gates.shape:
        nodes.images = int(gates.shape[0])
    scale = _output_scale(nodes, named.get("row_scale"))
    tiles, planes, _, _, tile = spectrum.values.shape
    names = "out_channels in_channels heads filter_at spatial_at channel_at taps".split()
    height, width = node.attrs["kernel_size"]
    sizes = AssemblySizes(
        **{name: int(node.attrs[name]) for name in names}, kernel_height=height, kernel_width=width,
        scaled=scale is not None, planes=planes, tiles=tiles, width=tile,
        wide_groups=spectrum.groups.itemsize > 1,
    )  # fmt: skip
    half = _wants_half(node)
    rows = _rows(nodes, sizes, spectrum, gates)
    weight = _columns(nodes, sizes, rows, gates, named, scale, half)
    if node.attrs["by_rows"]:
        _convolve_once(nodes, node, weight)
    else:
        _stand_for(nodes, node, weight, half)


def _spectrum(node: gs.Node, named: Named) -> KernelSpectrum:
    """The constant spectrum, read back and laid out for the kernels."""
    slots = np.array(node.attrs["row_frequencies"])
    columns = np.array(node.attrs["column_frequencies"])
    rows = int(node.attrs["out_channels"] * node.attrs["kernel_size"][0])
    stored = _values(named["spectrum"])  # ([P,] F, 2, fm·slots)
    values = stored.reshape(-1, *stored.shape[-3:-1], stored.shape[-1] // len(slots), len(slots))
    groups = _values(named["patterns"])[_values(named["blocks"])].reshape(len(values), -1)
    if groups.shape[1] != len(columns) * len(slots):
        raise _unknown(node.name)
    return kernel_spectrum(*unfold_spectrum(rows, slots, columns, values, groups))


def _gate_matrix(node: gs.Node, attention: gs.Tensor) -> gs.Tensor:
    """All attentions ``(B, heads)``, of which the kernel attentions are the first columns."""
    producer = producer_of(attention)
    if producer is not None and producer.op == "Split":
        return producer.inputs[0]
    if max(node.attrs[f"{gate}_at"] for gate in ("filter", "spatial", "channel")) >= 0:
        raise _unknown(node.name)
    return attention


def _output_scale(nodes: Nodes, row_scale: gs.Tensor | None) -> gs.Constant | None:
    """A following BatchNorm's scale ``(O,)``, alone or multiplied with the filter attention."""
    producer = None if row_scale is None else producer_of(row_scale)
    scale = producer.inputs[1] if producer is not None and producer.op == "Mul" else row_scale
    if not isinstance(scale, gs.Constant):
        return None
    return nodes.constant("output_scale.row", scale.values.reshape(-1))


def _wants_half(node: gs.Node) -> bool:
    """Whether everything that reads the kernels casts them to float16 first."""
    waiting, half = list(node.outputs[0].outputs), []
    while waiting:
        reader = waiting.pop()
        if reader.op in ("Split", "Reshape", "Transpose"):
            waiting += [n for t in reader.outputs for n in t.outputs]
        else:
            half.append(reader.op == "Cast" and reader.attrs["to"] == FLOAT16)
    return bool(half) and all(half)


def _rows(
    nodes: Nodes, sizes: AssemblySizes, spectrum: KernelSpectrum, gates: gs.Tensor
) -> gs.Variable:
    transform = transform_of(sizes.rows)
    flat = spectrum.groups.reshape(-1)
    packed = flat
    if not sizes.wide_groups:
        # TensorRT hands plugins no bytes: four of them to an int32, as they lie in memory.
        packed = np.pad(flat, (0, -len(flat) % 4)).view("<i4")
    name = rows_name(sizes.wide_groups)
    nodes.functions[name] = rows_function(sizes.wide_groups)
    row_blocks, _, columns, row_block = half_shape(sizes)
    batch, rows = nodes.images, sizes.rows
    attributes = {} if sizes.wide_groups else {"bins": [len(flat)]}
    return _plugin_node(
        nodes, name, "assembly.rows",
        [gates, nodes.constant("spectrum.tiles", spectrum.values),
         nodes.constant("groups.tiles", packed.astype(np.int32)),
         nodes.constant(f"roots{rows}", root_table(rows, transform))],
        sizes=[*sizes.numbers(), batch],
        weights_shape=[batch, sizes.tiles, sizes.planes, 1, rows, sizes.width],
        matrix_shape=[batch, 2 * rows, columns],
        rows=[rows],
        odd=[1 if transform is None else transform.odd],
        power=[rows if transform is None else transform.power],
        parts_shape=[batch, 2, rows, columns],
        pads=[0, 0, 0, 0, 0, 0, row_blocks * row_block - rows, 0],
        blocks_shape=[batch, 2, row_blocks, row_block, columns],
        **attributes,
    )  # fmt: skip


def _columns(
    nodes: Nodes,
    sizes: AssemblySizes,
    half_spectra: gs.Tensor,
    gates: gs.Tensor,
    named: Named,
    scale: gs.Constant | None,
    half: bool,
) -> gs.Variable:
    out, ins, (height, width) = sizes.out_channels, sizes.in_channels, sizes.kernel_size
    batch, rows, columns = nodes.images, sizes.rows, sizes.columns
    frequencies = columns // 2 + 1
    row_blocks, _, stored, row_block = half_shape(sizes)
    transform = transform_of(rows)
    odd, power = (1, rows) if transform is None else (transform.odd, transform.power)
    form = ColumnForm(
        sizes.taps, sizes.filter_at >= 0, sizes.spatial_at >= 0, sizes.channel_at >= 0,
        sizes.scaled, half,
    )  # fmt: skip
    attributes: dict[str, list[int]] = {}
    # A pointer that a kernel never follows may point anywhere.
    average = local_weight = gates
    if sizes.taps:
        average = named["local_input"]
        stored_weight = _values(named["local_weight"])
        window = width * sizes.taps
        order = [(width - 1 - p % width) * sizes.taps + p // width for p in range(window)]
        plain = np.empty_like(stored_weight)
        plain[:, order] = stored_weight
        local_weight = nodes.constant("local.weight.rows", plain)
        attributes["taps_shape"] = [rows * width, sizes.taps]
        attributes["logits_shape"] = [batch, out, height, width, ins]
        attributes |= {f"window{t}_end": [t + ins] for t in range(sizes.taps)}
    for gate, start, length, shape in (
        ("filter", sizes.filter_at, out, [batch, out, 1, 1, 1]),
        ("spatial", sizes.spatial_at, height * width, [batch, 1, height, 1, width]),
        ("channel", sizes.channel_at, ins, [batch, 1, 1, ins, 1]),
    ):
        if start >= 0:
            attributes[f"{gate}_start"], attributes[f"{gate}_end"] = [start], [start + length]
            attributes[f"{gate}_shape"] = shape
    if scale is not None:
        attributes["scale_shape"] = [1, out, 1, 1, 1]
    nodes.functions[form.name] = columns_function(form)
    table = root_table(columns, column_transform(columns, width))
    return _plugin_node(
        nodes, form.name, "assembly.columns",
        [half_spectra, gates, nodes.constant(f"roots{columns}.columns{width}", table),
         average, local_weight, gates if scale is None else scale],
        sizes=[*sizes.numbers(), batch],
        rows_shape=[batch, row_blocks * row_block, 2, stored],
        used=[rows, frequencies],
        pairs_shape=[batch, rows, 2 * frequencies],
        columns=[columns],
        frequencies=[frequencies],
        order_shape=[batch, odd, power, columns],
        interleaved_shape=[batch, out, height, ins, width],
        weight_shape=[batch * out, ins, height, width],
        **attributes,
    )  # fmt: skip


def _convolve_once(nodes: Nodes, node: gs.Node, weight: gs.Variable) -> None:
    """Convolve with whole kernels, as GPUs do best, in place of the sum over kernel rows."""
    given = node.attrs
    found: dict[int, gs.Node] = {}
    waiting = [(0, reader) for reader in node.outputs[0].outputs]
    while waiting:
        row, reader = waiting.pop()
        if reader.op == "Conv":
            found[row] = reader
        elif reader.op in ("Split", "Reshape", "Cast"):
            waiting += [(row + i, n) for i, t in enumerate(reader.outputs) for n in t.outputs]
    convolutions = [found[row] for row in sorted(found)]
    if not convolutions:
        raise _unknown(node.name)
    bias = [conv.inputs[2] for conv in convolutions if len(conv.inputs) > 2]
    output = convolutions[0].outputs[0]
    for conv in convolutions[1:]:
        (reader,) = conv.outputs[0].outputs
        if reader.op != "Add" or not any(t is output for t in reader.inputs):
            raise _unknown(conv.name)
        output = reader.outputs[0]
    result = nodes(
        "Conv", "whole", _whole_input(given, min(found), convolutions[0]), weight, *bias,
        kernel_shape=given["kernel_size"], group=convolutions[0].attrs["group"],
        **{name: given[name] for name in ("strides", "pads", "dilations")},
    )  # fmt: skip
    take_over(output, result)
    node.outputs.clear()
    node.inputs.clear()


def _whole_input(given: dict[str, Any], row: int, conv: gs.Node) -> gs.Tensor:
    """The convolution's input, of which a kernel row's convolution may see a slice."""
    height, top, bottom = given["input_size"][0], given["pads"][0], given["pads"][2]
    stride, dilation = given["strides"][0], given["dilations"][0]
    reach = dilation * (given["kernel_size"][0] - 1) + 1
    first, last = rows_met(
        row, top, stride, dilation, (height + top + bottom - reach) // stride + 1
    )
    if first <= 0 and last >= height - 1:
        return conv.inputs[0]
    producer = producer_of(conv.inputs[0])
    if producer is None or producer.op != "Slice":
        raise _unknown(conv.name)
    return producer.inputs[0]


def _replace_bands(nodes: Nodes, node: gs.Node, named: Named) -> None:
    """Write a layer's band modulation anew; in float16 where its input is that, cast."""
    groups, softmax, (height, width) = (
        node.attrs[name] for name in ("groups", "softmax", "feature_size")
    )
    parts = 2 if node.attrs["complex_rows"] else 1
    weight = _plain_weight(_values(named["conv_weight"]), groups)
    weighted, channels = len(weight) // groups, weight.shape[1] * groups
    bands = sum(name.startswith("from_rows") for name in named)
    terms = bands + 1
    x, half = _input(named["x"])
    gain = math.sqrt(width) if half else 1.0
    kind = np.float16 if half else np.float32

    def constant(name: str, values: NDArray[Any]) -> gs.Constant:
        return nodes.constant(name, values.astype(kind))

    pad = weight.shape[-1] // 2
    logits = nodes(
        "Conv", "bands.logits", x, constant("bands.conv.kernel", weight),
        constant("bands.conv.shift", _values(named["conv_bias"])), group=groups, pads=[pad] * 4,
        kernel_shape=list(weight.shape[2:]),
    )  # fmt: skip
    if softmax:
        shape = nodes.batch, groups, weighted, height * width
        logits = nodes("Softmax", "bands.softmax", nodes.reshape("bands.groups", logits, *shape),
                       axis=1)  # fmt: skip
        shape = nodes.batch, groups * weighted, height, width
        logits = nodes.reshape("bands.maps", logits, *shape)

    # Half precision has no room for a sum over a whole image: √W off on the way there.
    lows = []
    left = constant("bands.to_columns", _values(named["to_columns"]) / gain)
    projected = nodes("MatMul", "bands.projected", x, left)
    projected = nodes.reshape("bands.rows", projected, nodes.batch, channels, height * parts, -1)
    rows = constant("bands.to_rows", _values(named["to_rows"]))
    coefficients = nodes("MatMul", "bands.coefficients", rows, projected)
    for band in range(bands):
        from_rows = _values(named[f"from_rows{band}"])
        from_columns = _values(named[f"from_columns{band}"])
        name = f"bands.{band}"
        kept = nodes(
            "Slice", f"{name}.kept", coefficients, nodes.shape(0, 0),
            nodes.shape(from_rows.shape[1], from_columns.shape[0] // parts),
            nodes.shape(2, 3),
        )  # fmt: skip
        back = nodes("MatMul", f"{name}.back", constant(f"{name}.from_rows", from_rows), kept)
        back = nodes.reshape(f"{name}.image_rows", back, nodes.batch, channels, height, -1)
        right = constant(f"{name}.from_columns", from_columns * gain)
        low = nodes("MatMul", f"{name}.low", back, right)
        lows.append(nodes.reshape(f"{name}.term", low, 1, nodes.batch, channels, height, width))
    stacked = nodes("Concat", "bands.lows", *lows, axis=0) if bands > 1 else lows[0]

    # One set of factors is given for all groups.
    factors, shifts = (
        np.tile(_values(named[name]).reshape(terms, -1), (groups, 1))
        for name in ("mix", "mix_bias")
    )
    pixels = height * width
    name = combination_name(not softmax, half)
    nodes.functions[name] = combination_function(not softmax, half)
    total = _plugin_node(
        nodes, name, "bands.combination",
        [x, logits, nodes.constant("bands.factors", factors),
         nodes.constant("bands.shifts", shifts.reshape(-1)), stacked],
        sizes=[channels, height, width, groups, weighted, terms, nodes.batch],
        maps_shape=[nodes.batch, groups, weighted, pixels],
        mix_shape=[groups, terms, weighted],
        mix_bias_shape=[groups, terms, 1],
        factors_shape=[nodes.batch, groups, terms, 1, pixels],
        terms_shape=[terms, nodes.batch, groups, channels // groups, pixels],
        feature_shape=[nodes.batch, channels, height, width],
    )  # fmt: skip
    _stand_for(nodes, node, total, half)


def _plain_weight(transposed: NDArray[Any], groups: int) -> NDArray[Any]:
    """The weight ``(groups·weighted, I/groups, s, s)`` of an equal plain convolution."""
    grouped = transposed.reshape(groups, -1, *transposed.shape[1:])
    turned = grouped.transpose(0, 2, 1, 3, 4)[..., ::-1, ::-1]
    return np.ascontiguousarray(turned.reshape(-1, *turned.shape[2:]))


def _input(x: gs.Tensor) -> tuple[gs.Tensor, bool]:
    """The input, and whether it is float16 (then before its cast to float32)."""
    producer = producer_of(x)
    if producer is not None and producer.op == "Cast" and producer.attrs["to"] == FLOAT32:
        return producer.inputs[0], True
    return x, False
