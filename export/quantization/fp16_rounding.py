"""What a float16 graph answers where every result really is float16."""

from __future__ import annotations

from collections import Counter

from fdconv_deploy.export.quantization.element_types import tensor_types
from onnx import ModelProto, NodeProto, TensorProto, helper

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT


def rounding_model(model: ModelProto) -> ModelProto:
    """A converted model as one of float32 operators that rounds every result to float16.

    ONNX Runtime has few float16 operators for a CPU: it computes them in float32 and skips
    the rounding between them, so that what it answers is better than a GPU's answer. This
    model keeps each rounding; sums within an operator are float32, as they are in tensor cores.
    """
    types = {name: t.element for name, t in tensor_types(model).items()}
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        halves = [i for i, n in enumerate(node.input) if n and types[n] == HALF]
        if node.op_type == "Cast" or not halves:
            result.graph.node.append(node)
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        for place in halves:
            name = node.input[place]
            counts[name] += 1
            copy.input[place] = f"{name}.read{counts[name]}"
            result.graph.node.append(
                helper.make_node("Cast", [name], [copy.input[place]], to=SINGLE)
            )
        rounded = []
        for place, name in enumerate(node.output):
            if name and types[name] == HALF:
                copy.output[place] = f"{name}.exact"
                rounded.append(helper.make_node("Cast", [copy.output[place]], [name], to=HALF))
        result.graph.node.append(copy)
        result.graph.node.extend(rounded)
    del result.graph.value_info[:]
    return result
