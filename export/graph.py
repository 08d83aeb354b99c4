"""A captured network and its folded layers -> one complete ONNX model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto, helper
from torch import nn

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.layers import Nodes, write_layer
from fdconv_deploy.export.passes.batch_norm import fold_batch_norms
from fdconv_deploy.export.passes.late_reshapes import move_reshapes
from fdconv_deploy.export.passes.means import split_means
from fdconv_deploy.export.torch_export import PLACEHOLDER
from fdconv_deploy.folding.layer import fold_layer
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.ops import DOMAIN, DOMAIN_VERSION, OPSET
from fdconv_deploy.ops.function_body import functions_checked
from fdconv_deploy.profiling import label_nodes
from fdconv_deploy.version import __version__

# Of the ONNX file format: 8 brought functions, 10 is what torch's exporter writes.
IR_VERSION = 10


@dataclass(frozen=True)
class StaticGraph:
    """A model for one batch size, and what its layers' group maps hash to."""

    model: ModelProto
    group_maps: dict[str, str]


def build_graph(
    captured: ModelProto,
    network: nn.Module,
    sizes: Mapping[str, tuple[int, int]],
    batch: int,
) -> StaticGraph:
    """Write the folded layers in place of a captured graph's placeholders.

    Args:
        captured: from `fdconv_deploy.export.torch_export.capture`.
        network: the network it was captured from.
        sizes: height and width of each FDConv layer's input, see `input_sizes`.
        batch: the graph's batch size.
    """
    layers = dynamic_layers(network)
    graph = gs.import_onnx(captured)
    affines = fold_batch_norms(graph)
    nodes = Nodes(graph, batch)
    group_maps: dict[str, str] = {}
    placeholders = [node for node in graph.nodes if node.op == PLACEHOLDER]
    for node in placeholders:
        name, output = node.attrs["layer"], node.outputs[0]
        affine = affines.get(output.name)
        # Anew for each use: what follows may differ. Equal constants are stored once.
        folded = fold_layer(
            layers[name],
            sizes[name],
            name=name,
            scale=None if affine is None else affine.scale,
            shift=None if affine is None else affine.shift,
        )
        if folded.spectrum is not None:
            group_maps[name] = folded.spectrum.group_map_sha256
        result = write_layer(nodes, folded, node.inputs[0])
        node.outputs.clear()
        node.inputs.clear()
        _take_over(output, result)
    split_means(graph)
    if batch > 1:
        move_reshapes(graph, nodes)
    graph.cleanup().toposort()
    model = gs.export_onnx(graph)
    _finish(model, nodes)
    return StaticGraph(model, group_maps)


def _take_over(old: gs.Variable, new: gs.Variable) -> None:
    """Let ``new``'s producer produce ``old``, with its name, shape and readers."""
    producer = new.inputs[0]
    producer.outputs[producer.outputs.index(new)] = old


def _finish(model: ModelProto, nodes: Nodes) -> None:
    model.functions.extend(functions_checked(list(nodes.functions.values())))
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", OPSET))
    model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    model.ir_version = IR_VERSION
    model.producer_name = "fdconv-deploy"
    model.producer_version = __version__
    model.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    domains = {node.domain for node in model.graph.node}
    if not domains <= {"", DOMAIN}:
        raise ExportError(
            f"the exported graph uses operators outside ONNX and {DOMAIN!r}: "
            f"{sorted(domains - {'', DOMAIN})}. Replace the module they come from."
        )


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
