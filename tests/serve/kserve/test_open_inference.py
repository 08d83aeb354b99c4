"""The protocol's messages: the .proto, what is compiled of it, and tritonclient's own agree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from fdconv_deploy.serve.kserve.grpc_server import MESSAGES, PROTOCOL

Facts = tuple[str, ...]
FieldProto = descriptor_pb2.FieldDescriptorProto


def written(text: str) -> Iterator[Facts]:
    """Each statement of a .proto: where it stands, and its words."""
    stack: list[str] = []
    for body, end in re.findall(r"([^;{}]*)([;{}])", re.sub(r"//.*", "", text)):
        words = " ".join(body.split())
        if words and not words.startswith(
            ("syntax", "package", "service", "oneof", "message", "enum")
        ):
            yield (*stack, words)
        if end == "{":
            stack.append(words)
        elif end == "}":
            stack.pop()


def described(file: descriptor_pb2.FileDescriptorProto) -> Iterator[Facts]:
    """The same of a compiled file."""

    def kind(field: FieldProto, maps: dict[str, Any]) -> str:
        name = field.type_name.rpartition(".")[2]
        if name in maps:
            key, value = (kind(part, {}) for part in maps[name].field)
            return f"map<{key}, {value}>"
        scalar = FieldProto.Type.Name(field.type).removeprefix("TYPE_").lower()
        return "repeated " * (field.label == field.LABEL_REPEATED) + (name or scalar)

    def fields(message: descriptor_pb2.DescriptorProto, *outer: str) -> Iterator[Facts]:
        here = (*outer, f"message {message.name}")
        maps = {entry.name: entry for entry in message.nested_type if entry.options.map_entry}
        for field in message.field:
            choices = message.oneof_decl if field.HasField("oneof_index") else []
            choice = [f"oneof {choice.name}" for choice in choices[field.oneof_index :][:1]]
            yield (*here, *choice, f"{kind(field, maps)} {field.name} = {field.number}")
        for enum in message.enum_type:
            yield from values(enum, *here)
        for nested in message.nested_type:
            if nested.name not in maps:
                yield from fields(nested, *here)

    def values(enum: descriptor_pb2.EnumDescriptorProto, *outer: str) -> Iterator[Facts]:
        for value in enum.value:
            yield *outer, f"enum {enum.name}", f"{value.name} = {value.number}"

    for service in file.service:
        for method in service.method:
            given, gives = (
                "stream " * streams + kind.rpartition(".")[2]
                for streams, kind in (
                    (method.client_streaming, method.input_type),
                    (method.server_streaming, method.output_type),
                )
            )
            yield f"service {service.name}", f"rpc {method.name}({given}) returns ({gives})"
    for enum in file.enum_type:
        yield from values(enum)
    for message in file.message_type:
        yield from fields(message)


@pytest.mark.parametrize(
    ("name", "package"), [("open_inference", "inference"), ("health", "grpc.health.v1")]
)
def test_compiled_messages_are_those_of_the_proto_file(name: str, package: str) -> None:
    folder = files("fdconv_deploy.serve") / "kserve"
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(
        (folder / f"{name}.binpb").read_bytes()
    ).file
    text = (folder / f"{name}.proto").read_text(encoding="utf-8")
    assert sorted(described(file)) == sorted(written(text))
    assert file.name == f"{name}.proto"
    assert (file.package, file.syntax) == (package, "proto3")


@pytest.fixture(scope="module")
def published() -> Any:
    """tritonclient's compiled messages."""
    return pytest.importorskip("tritonclient.grpc.service_pb2").DESCRIPTOR.pool


def test_methods_are_those_of_tritonclient(published: Any) -> None:
    methods = published.FindServiceByName(PROTOCOL.full_name).methods_by_name
    for method in PROTOCOL.methods:
        theirs = methods[method.name]
        assert method.input_type.full_name == theirs.input_type.full_name
        assert method.output_type.full_name == theirs.output_type.full_name
        assert method.client_streaming == theirs.client_streaming
        assert method.server_streaming == theirs.server_streaming


def fields_of(message: Any) -> dict[str, Facts]:
    found = descriptor_pb2.DescriptorProto()
    message.CopyToProto(found)
    choices = [choice.name for choice in found.oneof_decl]
    return {
        f.name: (f.number, f.label, f.type, f.type_name, f.HasField("oneof_index") and
                 choices[f.oneof_index])
        for f in found.field
    }  # fmt: skip


def test_fields_are_those_of_tritonclient(published: Any) -> None:
    messages = list(PROTOCOL.file.message_types_by_name.values())
    for message in messages:
        messages += message.nested_types
        theirs = published.FindMessageTypeByName(message.full_name)
        assert fields_of(message).items() <= fields_of(theirs).items(), message.full_name
    assert len(messages) > 40
    for name, enum in PROTOCOL.file.enum_types_by_name.items():
        theirs = published.FindEnumTypeByName(f"inference.{name}")
        assert [(v.name, v.number) for v in enum.values] == [
            (v.name, v.number) for v in theirs.values
        ]


def test_messages_live_beside_those_of_tritonclient(published: Any) -> None:
    """Both have classes of the same names in one process, which read each other's bytes."""
    from tritonclient.grpc import service_pb2

    ours = MESSAGES["ModelInferRequest"](model_name="street", raw_input_contents=[b"ab"])
    ours.parameters["timeout"].int64_param = 7
    theirs = service_pb2.ModelInferRequest.FromString(ours.SerializeToString())
    assert type(ours) is not type(theirs)
    assert (theirs.model_name, theirs.parameters["timeout"].int64_param) == ("street", 7)
    assert MESSAGES["ModelInferRequest"].FromString(theirs.SerializeToString()) == ours
