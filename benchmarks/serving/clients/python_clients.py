"""The Python clients, one per call: ``python python_clients.py CLIENT ADDRESSES…``.

Runs in the environment that ``__main__.py`` makes, which has none of this project. Prints JSON: the
client's version, and "ok" or what went wrong for each of the calls it has.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Cells = dict[str, Callable[[], Any]]


class Served(NamedTuple):
    """What is asked: addresses of HTTP and gRPC, the model, its input, the labels expected."""

    http: str
    grpc: str
    model: str
    tensor: np.ndarray
    labels: np.ndarray
    generated: str

    def same(self, labels: Any) -> bool:
        return np.array_equal(np.asarray(labels).ravel(), self.labels)


def outcome(call: Callable[[], Any]) -> str:
    """ "ok" of a call that gives something true."""
    try:
        found = call()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return "ok" if found else f"gave {found!r:.80}"


def triton(served: Served, kind: str) -> Cells:
    module = importlib.import_module(f"tritonclient.{kind}")
    client = module.InferenceServerClient(getattr(served, kind))

    def inputs(part: np.ndarray = served.tensor) -> list[Any]:
        tensor = module.InferInput("images", part.shape, "FP32")
        tensor.set_data_from_numpy(part)
        return [tensor]

    def infer() -> bool:
        options = {"request_compression_algorithm": "gzip"} if kind == "http" else {
            "compression_algorithm": "gzip"
        }  # fmt: skip
        plain = client.infer(served.model, inputs())
        packed = client.infer(served.model, inputs(), **options)
        return all(served.same(answer.as_numpy("labels")) for answer in (plain, packed))

    def control() -> bool:
        client.unload_model(served.model)
        gone = not client.is_model_ready(served.model)
        client.load_model(served.model)
        return gone and client.is_model_ready(served.model)

    def stream() -> bool:
        import queue

        found: queue.Queue = queue.Queue()
        client.start_stream(lambda result, error: found.put(error or result))
        for number in range(3):
            client.async_stream_infer(served.model, inputs(), request_id=str(number))
        answers = [found.get(timeout=60) for _ in range(3)]
        client.stop_stream()
        order = [answer.get_response().id for answer in answers]
        return order == ["0", "1", "2"] and all(
            served.same(answer.as_numpy("labels")) for answer in answers
        )

    return {
        "health": lambda: client.is_server_live() and client.is_server_ready(),
        "metadata": lambda: (
            client.get_server_metadata() and client.get_model_metadata(served.model)
        ),
        "infer": infer,
        "config": lambda: client.get_model_config(served.model),
        "statistics": lambda: client.get_inference_statistics(served.model),
        "repository index": client.get_model_repository_index,
        "load and unload": control,
        **({"stream": stream} if kind == "grpc" else {}),
    }


def triton_aio(served: Served, kind: str) -> Cells:
    module = importlib.import_module(f"tritonclient.{kind}.aio")

    def ask(call: Callable[[Any], Any]) -> Callable[[], Any]:
        async def within() -> Any:
            async with module.InferenceServerClient(getattr(served, kind)) as client:
                return await call(client)

        return lambda: asyncio.run(within())

    async def infer(client: Any) -> bool:
        tensor = module.InferInput("images", served.tensor.shape, "FP32")
        tensor.set_data_from_numpy(served.tensor)
        answers = await asyncio.gather(*(client.infer(served.model, [tensor]) for _ in range(3)))
        return all(served.same(answer.as_numpy("labels")) for answer in answers)

    async def stream(client: Any) -> bool:
        async def requests() -> Any:
            tensor = module.InferInput("images", served.tensor.shape, "FP32")
            tensor.set_data_from_numpy(served.tensor)
            yield {"model_name": served.model, "inputs": [tensor]}

        found = [pair async for pair in client.stream_infer(requests())]
        return all(not error and served.same(a.as_numpy("labels")) for a, error in found)

    return {
        "health": ask(lambda client: client.is_server_ready()),
        "metadata": ask(lambda client: client.get_model_metadata(served.model)),
        "infer": ask(infer),
        "config": ask(lambda client: client.get_model_config(served.model)),
        "statistics": ask(lambda client: client.get_inference_statistics(served.model)),
        **({"stream": ask(stream)} if kind == "grpc" else {}),
    }


def kserve(served: Served, kind: str) -> Cells:
    from kserve import InferenceRESTClient, InferInput, InferRequest
    from kserve.inference_client import InferenceGRPCClient, RESTConfig

    def ask(call: Callable[[Any, tuple], Any]) -> Callable[[], Any]:
        async def within() -> Any:
            if kind == "grpc":
                return await call(InferenceGRPCClient(served.grpc), ())
            client = InferenceRESTClient(RESTConfig(protocol="v2"))
            return await call(client, (f"http://{served.http}",))

        return lambda: asyncio.run(within())

    async def infer(client: Any, where: tuple) -> bool:
        found = []
        for binary in (False, True):
            tensor = InferInput("images", list(served.tensor.shape), "FP32")
            tensor.set_data_from_numpy(served.tensor, binary_data=binary)
            request = InferRequest(served.model, [tensor])
            options = {"model_name": served.model} if where else {}
            answer = await client.infer(*where, request, **options)
            found += [o.as_numpy() for o in answer.outputs if o.name == "labels"]
        return len(found) == 2 and all(map(served.same, found))

    async def health(client: Any, where: tuple) -> bool:
        ready = await client.is_server_live(*where) and await client.is_server_ready(*where)
        return ready and await client.is_model_ready(*where, served.model)

    return {"health": ask(health), "infer": ask(infer)}


def pytriton(served: Served, url: str) -> Cells:
    from pytriton.client import AsyncioModelClient, ModelClient

    with ModelClient(url, served.model) as client:
        config = client.model_config

    def infer() -> bool:
        with ModelClient(url, served.model) as client:
            return served.same(client.infer_batch(served.tensor)["labels"])

    async def infer_aio() -> bool:
        async with AsyncioModelClient(url, served.model) as client:
            return served.same((await client.infer_batch(served.tensor))["labels"])

    def health() -> bool:
        with ModelClient(url, served.model) as client:
            client.wait_for_model(60)
            return True

    return {
        "health": health,
        "infer": infer,
        "config": lambda: config.max_batch_size > 1 and config.inputs[0].name == "images",
        "asyncio": lambda: asyncio.run(infer_aio()),
    }


def health_probe(served: Served) -> Cells:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(served.grpc))

    def serving() -> bool:
        return all(
            stub.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
            for name in ("", "inference.GRPCInferenceService", served.model)
        )

    return {
        "health": serving,
        "watch": lambda: next(stub.Watch(health_pb2.HealthCheckRequest())).status == 1,
    }


def reflection(served: Served) -> Cells:
    """Knows no message beforehand, as grpcurl does not: all come from the service."""
    import grpc
    from google.protobuf import descriptor_pool, message_factory
    from google.protobuf.json_format import MessageToDict, ParseDict
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    channel = grpc.insecure_channel(served.grpc)
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = descriptor_pool.DescriptorPool(database)

    def call(service: str, method: str, **fields: Any) -> dict[str, Any]:
        found = pool.FindServiceByName(service).methods_by_name[method]
        asked = message_factory.GetMessageClass(found.input_type)
        answered = message_factory.GetMessageClass(found.output_type)
        ask = channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=asked.SerializeToString,
            response_deserializer=answered.FromString,
        )
        return MessageToDict(ask(ParseDict(fields, asked())), preserving_proto_field_name=True)

    inference = "inference.GRPCInferenceService"

    def infer() -> bool:
        import base64

        tensor = {"name": "images", "datatype": "FP32", "shape": list(served.tensor.shape)}
        raw = base64.b64encode(served.tensor.tobytes()).decode()
        answer = call(
            inference,
            "ModelInfer",
            model_name=served.model,
            inputs=[tensor],
            outputs=[{"name": "labels"}],
            raw_input_contents=[raw],
        )
        labels = base64.b64decode(answer["raw_output_contents"][0])
        return served.same(np.frombuffer(labels, np.uint8))

    return {
        "health": lambda: call("grpc.health.v1.Health", "Check")["status"] == "SERVING",
        "metadata": lambda: call(inference, "ModelMetadata", name=served.model),
        "infer": infer,
        "config": lambda: call(inference, "ModelConfig", name=served.model),
        "statistics": lambda: call(inference, "ModelStatistics", name=served.model),
        "services": lambda: len(list(database.get_services())) == 2,
    }


def generated(served: Served) -> Cells:
    """The package that openapi-python-client made of /openapi.json."""
    sys.path.insert(0, str(Path(served.generated).parent))
    package = Path(served.generated).name

    def load(module: str) -> Any:
        return importlib.import_module(f"{package}.{module}")

    client = load("client").Client(f"http://{served.http}")

    def call(module: str, *where: str, **body: Any) -> Any:
        return load(f"api.{module}").sync(*where, client=client, **body)

    models, v2 = load("models"), "k_serve_v_2"

    def infer() -> bool:
        tensor = {"name": "images", "datatype": "FP32", "shape": list(served.tensor.shape)}
        body = {
            "inputs": [{**tensor, "data": served.tensor.ravel().tolist()}],
            "outputs": [{"name": "labels"}],
        }
        body = models.InferCall.from_dict(body)
        answer = call(f"{v2}.run_v2_models_name_infer_post", served.model, body=body)
        return served.same(answer.to_dict()["outputs"][0]["data"])

    def refused() -> bool:
        return type(call(f"{v2}.metadata_v2_models_name_get", "none")) is models.Problem

    return {
        "health": lambda: (
            call(f"{v2}.ready_v2_health_ready_get").ready
            and call("health.readyz_readyz_get").status
        ),
        "metadata": lambda: call(f"{v2}.metadata_v2_models_name_get", served.model).inputs,
        "infer": infer,
        "config": lambda: call(f"{v2}.config_v2_models_name_config_get", served.model).input_,
        "statistics": lambda: (
            call(f"{v2}.statistics_v2_models_name_stats_get", served.model).model_stats
        ),
        "error model": refused,
    }


CLIENTS: dict[str, tuple[str, Callable[[Served], Cells]]] = {
    "tritonclient.http": ("tritonclient", lambda served: triton(served, "http")),
    "tritonclient.grpc": ("tritonclient", lambda served: triton(served, "grpc")),
    "tritonclient.http.aio": ("tritonclient", lambda served: triton_aio(served, "http")),
    "tritonclient.grpc.aio": ("tritonclient", lambda served: triton_aio(served, "grpc")),
    "kserve REST": ("kserve", lambda served: kserve(served, "http")),
    "kserve gRPC": ("kserve", lambda served: kserve(served, "grpc")),
    "pytriton HTTP": (
        "nvidia-pytriton",
        lambda served: pytriton(served, f"http://{served.http}"),
    ),
    "pytriton gRPC": (
        "nvidia-pytriton",
        lambda served: pytriton(served, f"grpc://{served.grpc}"),
    ),
    "grpcio-health-checking": ("grpcio-health-checking", health_probe),
    "grpcio-reflection": ("grpcio-reflection", reflection),
    "openapi-python-client": ("openapi-python-client", generated),
}


def main() -> None:
    warnings.simplefilter("ignore")
    name, http, grpc, model, shape, tensor, labels, package = sys.argv[1:]
    served = Served(
        http,
        grpc,
        model,
        np.fromfile(tensor, np.float32).reshape(json.loads(shape)),
        np.fromfile(labels, np.uint8),
        package,
    )
    distribution, make = CLIENTS[name]
    cells = {cell: outcome(call) for cell, call in make(served).items()}
    print(json.dumps({"version": importlib.metadata.version(distribution), "cells": cells}))


if __name__ == "__main__":
    main()
