"""A captured network and its folded layers -> one complete ONNX model."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto
from torch import nn

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.layers import Nodes, take_over, write_layer
from fdconv_deploy.export.passes import fold_batch_norms, move_reshapes, split_means
from fdconv_deploy.export.torch_export import PLACEHOLDER
from fdconv_deploy.folding.layer import fold_layer
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.profiling import label_nodes


def build_graph(
    captured: ModelProto,
    network: nn.Module,
    sizes: Mapping[str, tuple[int, int]],
    batch: int,
) -> tuple[ModelProto, dict[str, str]]:
    """Write the folded layers in place of a captured graph's placeholders.

    Args:
        captured: from `fdconv_deploy.export.torch_export.capture`.
        network: the network it was captured from.
        sizes: height and width of each FDConv layer's input, see `input_sizes`.
        batch: the graph's batch size.

    Returns:
        The model, and what its layers' group maps hash to.
    """
    layers = dynamic_layers(network)
    graph = gs.import_onnx(captured)
    affines = fold_batch_norms(graph)
    nodes = Nodes(graph, batch)
    group_maps: dict[str, str] = {}
    for node in [node for node in graph.nodes if node.op == PLACEHOLDER]:
        name, (output,) = node.attrs["layer"], node.outputs
        scale, shift = affines.get(output.name, (None, None))
        # Anew for each use: what follows may differ. Equal constants are stored once.
        folded = fold_layer(layers[name], sizes[name], name=name, scale=scale, shift=shift)
        if folded.spectrum is not None:
            group_maps[name] = folded.spectrum.group_map_sha256
        take_over(output, write_layer(nodes, folded, node.inputs[0]))
    split_means(graph)
    if batch > 1:
        move_reshapes(graph, nodes)
    model = nodes.model()
    del model.metadata_props[:], model.graph.metadata_props[:]
    model.doc_string = ""
    others = {node.domain for node in model.graph.node} - {"", DOMAIN}
    if others:
        raise ExportError(
            f"the exported graph uses operators outside ONNX and {DOMAIN!r}: {sorted(others)}. "
            "Replace the module they come from."
        )
    return model, group_maps


def number_values(model: ModelProto, network: nn.Module) -> None:
    """Number the values of a further input size's graph; those of the first have names.

    Names would be a third of the graph's file, which is to be small beside the weights. Inputs,
    outputs and constants of plain modules, by which nodes are known to be a module's, keep theirs.
    """
    graph = model.graph
    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return  # what a branch reads, it reads by name
    constants = {tensor.name for tensor in graph.initializer}
    kept = {value.name for value in (*graph.input, *graph.output)}
    for node, label in zip(graph.node, label_nodes(model, dynamic_layers(network)), strict=True):
        if label.layer is None:
            kept |= constants.intersection(node.input)
    names = {name: name for name in ("", *kept)}

    def number(name: str) -> str:
        return names.setdefault(name, f"v.{len(names)}")

    for node in graph.node:
        node.input[:], node.output[:] = map(number, node.input), map(number, node.output)
    for value in (*graph.value_info, *graph.initializer):
        value.name = number(value.name)


def check_one_file(model: ModelProto, instead: str) -> None:
    """Refuse a model that is too large for one file of protobuf, which is not always said later.

    protobuf's Python writes more than its own parsers read. Data that lies outside counts, too.

    Args:
        model: its external data loaded or not.
        instead: a sentence with what to do.

    Raises:
        ExportError: it is larger than 2 GB.
    """
    outside = sum(
        int(entry.value)
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "length"
    )
    size, limit = model.ByteSize() + outside, onnx.checker.MAXIMUM_PROTOBUF
    if size > limit:
        raise ExportError(
            f"the network takes {size / 1e9:.1f} GB, and one .onnx file holds {limit / 1e9:.1f} GB."
            f" {instead}"
        )


def check_model(path: str) -> None:
    """ONNX's full check of a written model, shapes and function bodies included.

    Raises:
        ExportError: with what the checker says.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
