"""A small builder of ONNX function bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, helper

from fdconv_deploy.ops import DOMAIN, OPSET


class FunctionBody:
    """Collects nodes; every operator added returns the name of its one output.

    attributes: names of those that calling nodes give for other readers than the body.
    """

    def __init__(self, name: str, inputs: Sequence[str], attributes: Sequence[str] = ()) -> None:
        self.name = name
        self.inputs = list(inputs)
        self.nodes: list[NodeProto] = []
        self.attributes = list(attributes)

    def _fresh(self, stem: str) -> str:
        return f"{stem}_{len(self.nodes)}"

    def add(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Append a standard operator; the names of its outputs."""
        names = [self._fresh(op_type.lower()) + (f"_{i}" if i else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, **attributes))
        return names

    def __call__(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Append a standard operator of one output; its name."""
        return self.add(op_type, *inputs, **attributes)[0]

    def constant(self, values: Sequence[int]) -> str:
        """A 1-d int64 constant, the same in every call of the function."""
        return self("Constant", value_ints=list(values))

    def attribute(self, name: str) -> str:
        """A 1-d int64 constant that each calling node gives as its attribute ``name``."""
        if name not in self.attributes:
            self.attributes.append(name)
        output = self._fresh("attribute")
        node = helper.make_node("Constant", [], [output])
        reference = AttributeProto(name="value_ints", type=AttributeProto.INTS, ref_attr_name=name)
        node.attribute.append(reference)
        self.nodes.append(node)
        return output

    def passed(self, op_type: str, *inputs: str, **names: str) -> str:
        """Append an operator whose attributes are the calling node's: ``theirs=ours``.

        An attribute is a list of integers where its name is a plural, else one integer.
        """
        output = self(op_type, *inputs)
        for theirs, ours in names.items():
            if ours not in self.attributes:
                self.attributes.append(ours)
            kind = AttributeProto.INTS if theirs.endswith("s") else AttributeProto.INT
            reference = AttributeProto(name=theirs, type=kind, ref_attr_name=ours)
            self.nodes[-1].attribute.append(reference)
        return output

    def reshape(self, x: str, attribute: str) -> str:
        """Reshape to a shape that the calling node gives (0 copies the batch size)."""
        return self("Reshape", x, self.attribute(attribute))

    def finish(self, output: str, doc: str) -> FunctionProto:
        """The function, with the last value as its one output."""
        identity = helper.make_node("Identity", [output], ["output"])
        return helper.make_function(
            DOMAIN,
            self.name,
            self.inputs,
            ["output"],
            [*self.nodes, identity],
            [helper.make_opsetid("", OPSET)],
            self.attributes,
            doc_string=doc,
        )


def functions_checked(functions: Sequence[FunctionProto]) -> list[FunctionProto]:
    """Functions by distinct name; two of one name must be equal."""
    unique: dict[str, FunctionProto] = {}
    for function in functions:
        known = unique.setdefault(function.name, function)
        assert known.SerializeToString() == function.SerializeToString(), function.name
    for function in unique.values():
        onnx.checker.check_function(function)
    return list(unique.values())
