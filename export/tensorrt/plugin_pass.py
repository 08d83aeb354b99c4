"""Frequency assembly as two plugin nodes, one for each GPU kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from fdconv_deploy.export.layers.nodes import Nodes
from fdconv_deploy.export.tensorrt.plugin_convolution import kernel_shape, whole_convolution
from fdconv_deploy.export.tensorrt.plugin_nodes import (
    FLOAT16,
    ancestors,
    constant_of,
    plugin_node,
    take_over,
    unknown,
)
from fdconv_deploy.export.tensorrt.plugin_spectrum import stored_spectrum

from fdconv_deploy.ops.frequency_assembly.kernel_launch import AssemblySizes, half_shape
from fdconv_deploy.ops.frequency_assembly.launch import (
    KernelSpectrum,
    column_transform,
    kernel_spectrum,
    root_table,
    transform_of,
)
from fdconv_deploy.ops.frequency_assembly.plugin_function import (
    ColumnForm,
    columns_function,
    rows_function,
    rows_name,
)


@dataclass
class _Gates:
    """All gates of the kernel in one matrix ``(B, heads)``; -1: there is none."""

    matrix: gs.Tensor
    heads: int
    filter_at: int = -1
    spatial_at: int = -1
    channel_at: int = -1


def replace_assembly(nodes: Nodes, node: gs.Node) -> None:
    """Write a layer's kernel assembly anew, and its convolution as one if it was by rows."""
    _, out, ins, height, width = kernel_shape(node)
    named = _named_inputs(node)
    spectrum = kernel_spectrum(stored_spectrum(node, named))  # type: ignore[arg-type]
    gates, scale = _gates(nodes, node, named, out, ins, (height, width))
    tiles, planes, _, _, tile = spectrum.values.shape
    local = named.get("local_weight")
    taps = constant_of(local).shape[1] // width if local is not None else 0
    sizes = AssemblySizes(
        out, ins, (height, width), gates.heads, gates.filter_at, gates.spatial_at,
        gates.channel_at, taps, scale is not None, planes, tiles, tile,
        spectrum.groups.itemsize > 1,
    )  # fmt: skip
    half = _wants_half(node)
    rows = _rows(nodes, sizes, spectrum, gates)
    weight = _columns(nodes, sizes, rows, gates, named, scale, half)
    if "_ByRows" in node.op:
        whole_convolution(nodes, node, weight, sizes.kernel_size)
    else:
        take_over(nodes, node, weight, half)


def _named_inputs(node: gs.Node) -> dict[str, gs.Tensor]:
    """Inputs by `AssemblyForm.inputs`' names, told by attributes and the operator's name."""
    count = {
        kind: sum(name.startswith(f"{kind}_stage") for name in node.attrs)
        for kind in ("column", "row")
    }
    names = ["attention", "spectrum", "patterns", "blocks"]
    names += [f"column_stage{i}" for i in range(count["column"])]
    names += [f"row_stage{i}" for i in range(count["row"])] + ["row_outer"]
    if "_NoLocal" not in node.op:
        names += ["local_input", "local_window", "local_weight"]
    names += [n for n, no in (("column_scale", "_NoColumnScale"), ("row_scale", "_NoRowScale"))
              if no not in node.op]  # fmt: skip
    if len(names) != len(node.inputs):
        raise unknown(node.name)
    return dict(zip(names, node.inputs, strict=True))


def _gates(
    nodes: Nodes,
    node: gs.Node,
    named: dict[str, gs.Tensor],
    out: int,
    ins: int,
    kernel: tuple[int, int],
) -> tuple[_Gates, gs.Constant | None]:
    """The gates that scale kernels, and a following BatchNorm's scale ``(O,)``."""
    prefix = node.name.removesuffix("assembly")
    found: dict[str, gs.Tensor] = {"kernel": named["attention"]}
    maps = {"filter.map": "filter", "spatial.column": "spatial", "channel.column": "channel"}
    scale = None
    for name in ("row_scale", "column_scale"):
        if name not in named:
            continue
        for tensor in ancestors(named[name], prefix):
            if isinstance(tensor, gs.Constant) and name == "row_scale":
                if tensor.values.dtype == np.float32 and tensor.values.size == out:
                    scale = nodes.constant("output_scale.row", tensor.values.reshape(-1))
                continue
            producer = tensor.inputs[0] if tensor.inputs else None
            gate = maps.get(producer.name.removeprefix(prefix)) if producer is not None else None
            if gate is not None and producer is not None:
                found[gate] = producer.inputs[0]
    groups = int(constant_of(named["patterns"]).max()) + 1
    lengths = {"filter": out, "spatial": kernel[0] * kernel[1], "channel": ins}
    split = found["kernel"].inputs[0] if found["kernel"].inputs else None
    if split is not None and split.op == "Split":
        parts = {id(t): i for i, t in enumerate(split.outputs)}
        if all(id(t) in parts for t in found.values()):
            starts = np.cumsum([0, *constant_of(split.inputs[1]).tolist()]).tolist()
            at = {gate: starts[parts[id(t)]] for gate, t in found.items()}
            return _Gates(split.inputs[0], starts[-1], **_offsets(at)), scale
    if set(found) == {"kernel"}:
        count = found["kernel"].shape[1] if found["kernel"].shape else _heads(found["kernel"])
        return _Gates(found["kernel"], max(int(count), groups)), scale
    raise unknown(f"{node.name}, {sorted(lengths)}")


def _offsets(at: dict[str, int]) -> dict[str, int]:
    return {f"{gate}_at": start for gate, start in at.items() if gate != "kernel"}


def _heads(attention: gs.Tensor) -> int:
    """Columns of the attention matrix: rows of the product that makes it."""
    current = attention
    while current.inputs:
        producer = current.inputs[0]
        if producer.op == "Gemm":
            return int(constant_of(producer.inputs[1]).shape[0])
        if producer.op == "Split":
            lengths = constant_of(producer.inputs[1])
            return int(lengths[[id(t) for t in producer.outputs].index(id(current))])
        current = producer.inputs[0]
    raise unknown(attention.name)


def _wants_half(node: gs.Node) -> bool:
    """Whether everything that reads the kernels casts them to float16 first."""
    readers = node.outputs[0].outputs
    waiting, half = list(readers), []
    while waiting:
        reader = waiting.pop()
        if reader.op in ("Split", "Reshape"):
            waiting += [n for t in reader.outputs for n in t.outputs]
        else:
            half.append(reader.op == "Cast" and reader.attrs["to"] == FLOAT16)
    return bool(half) and all(half)


def _rows(
    nodes: Nodes, sizes: AssemblySizes, spectrum: KernelSpectrum, gates: _Gates
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
    batch, rows = nodes.batch, sizes.rows
    attributes = {} if sizes.wide_groups else {"bins": [len(flat)]}
    return plugin_node(
        nodes, name, "assembly.rows",
        [gates.matrix, nodes.constant("spectrum.tiles", spectrum.values),
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
    gates: _Gates,
    named: dict[str, gs.Tensor],
    scale: gs.Constant | None,
    half: bool,
) -> gs.Variable:
    out, ins, (height, width) = sizes.out_channels, sizes.in_channels, sizes.kernel_size
    batch, rows, columns = nodes.batch, sizes.rows, sizes.columns
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
    average = local_weight = gates.matrix
    if sizes.taps:
        average = named["local_input"]
        stored_weight = constant_of(named["local_weight"])
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
    return plugin_node(
        nodes, form.name, "assembly.columns",
        [half_spectra, gates.matrix, nodes.constant(f"roots{columns}.columns{width}", table),
         average, local_weight, gates.matrix if scale is None else scale],
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
