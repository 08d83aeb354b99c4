from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fdconv_deploy.runtime.onnx_graph import external_locations, read_model
from tests.runtime import toy


def tensor(name: str, location: str) -> TensorProto:
    made = numpy_helper.from_array(np.zeros(2, dtype=np.float32), name)
    toy.external(made, location)
    return made


def test_every_way_to_a_tensor_is_known() -> None:
    """Walk the real schema: each field whose message can reach external_data is read here, too."""
    known = {"ModelProto": type(read_model(b"")).DESCRIPTOR}
    leading: dict[str, set[str]] = {}  # message -> the messages with a field of it
    missing, pending = set(), [onnx.ModelProto.DESCRIPTOR]
    seen = {onnx.ModelProto.DESCRIPTOR.full_name}
    while pending:
        real = pending.pop()
        ours = known.get(real.name)
        for field in real.fields:
            if field.message_type is None:
                continue
            leading.setdefault(field.message_type.name, set()).add(real.name)
            read = None if ours is None else ours.fields_by_number.get(field.number)
            if read is None or read.message_type is None:
                missing.add((real.name, field.message_type.name))
            else:
                known.setdefault(field.message_type.name, read.message_type)
            if field.message_type.full_name not in seen:
                seen.add(field.message_type.full_name)
                pending.insert(0, field.message_type)
    reaching, names = set(), ["TensorProto"]
    while names:
        if (name := names.pop()) not in reaching:
            reaching.add(name)
            names.extend(leading.get(name, ()))
    assert {"TrainingInfoProto", "FunctionProto", "SparseTensorProto"} < reaching
    assert not {each for each in missing if each[1] in reaching}
    real = onnx.TensorProto.DESCRIPTOR.fields_by_name["external_data"]
    assert known["TensorProto"].fields_by_number[real.number].name == "external_data"


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


def test_a_location_that_is_no_text() -> None:
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor("w", "QQQQ")]))
    with pytest.raises(ValueError, match="UTF-8"):
        external_locations(model.SerializeToString().replace(b"QQQQ", b"\xff\xfeQQ"))


def test_deep_nesting_is_refused() -> None:
    """As by ONNX Runtime, whose protobuf has the same limit."""

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
    with pytest.raises(ValueError, match="cut off or not ONNX"):
        external_locations(field(7, graph))


@given(st.binary(min_size=0, max_size=300), st.integers(0, 400))
def test_any_bytes_give_an_answer_or_a_value_error(junk: bytes, at: int) -> None:
    whole = toy.segmentor_model(1, 32, 48, 5).SerializeToString()
    for data in (junk, whole[:at] + junk + whole[at + len(junk) :], whole[:at]):
        with contextlib.suppress(ValueError):
            external_locations(data)
