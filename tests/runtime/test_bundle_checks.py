from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fdconv_deploy.runtime.bundle_checks import _FIELDS, external_locations
from tests.runtime import toy


def tensor(name: str, location: str) -> TensorProto:
    made = numpy_helper.from_array(np.zeros(2, dtype=np.float32), name)
    toy.external(made, location)
    return made


def test_the_field_table_is_every_way_to_a_tensor() -> None:
    """Walk the real schema: each field whose message can reach external_data is known."""
    protos = {
        "Model": onnx.ModelProto,
        "Training": onnx.TrainingInfoProto,
        "Function": onnx.FunctionProto,
        "Graph": onnx.GraphProto,
        "Node": onnx.NodeProto,
        "Attribute": onnx.AttributeProto,
        "SparseTensor": onnx.SparseTensorProto,
        "Tensor": onnx.TensorProto,
    }
    names = {proto.DESCRIPTOR.full_name: name for name, proto in protos.items()}
    seen, pending = set(), [onnx.ModelProto.DESCRIPTOR]
    leading: dict[str, set[str]] = {}  # message -> the messages with a field of it
    while pending:
        descriptor = pending.pop()
        if descriptor.full_name in seen:
            continue
        seen.add(descriptor.full_name)
        for field in descriptor.fields:
            if field.message_type:
                leading.setdefault(field.message_type.full_name, set()).add(descriptor.full_name)
                pending.append(field.message_type)
    reaching, pending = set(), ["onnx.TensorProto"]
    while pending:
        name = pending.pop()
        if name not in reaching:
            reaching.add(name)
            pending.extend(leading.get(name, ()))
    assert reaching == set(names)
    for name, proto in protos.items():
        expected = {
            field.number: names[field.message_type.full_name]
            for field in proto.DESCRIPTOR.fields
            if field.message_type and field.message_type.full_name in names
        }
        if name == "Tensor":
            expected[proto.DESCRIPTOR.fields_by_name["external_data"].number] = "Entry"
        assert _FIELDS[name] == expected


def test_finds_locations_wherever_tensors_are(tmp_path: Path) -> None:
    inner = helper.make_graph([], "inner", [], [], [tensor("i", "in/subgraph")])
    sparse = onnx.SparseTensorProto(values=tensor("v", "values"), indices=tensor("n", "indices"))
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.append(onnx.AttributeProto(name="value", t=tensor("t", "attribute"), type=4))
    branch = helper.make_node("If", ["p"], ["q"], then_branch=inner, else_branch=inner)
    body = helper.make_function("d", "f", [], ["c"], [constant], [helper.make_opsetid("", 20)])
    body.node[0].attribute[0].t.external_data[0].value = "function"
    graph = helper.make_graph([constant, branch], "g", [], [], [tensor("w", "initializer")])
    graph.sparse_initializer.append(sparse)
    model = helper.make_model(graph, functions=[body])
    model.training_info.add(initialization=helper.make_graph([], "t", [], [], [tensor("x", "ä b")]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert external_locations((tmp_path / "m.onnx").read_bytes()) == {
        *("in/subgraph", "values", "indices", "attribute"),
        *("function", "initializer", "ä b"),
    }


def test_no_external_data(tmp_path: Path) -> None:
    model = helper.make_model(helper.make_graph([], "g", [], []))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert external_locations((tmp_path / "m.onnx").read_bytes()) == set()


def test_deep_nesting_is_no_recursion(tmp_path: Path) -> None:
    def field(number: int, payload: bytes) -> bytes:
        size, length = len(payload), b""
        while True:
            length += bytes([size & 0x7F | (0x80 if size > 0x7F else 0)])
            size >>= 7
            if not size:
                return bytes([number << 3 | 2]) + length + payload

    graph = tensor("w", "deep").SerializeToString()
    graph = field(5, graph)
    for _ in range(1500):  # graph in attribute in node in graph ...
        graph = field(1, field(5, field(6, graph)))
    (tmp_path / "m.onnx").write_bytes(field(7, graph))
    assert external_locations((tmp_path / "m.onnx").read_bytes()) == {"deep"}


@given(st.binary(min_size=0, max_size=300), st.integers(0, 400))
def test_any_bytes_give_an_answer_or_a_value_error(junk: bytes, at: int) -> None:
    whole = toy.segmentor_model(1, 32, 48, 5).SerializeToString()
    for data in (junk, whole[:at] + junk + whole[at + len(junk) :], whole[:at]):
        with contextlib.suppress(ValueError):
            external_locations(data)
