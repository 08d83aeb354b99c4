"""ONNX graphs read, searched and rewritten without the onnx package.

By messages of protobuf, which ONNX Runtime itself depends on. Fields that are not listed here are
kept as they are when a message is written again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from numpy.typing import NDArray

Shape = tuple[int, ...]
# onnx.proto: message -> fields, with number and type, * where there are several.
_SCHEMA = {
    "Model": "ir_version=1:int64 graph=7:Graph opset_import=8:OperatorSet* "
    "training_info=20:Training* functions=25:Function*",
    "Training": "initialization=1:Graph algorithm=2:Graph",
    "Function": "name=1:string input=4:string* node=7:Node* attribute_proto=11:Attribute*",
    "OperatorSet": "domain=1:string version=2:int64",
    "Graph": "node=1:Node* name=2:string initializer=5:Tensor* input=11:Value* output=12:Value* "
    "value_info=13:Value* sparse_initializer=15:SparseTensor*",
    "Node": "input=1:string* output=2:string* name=3:string op_type=4:string "
    "attribute=5:Attribute* domain=7:string",
    "Attribute": "name=1:string f=2:float i=3:int64 s=4:bytes t=5:Tensor g=6:Graph "
    "floats=7:float* ints=8:int64* strings=9:bytes* tensors=10:Tensor* graphs=11:Graph* "
    "type=20:int32 sparse_tensor=22:SparseTensor sparse_tensors=23:SparseTensor*",
    "SparseTensor": "values=1:Tensor indices=2:Tensor",
    "Tensor": "dims=1:int64* data_type=2:int32 float_data=4:float* int32_data=5:int32* "
    "int64_data=7:int64* name=8:string raw_data=9:bytes external_data=13:Entry* "
    "data_location=14:int32",
    "Entry": "key=1:string value=2:string",
    "Value": "name=1:string type=2:Type",
    "Type": "tensor_type=1:TensorType",
    "TensorType": "elem_type=1:int32 shape=2:Shape",
    "Shape": "dim=1:Dimension*",
    "Dimension": "dim_value=1:int64 dim_param=2:string",
}
FLOAT = 1  # TensorProto.DataType
_FLOAT, _INT, _STRING, _FLOATS, _INTS = 1, 2, 3, 6, 7  # AttributeProto.AttributeType
_EXTERNAL = 1  # TensorProto.DataLocation
_TYPES = {1: "<f4", 2: "<u1", 6: "<i4", 7: "<i8"}  # TensorProto.DataType
_INLINE = {1: "float_data", 2: "int32_data", 6: "int32_data", 7: "int64_data"}


@lru_cache(maxsize=1)
def _classes() -> dict[str, Any]:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="onnx_parts.proto", package="parts")
    for owner, fields in _SCHEMA.items():
        made = file.message_type.add(name=owner)
        for text in fields.split():
            name, _, rest = text.partition("=")
            number, _, kind = rest.rstrip("*").partition(":")
            label = field.LABEL_REPEATED if rest.endswith("*") else field.LABEL_OPTIONAL
            added = made.field.add(name=name, number=int(number), label=label)
            if kind in _SCHEMA:
                added.type, added.type_name = field.TYPE_MESSAGE, f".parts.{kind}"
            else:
                added.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()  # of its own: the onnx package has the same messages
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"parts.{name}"))
        for name in _SCHEMA
    }


def read_model(data: bytes) -> Any:
    """A ``ModelProto``'s parts; ValueError where the bytes are no ONNX file's, or cut off."""
    try:
        return _classes()["Model"].FromString(data)
    except message.DecodeError as error:
        raise ValueError("the file is cut off or not ONNX") from error


def external_locations(data: bytes) -> set[str]:
    """Every external-data ``location`` in an ONNX file's bytes, as written there.

    Raises:
        ValueError: they are empty, not an ONNX file's, or cut off.
    """
    if not data:
        raise ValueError("the file is empty")
    found: set[Any] = set()
    pending = [read_model(data)]
    while pending:
        for field, value in pending.pop().ListFields():
            if field.name == "external_data":
                found.update(entry.value for entry in value if entry.key == "location")
            elif field.message_type is not None:
                pending += [value] if isinstance(value, message.Message) else value
    if not all(isinstance(location, str) for location in found):
        raise ValueError("it names a file in other characters than UTF-8's")
    return found


def make_model(
    nodes: Iterable[Any], inputs: Mapping[str, Iterable[int]], outputs: Iterable[str]
) -> bytes:
    """A graph of nodes alone, of any of their domains; its inputs are float32 of given shapes."""
    model = _classes()["Model"](ir_version=8)
    model.graph.name = "graph"
    model.graph.node.extend(nodes)
    for name, shape in inputs.items():
        add_value(model.graph.input, name, shape)
    for name in outputs:
        model.graph.output.add(name=name).type.tensor_type.elem_type = FLOAT
    for domain in {node.domain for node in model.graph.node}:
        model.opset_import.add(domain=domain, version=1 if domain else 18)
    data: bytes = model.SerializeToString()
    return data


def add_value(values: Any, name: str, shape: Iterable[int]) -> None:
    """Declare a float32 tensor's shape among a graph's inputs or the values inside it."""
    kind = values.add(name=name).type.tensor_type
    kind.elem_type = FLOAT
    for length in shape:
        kind.shape.dim.add(dim_value=length)


def make_node(
    op: str,
    inputs: Iterable[str],
    outputs: Sequence[str],
    domain: str = "",
    **attributes: Any,
) -> Any:
    """A node, named after its first output; see `set_attribute`."""
    node = _classes()["Node"](
        op_type=op, input=inputs, output=outputs, domain=domain, name=outputs[0]
    )
    for key, value in attributes.items():
        set_attribute(node, key, value)
    return node


def set_attribute(node: Any, name: str, value: Any) -> None:
    """Give a node an attribute, or another value of it: an integer, float, string or integers."""
    made = next((each for each in node.attribute if each.name == name), None)
    made = node.attribute.add(name=name) if made is None else made
    if isinstance(value, str | bytes):
        made.type, made.s = _STRING, value.encode() if isinstance(value, str) else value
    elif isinstance(value, float):
        made.type, made.f = _FLOAT, value
    elif isinstance(value, int):
        made.type, made.i = _INT, value
    else:
        made.type = _INTS
        made.ints.extend(value)


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes that are numbers, strings or lists of numbers, by name."""
    fields = {_FLOAT: "f", _INT: "i", _STRING: "s", _FLOATS: "floats", _INTS: "ints"}
    found = {}
    for each in node.attribute:
        if each.type in fields:
            value = getattr(each, fields[each.type])
            found[each.name] = list(value) if each.type in (_FLOATS, _INTS) else value
    return found


def shape_of(value: Any) -> Shape | None:
    """A value's static shape; None where a length is unknown."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.dim_value > 0 for d in dims) else None


def tensor_values(tensor: Any, external: Mapping[str, bytes | memoryview]) -> NDArray[Any]:
    """A constant's values, which may lie in the files that the graph keeps data in."""
    dtype = _TYPES[tensor.data_type]
    shape = tuple(tensor.dims)
    if tensor.data_location == _EXTERNAL:
        entry = {each.key: each.value for each in tensor.external_data}
        count = int(np.prod(shape, dtype=np.int64))
        offset = int(entry.get("offset", 0))
        flat = np.frombuffer(external[entry["location"]], dtype, count, offset)
    elif tensor.raw_data:
        flat = np.frombuffer(tensor.raw_data, dtype)
    else:
        flat = np.array(getattr(tensor, _INLINE[tensor.data_type]), dtype)
    return flat.reshape(shape)


class ExternalTensors:
    """Constants to add to a graph, their values in one file, which it calls ``location``."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.tensors: list[Any] = []
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, name: str, values: NDArray[Any]) -> str:
        """Add a constant of float32 or int64 numbers; its name."""
        data = values.tobytes()
        kind = {"<f4": 1, "<i8": 7}[values.dtype.newbyteorder("<").str]
        tensor = _classes()["Tensor"](name=name, dims=values.shape, data_type=kind)
        if values.dtype == np.int64:
            tensor.raw_data = data  # of a shape, which is read as the graph is loaded
        else:
            tensor.data_location = _EXTERNAL
            for key, value in (
                ("location", self.location), ("offset", self._size), ("length", len(data)),
            ):  # fmt: skip
                tensor.external_data.add(key=key, value=str(value))
            self._parts.append(data)
            self._size += len(data)
        self.tensors.append(tensor)
        return name

    def content(self) -> bytes:
        """The file's bytes; what was added is let go of."""
        data = b"".join(self._parts)
        self._parts.clear()
        return data


class GraphIndex:
    """A graph's nodes, tensors' producers and readers; as it was when this was made.

    Others speak of ``nodes`` by their numbers in this list. producers, readers: by the name of what
    they give and read. kept: names read from outside of the list, past which nothing may be fused.
    external: the files that the graph keeps ``constants`` in.
    """

    def __init__(self, graph: Any, external: Mapping[str, bytes | memoryview]) -> None:
        self.nodes = list(graph.node)
        self.producers: dict[str, int] = {}
        self.readers: dict[str, list[int]] = defaultdict(list)
        self.kept = {value.name for value in graph.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self._external = external
        for number, node in enumerate(self.nodes):
            self.producers.update(dict.fromkeys(node.output, number))
            for name in node.input:
                self.readers[name].append(number)
            self.kept.update(captured(node))

    def producer(self, name: str, *operators: str) -> Any:
        """The node that gives a tensor; None where there is none, or none of those operators'."""
        number = self.producers.get(name)
        node = None if number is None else self.nodes[number]
        return node if node is None or not operators or node.op_type in operators else None

    def path(self, name: str, *steps: str) -> list[Any] | None:
        """Nodes from a tensor backwards, "Mul 1": a Mul, which the next one gives its input 1.

        None where a node is of another operator.
        """
        found: list[Any] = []
        for step in steps:
            operator, _, place = step.partition(" ")
            node = self.producer(name, operator)
            if node is None:
                return None
            found.append(node)
            name = node.input[int(place or 0)]
        return found

    def only_reader(self, name: str, *operators: str) -> Any:
        """The node that alone reads a tensor; None where none does, or none of those operators'."""
        if len(self.readers[name]) != 1 or name in self.kept:
            return None
        node = self.nodes[self.readers[name][0]]
        return node if not operators or node.op_type in operators else None

    def values(self, name: str) -> NDArray[Any] | None:
        """A constant's values; None where it is none."""
        tensor = self.constants.get(name)
        return None if tensor is None else tensor_values(tensor, self._external)


def set_nodes(graph: Any, nodes: Iterable[Any]) -> None:
    """Give a graph other nodes, but those, constants and shapes of which no output comes."""
    needed, kept = {value.name for value in graph.output}, []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            needed.update(node.input, captured(node))
            kept.append(node)
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    shapes = [value for value in graph.value_info if value.name in needed]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(constants)
    graph.value_info.extend(shapes)


def import_domain(model: Any, domain: str) -> None:
    """Let a model have operators of a domain's first version."""
    if all(known.domain != domain for known in model.opset_import):
        model.opset_import.add(domain=domain, version=1)


def captured(node: Any) -> set[str]:
    """Names that the graphs inside a node read."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            names.update(value.name for value in graph.output)
            for inner in graph.node:
                names.update(inner.input, captured(inner))
    return names


def copied(node: Any, inputs: Iterable[str], outputs: Iterable[str]) -> Any:
    """A node like another, between other tensors."""
    copy = type(node)()
    copy.CopyFrom(node)
    del copy.input[:], copy.output[:]
    copy.input.extend(inputs)
    copy.output.extend(outputs)
    return copy
