"""The protocol's protobuf messages and service, described in Python.

No code is generated, so any protobuf and grpcio of the last years will do, and the messages
live in a pool of their own, where they cannot clash with a client's in the same process.
Names and numbers are the public protocol's (package ``inference``), with the repository
extension of Triton's clients.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_F = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _F.TYPE_BOOL,
    "int32": _F.TYPE_INT32,
    "int64": _F.TYPE_INT64,
    "uint32": _F.TYPE_UINT32,
    "uint64": _F.TYPE_UINT64,
    "float": _F.TYPE_FLOAT,
    "double": _F.TYPE_DOUBLE,
    "string": _F.TYPE_STRING,
    "bytes": _F.TYPE_BYTES,
}
_PARAMETERS = "map InferParameter"

# Message -> its fields, numbered from 1 in this order. "*" repeats, "map X" is a
# map<string, X>, "|" makes one of a oneof. A third entry is the field's number where that is
# not the next one. Of Triton's configuration these are the parts that a service of this kind has.
_MESSAGES: dict[str, list[tuple[str, str] | tuple[str, str, int]]] = {
    "ServerLiveRequest": [],
    "ServerLiveResponse": [("live", "bool")],
    "ServerReadyRequest": [],
    "ServerReadyResponse": [("ready", "bool")],
    "ModelReadyRequest": [("name", "string"), ("version", "string")],
    "ModelReadyResponse": [("ready", "bool")],
    "ServerMetadataRequest": [],
    "ServerMetadataResponse": [
        ("name", "string"),
        ("version", "string"),
        ("extensions", "*string"),
    ],
    "ModelMetadataRequest": [("name", "string"), ("version", "string")],
    "ModelMetadataResponse.TensorMetadata": [
        ("name", "string"),
        ("datatype", "string"),
        ("shape", "*int64"),
    ],
    "ModelMetadataResponse": [
        ("name", "string"),
        ("versions", "*string"),
        ("platform", "string"),
        ("inputs", "*ModelMetadataResponse.TensorMetadata"),
        ("outputs", "*ModelMetadataResponse.TensorMetadata"),
    ],
    "InferParameter": [
        ("bool_param", "|bool"),
        ("int64_param", "|int64"),
        ("string_param", "|string"),
        ("double_param", "|double"),
        ("uint64_param", "|uint64"),
    ],
    "InferTensorContents": [
        ("bool_contents", "*bool"),
        ("int_contents", "*int32"),
        ("int64_contents", "*int64"),
        ("uint_contents", "*uint32"),
        ("uint64_contents", "*uint64"),
        ("fp32_contents", "*float"),
        ("fp64_contents", "*double"),
        ("bytes_contents", "*bytes"),
    ],
    "ModelInferRequest.InferInputTensor": [
        ("name", "string"),
        ("datatype", "string"),
        ("shape", "*int64"),
        ("parameters", _PARAMETERS),
        ("contents", "InferTensorContents"),
    ],
    "ModelInferRequest.InferRequestedOutputTensor": [
        ("name", "string"),
        ("parameters", _PARAMETERS),
    ],
    "ModelInferRequest": [
        ("model_name", "string"),
        ("model_version", "string"),
        ("id", "string"),
        ("parameters", _PARAMETERS),
        ("inputs", "*ModelInferRequest.InferInputTensor"),
        ("outputs", "*ModelInferRequest.InferRequestedOutputTensor"),
        ("raw_input_contents", "*bytes"),
    ],
    "ModelInferResponse.InferOutputTensor": [
        ("name", "string"),
        ("datatype", "string"),
        ("shape", "*int64"),
        ("parameters", _PARAMETERS),
        ("contents", "InferTensorContents"),
    ],
    "ModelInferResponse": [
        ("model_name", "string"),
        ("model_version", "string"),
        ("id", "string"),
        ("parameters", _PARAMETERS),
        ("outputs", "*ModelInferResponse.InferOutputTensor"),
        ("raw_output_contents", "*bytes"),
    ],
    "ModelConfigRequest": [("name", "string"), ("version", "string")],
    "ModelTensorReshape": [("shape", "*int64")],
    "ModelInput": [
        ("name", "string"),
        ("data_type", "DataType"),
        ("dims", "*int64", 4),
        ("reshape", "ModelTensorReshape"),
    ],
    "ModelOutput": [
        ("name", "string"),
        ("data_type", "DataType"),
        ("dims", "*int64"),
        ("reshape", "ModelTensorReshape", 5),
    ],
    "ModelVersionPolicy.Latest": [("num_versions", "uint32")],
    "ModelVersionPolicy": [("latest", "ModelVersionPolicy.Latest")],
    "ModelDynamicBatching": [
        ("preferred_batch_size", "*int32"),
        ("max_queue_delay_microseconds", "uint64"),
    ],
    "ModelConfig": [
        ("name", "string"),
        ("platform", "string"),
        ("version_policy", "ModelVersionPolicy"),
        ("max_batch_size", "int32"),
        ("input", "*ModelInput"),
        ("output", "*ModelOutput"),
        ("dynamic_batching", "ModelDynamicBatching", 11),
    ],
    "ModelConfigResponse": [("config", "ModelConfig")],
    "ModelStatisticsRequest": [("name", "string"), ("version", "string")],
    "StatisticDuration": [("count", "uint64"), ("ns", "uint64")],
    "InferStatistics": [
        (name, "StatisticDuration")
        for name in (
            "success",
            "fail",
            "queue",
            "compute_input",
            "compute_infer",
            "compute_output",
            "cache_hit",
            "cache_miss",
        )
    ],
    "InferBatchStatistics": [
        ("batch_size", "uint64"),
        ("compute_input", "StatisticDuration"),
        ("compute_infer", "StatisticDuration"),
        ("compute_output", "StatisticDuration"),
    ],
    "ModelStatistics": [
        ("name", "string"),
        ("version", "string"),
        ("last_inference", "uint64"),
        ("inference_count", "uint64"),
        ("execution_count", "uint64"),
        ("inference_stats", "InferStatistics"),
        ("batch_stats", "*InferBatchStatistics"),
    ],
    "ModelStatisticsResponse": [("model_stats", "*ModelStatistics")],
    "RepositoryIndexRequest": [("repository_name", "string"), ("ready", "bool")],
    "RepositoryIndexResponse.ModelIndex": [
        ("name", "string"),
        ("version", "string"),
        ("state", "string"),
        ("reason", "string"),
    ],
    "RepositoryIndexResponse": [("models", "*RepositoryIndexResponse.ModelIndex")],
    "ModelRepositoryParameter": [
        ("bool_param", "|bool"),
        ("int64_param", "|int64"),
        ("string_param", "|string"),
        ("bytes_param", "|bytes"),
    ],
    "RepositoryModelLoadRequest": [
        ("repository_name", "string"),
        ("model_name", "string"),
        ("parameters", "map ModelRepositoryParameter"),
    ],
    "RepositoryModelLoadResponse": [],
    "RepositoryModelUnloadRequest": [
        ("repository_name", "string"),
        ("model_name", "string"),
        ("parameters", "map ModelRepositoryParameter"),
    ],
    "RepositoryModelUnloadResponse": [],
}
# Triton's names of types are KServe's, with TYPE_ before them; numbered from 0.
_DATA_TYPES = (
    "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16"
).split()
SERVICE = "inference.GRPCInferenceService"
METHODS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "ModelInfer",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)


def _field(message: Any, number: int, name: str, kind: str) -> None:
    field = message.field.add(name=name, number=number, label=_F.LABEL_OPTIONAL)
    if kind.startswith("|"):
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index, kind = 0, kind[1:]
    if kind.startswith("*"):
        field.label, kind = _F.LABEL_REPEATED, kind[1:]
    if kind.startswith("map "):
        entry = message.nested_type.add(name="ParametersEntry")
        entry.options.map_entry = True
        _field(entry, 1, "key", "string")
        _field(entry, 2, "value", kind[4:])
        field.label = _F.LABEL_REPEATED
        field.type = _F.TYPE_MESSAGE
        # Resolved from the inside out, so it finds the entry of this message.
        field.type_name = "ParametersEntry"
    elif kind in _SCALARS:
        field.type = _SCALARS[kind]
    elif kind == "DataType":
        field.type, field.type_name = _F.TYPE_ENUM, ".inference.DataType"
    else:
        field.type = _F.TYPE_MESSAGE
        field.type_name = f".inference.{kind}"


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="fdconv/open_inference.proto", package="inference", syntax="proto3"
    )
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(_DATA_TYPES):
        types.value.add(name=f"TYPE_{name}", number=number)
    made: dict[str, Any] = {}
    for name in sorted(_MESSAGES, key=lambda n: n.count(".")):
        outer, _, inner = name.rpartition(".")
        parent = made[outer].nested_type if outer else file.message_type
        message = parent.add(name=inner or name)
        made[name] = message
        number = 0
        for field, kind, *own in _MESSAGES[name]:
            number = own[0] if own else number + 1
            _field(message, number, field, kind)
    service = file.service.add(name="GRPCInferenceService")
    for method in METHODS:
        service.method.add(
            name=method,
            input_type=f".inference.{method}Request",
            output_type=f".inference.{method}Response",
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}"))
        for name in _MESSAGES
    }


MESSAGES: dict[str, Any] = _build()
