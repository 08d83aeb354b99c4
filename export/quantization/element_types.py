"""Element types and shapes of every tensor of a model, without copying its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from fdconv_deploy.errors import ExportError

# Shapes and axes are what inference must read; tensors above this are weights.
SMALL_BYTES = 1024


@dataclass(frozen=True)
class TensorType:
    """``element``: a TensorProto type. ``shape``: None where inference did not find it."""

    element: int
    shape: tuple[int, ...] | None


def tensor_types(model: ModelProto) -> dict[str, TensorType]:
    """Types by tensor name, from ONNX's inference through the model's functions.

    Args:
        model: its initializers hold their data or not.

    Raises:
        ExportError: a tensor's element type cannot be inferred.
    """
    light = ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= SMALL_BYTES and tensor.data_type == TensorProto.INT64:
            light.graph.initializer.append(tensor)
        else:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            light.graph.input.append(value)
    # The outputs' types are to be found, not to be believed: a pass may have changed them.
    light.graph.output.extend(onnx.ValueInfoProto(name=o.name) for o in model.graph.output)
    try:
        inferred = onnx.shape_inference.infer_shapes(light, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"the graph's types cannot be inferred: {error}") from error
    found = {t.name: TensorType(t.data_type, tuple(t.dims)) for t in model.graph.initializer}
    graph = inferred.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shape = None
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shape = tuple(d.dim_value for d in kind.shape.dim)
        found[value.name] = TensorType(kind.elem_type, shape)
    for node in model.graph.node:
        for name in filter(None, node.output):
            if name not in found or found[name].element == TensorProto.UNDEFINED:
                raise ExportError(
                    f"the type of {name!r}, which {node.op_type} {node.name!r} gives, cannot be "
                    "inferred, so the graph's precision cannot be changed. Export it in fp32."
                )
    return found


@dataclass(frozen=True)
class Parameter:
    """An operator's input or output: the name of its type, and the types that may be."""

    variable: str
    allowed: frozenset[str]


def signature(node: NodeProto, opset: int) -> tuple[list[Parameter], list[Parameter]]:
    """The parameters of each input and output that a standard node has, by ONNX's schema."""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    constraints = {
        c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints
    }

    def parameters(formal: list, count: int) -> Iterator[Parameter]:
        for place in range(count):
            one = formal[min(place, len(formal) - 1)]  # the last may stand for many
            yield Parameter(one.type_str, constraints.get(one.type_str, frozenset({one.type_str})))

    return (
        list(parameters(list(schema.inputs), len(node.input))),
        list(parameters(list(schema.outputs), len(node.output))),
    )


def standard_opset(model: ModelProto) -> int:
    """The version of ONNX's own operators that a model uses."""
    return next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
