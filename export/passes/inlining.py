"""The ``fdconv`` functions written out, so that a graph has standard operators and no functions."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
from onnx import ModelProto, NodeProto, helper, numpy_helper

from fdconv_deploy.ops import DOMAIN

# Forms of a Constant other than a tensor, and the type of each.
_VALUES = {
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_float": np.float32,
    "value_floats": np.float32,
}


def inline_functions(model: ModelProto) -> ModelProto:
    """Write every ``fdconv`` node out as its function's body.

    Each node of a body is named after the node it stands for. Constants of bodies become
    initializers: TVM and MNN read no ``Constant`` whose value is a list of integers.

    Args:
        model: left as it is; its external data need not be loaded.
    """
    inlined = onnx.inliner.inline_local_functions(model)
    for domain in [found for found in inlined.opset_import if found.domain == DOMAIN]:
        inlined.opset_import.remove(domain)
    _name_bodies(model, inlined)
    nodes = []
    for node in inlined.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name in (*_VALUES, "value"):
            inlined.graph.initializer.append(_tensor(node))
        else:
            nodes.append(node)
    del inlined.graph.node[:]
    inlined.graph.node.extend(nodes)
    return inlined


def _name_bodies(model: ModelProto, inlined: ModelProto) -> None:
    """Name the nodes of bodies: a body lies where its node was, and ends in that node's output."""
    nodes = iter(inlined.graph.node)
    for original in model.graph.node:
        node = next(nodes)
        if original.domain != DOMAIN:
            continue
        while True:
            node.name = f"{original.name}.{node.output[0]}"
            if original.output[0] in node.output:
                break
            node = next(nodes)


def _tensor(constant: NodeProto) -> onnx.TensorProto:
    (value,) = constant.attribute
    if value.name == "value":
        tensor = onnx.TensorProto()
        tensor.CopyFrom(value.t)
        tensor.name = constant.output[0]
        return tensor
    values = np.asarray(helper.get_attribute_value(value), _VALUES[value.name])
    return numpy_helper.from_array(values, constant.output[0])
