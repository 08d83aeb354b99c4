"""A graph of standard operators in another version of the ONNX operator set.

ONNX's own converter goes up. Down, it has no adapter for ``Split`` and others, and those operators
that exported graphs have are written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fdconv_deploy.errors import ExportError

# Below it, ``Softmax``, ``Squeeze`` and others mean or take something else.
OLDEST = 13
# Operators that not every version can hold: the versions from the one since which the defaults mean
# what they mean now, to the last that ONNX Runtime has a kernel of.
_RANGES = {"RoiAlign": (16, 21)}


def set_opset(model: ModelProto, opset: int) -> ModelProto:
    """The model in version ``opset`` of the standard operators.

    Args:
        model: without functions, its shapes inferred; may be changed.
        opset: from `OLDEST` to the newest that the installed ``onnx`` knows.

    Raises:
        ExportError: there is no such version, or an operator of the graph is not in it.
    """
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= opset <= newest:
        raise ExportError(
            f"the opset is {OLDEST} to {newest} (the newest that onnx {onnx.__version__} knows), "
            f"not {opset}."
        )
    for node in model.graph.node:
        first, last = _RANGES.get(node.op_type, (opset, opset))
        if not first <= opset <= last:
            raise ExportError(
                f"the graph's {node.op_type} {node.name!r} cannot be written in opset {opset}: it "
                f"meant something else before {first}, and ONNX Runtime runs none newer than "
                f"{last}. Choose an opset from {first} to {last}."
            )
    standard = next(entry for entry in model.opset_import if not entry.domain)
    if opset > standard.version:
        try:
            model = onnx.version_converter.convert_version(model, opset)
        except RuntimeError as error:
            raise ExportError(
                f"onnx cannot convert this graph to opset {opset}: {error}. Choose an opset nearer "
                f"to {standard.version}."
            ) from error
    elif opset < standard.version:
        _lower(model, standard.version, opset)
        standard.version = opset
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    return model


def _lower(model: ModelProto, current: int, opset: int) -> None:
    graph = model.graph
    values = [*graph.value_info, *graph.input, *graph.output]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        _refuse(node, current, opset)
        if node.op_type == "Split" and "num_outputs" in attributes and opset < 18:
            axis = helper.get_node_attr_value(node, "axis") if "axis" in attributes else 0
            sizes = np.array([shapes[output][axis] for output in node.output], np.int64)
            graph.initializer.append(numpy_helper.from_array(sizes, f"{node.output[0]}.split"))
            node.input.append(f"{node.output[0]}.split")
            node.attribute.remove(attributes["num_outputs"])
        elif node.op_type == "LayerNormalization" and opset < 17:
            nodes += _layer_normalization(node, graph.initializer, opset)
            continue
        _reduced_axes(node, constants, opset)
        known = onnx.defs.get_schema(node.op_type, opset).attributes
        defaults = onnx.defs.get_schema(node.op_type, current).attributes
        for name, attribute in attributes.items():
            if name in known or attribute not in node.attribute:
                continue
            harmless = name == "allowzero" and _no_zeros(constants.get(node.input[1]))
            if attribute != defaults[name].default_value and not harmless:
                raise _not_in(node, opset, f"its {name} is {helper.get_attribute_value(attribute)}")
            node.attribute.remove(attribute)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input} | {
        output.name for output in graph.output
    }
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)  # axes that became attributes


def _no_zeros(shape: TensorProto | None) -> bool:
    """Whether a Reshape's constant shape has no zero, so that what a zero means is no matter."""
    return shape is not None and bool(numpy_helper.to_array(shape).all())


def _refuse(node: NodeProto, current: int, opset: int) -> None:
    """Refuse an operator that has no form in an older version."""
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        raise _not_in(node, opset, "it holds a graph of its own")
    if onnx.defs.has(node.op_type, opset) or node.op_type == "LayerNormalization":
        return
    since = onnx.defs.get_schema(node.op_type, current).since_version
    raise _not_in(node, opset, f"it came with opset {since}")


def _not_in(node: NodeProto, opset: int, why: str) -> ExportError:
    return ExportError(
        f"the graph's {node.op_type} {node.name!r} cannot be written in opset {opset}: {why}. "
        "Choose a newer one."
    )


def _reduced_axes(node: NodeProto, constants: dict[str, TensorProto], opset: int) -> None:
    """Axes of a reduction as an attribute, where the version has them so."""
    schema = onnx.defs.get_schema(node.op_type, opset)
    if len(node.input) != 2 or len(schema.inputs) != 1 or "axes" not in schema.attributes:
        return
    axes = numpy_helper.to_array(constants[node.input.pop()])
    node.attribute.append(helper.make_attribute("axes", axes.tolist()))


def _layer_normalization(
    node: NodeProto, initializers: list[TensorProto], opset: int
) -> Iterator[NodeProto]:
    """The operator by those it is defined by."""
    x, scale, *bias = node.input
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    stem = node.output[0]
    if given.get("axis", -1) != -1 or len(node.output) > 1:
        raise _not_in(node, opset, "it normalises over several axes, or gives its mean")
    epsilon = numpy_helper.from_array(
        np.array(given.get("epsilon", 1e-5), np.float32), f"{stem}.epsilon"
    )
    initializers.append(epsilon)
    last = stem if not bias else f"{stem}.scaled"
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("ReduceMean", [x], f"{stem}.mean", {"axes": [-1]}),
        ("Sub", [x, f"{stem}.mean"], f"{stem}.centred", {}),
        ("Mul", [f"{stem}.centred"] * 2, f"{stem}.squared", {}),
        ("ReduceMean", [f"{stem}.squared"], f"{stem}.variance", {"axes": [-1]}),
        ("Add", [f"{stem}.variance", epsilon.name], f"{stem}.above_zero", {}),
        ("Sqrt", [f"{stem}.above_zero"], f"{stem}.deviation", {}),
        ("Div", [f"{stem}.centred", f"{stem}.deviation"], f"{stem}.normalised", {}),
        ("Mul", [f"{stem}.normalised", scale], last, {}),
        *([("Add", [last, *bias], stem, {})] if bias else []),
    ]
    for operator, inputs, output, attributes in steps:
        yield helper.make_node(operator, inputs, [output], name=output, **attributes)
