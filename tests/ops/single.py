"""One folded layer as a graph whose ``fdconv`` nodes show what goes in and comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from fdconv_deploy.export.layers import Nodes, write_layer
from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.ops import DOMAIN, DOMAIN_VERSION, OPSET
from fdconv_deploy.ops.function_body import functions_checked

Arrays = dict[str, NDArray]


def layer_model(folded: FoldedConv, batch: int) -> ModelProto:
    """Input ``x``, output ``y``, and every tensor between that an ``fdconv`` node touches."""
    shape: tuple[int, ...] = (batch, folded.in_channels, *folded.input_size)
    output_shape: tuple[int, ...] = (batch, folded.out_channels, *folded.output_size)
    if folded.tokens:
        shape = batch, folded.input_size[0], folded.in_channels
        output_shape = batch, folded.input_size[0], folded.out_channels
    x = gs.Variable("x", np.float32, shape)
    graph = gs.Graph(inputs=[x], opset=OPSET)
    nodes = Nodes(graph, batch)
    y = write_layer(nodes, folded, x)
    y.name, y.shape = "y", output_shape
    shown: dict[int, gs.Tensor] = {}
    for node in graph.nodes:
        if node.domain == DOMAIN:
            function = nodes.functions[node.op]
            names = *function.input, *function.output
            named = zip(names, (*node.inputs, *node.outputs), strict=True)
            for name, tensor in named:
                if isinstance(tensor, gs.Variable) and tensor is not x:
                    rank = 2 if name in ("attention", "local_input") else 4
                    tensor.shape = [f"{tensor.name}.{axis}" for axis in range(rank)]
                    shown[id(tensor)] = tensor
    graph.outputs = [y, *shown.values()]
    model = gs.export_onnx(graph.toposort())
    model.functions.extend(functions_checked(list(nodes.functions.values())))
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", OPSET))
    model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    model.ir_version = 10
    return model


def run(model: ModelProto, x: NDArray, library: Path | None = None, threads: int = 0) -> Arrays:
    """All outputs by name, in stock ONNX Runtime, or with a library of custom operators."""
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def refusal(model: ModelProto, x: NDArray, library: Path) -> str:
    """What a library says of a model that it refuses, when it is loaded or run."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    with pytest.raises(Exception, match="the native operator") as caught:
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        ).run(None, {"x": x})
    return str(caught.value)


def cut_constant(model: ModelProto, name: str, axis: int, kept: slice) -> None:
    """Shorten an initializer along an axis."""
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    places = np.arange(tensor.dims[axis])[kept]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).take(places, axis), name))


def fdconv_node(model: ModelProto, name: str) -> onnx.NodeProto:
    """The one node of an operator, whatever its form."""
    (node,) = [n for n in model.graph.node if n.domain == DOMAIN and n.op_type.startswith(name)]
    return node


def inputs_of(model: ModelProto, node: onnx.NodeProto, values: Arrays) -> Arrays:
    """A node's inputs by the names its function gives them."""
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    (function,) = [f for f in model.functions if f.name == node.op_type]
    known = constants | values
    return {ours: known[theirs] for ours, theirs in zip(function.input, node.input, strict=True)}
