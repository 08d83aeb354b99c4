"""A bundle's graph -> the variant whose FDConv layers ask TensorRT for plugins.

Frequency assembly becomes two nodes, one for each GPU kernel, and band modulation a few matrix
products and one. Each node names a plugin and carries a function of standard operators that means
the same, so the variant is a whole ONNX model, too. It is made from the exported graph alone:
any bundle will do, and what the engine computes is what the bundle holds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs
from fdconv_deploy.export.layers.nodes import Nodes
from fdconv_deploy.export.tensorrt.plugin_bands import replace_bands
from fdconv_deploy.export.tensorrt.plugin_pass import replace_assembly
from onnx import ModelProto, helper

from fdconv_deploy.errors import ExportError
from fdconv_deploy.ops import DOMAIN, DOMAIN_VERSION
from fdconv_deploy.ops.function_body import functions_checked


@dataclass(frozen=True)
class PluginGraph:
    """The variant, and how many nodes ask for each plugin."""

    model: ModelProto
    plugins: dict[str, int] = field(default_factory=dict)


def ask_for_plugins(model: ModelProto) -> PluginGraph:
    """The plugin variant of a bundle's graph; ``model`` holds its data and is not changed.

    Raises:
        ExportError: an FDConv node is not as this version writes it.
    """
    graph = gs.import_onnx(model)
    nodes = Nodes(graph, graph.inputs[0].shape[0])
    for node in [n for n in graph.nodes if n.domain == DOMAIN]:
        layer, _, part = node.name.rpartition(".")
        nodes.begin(f"{layer}.plugin")  # not to meet the names of what stays
        if part == "assembly" and node.op.startswith("FrequencyAssembly"):
            replace_assembly(nodes, node)
        elif part == "bands" and node.op.startswith("FrequencyBandModulation"):
            replace_bands(nodes, node)
        else:
            raise ExportError(
                f"the graph holds an operator {node.op!r} ({node.name}) that this version does "
                "not know. Export the bundle again, or build with --plugins off."
            )
    graph.functions.clear()
    graph.cleanup().toposort()
    result = gs.export_onnx(graph)
    del result.graph.value_info[:]  # some are float16 now; whoever reads the graph infers them
    del result.functions[:]
    result.functions.extend(functions_checked(list(nodes.functions.values())))
    del result.opset_import[:]
    result.opset_import.extend(o for o in model.opset_import if o.domain != DOMAIN)
    result.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    result.ir_version = model.ir_version
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    counts = Counter(node.op_type for node in result.graph.node if node.domain == DOMAIN)
    return PluginGraph(result, dict(sorted(counts.items())))
