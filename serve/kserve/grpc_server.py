"""The KServe protocol over gRPC, on the same event loop, models and queue as HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.json_format import ParseDict

from fdconv_deploy.serve.api_keys import Keys
from fdconv_deploy.serve.errors import REQUEST_ID, RefusedError, answer_to
from fdconv_deploy.serve.kserve.inference import infer
from fdconv_deploy.serve.kserve.metadata import (
    ServerMetadata,
    load_model,
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
    unload_model,
)
from fdconv_deploy.serve.kserve.tensors import (
    InferRequest,
    InputTensor,
    datatype_of,
    infer_request,
)
from fdconv_deploy.serve.middleware import accepted_id
from fdconv_deploy.serve.model_cards import ModelCard
from fdconv_deploy.serve.model_repository import Version
from fdconv_deploy.serve.service import Service
from fdconv_deploy.serve.telemetry import log_access

log = logging.getLogger("fdconv.serve")
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_OPEN = ("ServerLive", "ServerReady")
# Calls at a time beside those that run or wait: health, metadata, and those to be turned away.
_SPARE = 16


def _load_protocol() -> tuple[Any, dict[str, Any]]:
    """The protocol's service descriptor, and its message classes by name.

    They are in a pool of their own, so that they cannot clash with those of a client
    (tritonclient registers messages of the same names) in the same process.
    """
    compiled = (files("fdconv_deploy.serve") / "kserve" / "open_inference.binpb").read_bytes()
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(compiled).file
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindFileByName(file.name)
    messages = {
        name: message_factory.GetMessageClass(descriptor)
        for name, descriptor in found.message_types_by_name.items()
    }
    return found.services_by_name["GRPCInferenceService"], messages


PROTOCOL, MESSAGES = _load_protocol()


class GrpcServer:
    """Answers gRPC beside the application; needs ``grpcio`` and ``protobuf``."""

    def __init__(self, service: Service, keys: Keys) -> None:
        self._service, self._keys = service, keys
        settings = service.settings
        self._server = grpc.aio.server(
            # Messages are received whole before anybody can count them.
            maximum_concurrent_rpcs=settings.workers + settings.queue_limit + _SPARE,
            options=[
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                self._guarded(method.name),
                request_deserializer=MESSAGES[method.input_type.name].FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            for method in PROTOCOL.methods
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(PROTOCOL.full_name, handlers),)
        )
        self.port: int | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 lets the system choose, ``self.port`` then says which."""
        settings = self._service.settings
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if settings.tls_certificate is None or settings.tls_key is None:
            self.port = self._server.add_insecure_port(address)
        else:
            authority = settings.tls_client_ca
            credentials = grpc.ssl_server_credentials(
                [(settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes())],
                authority.read_bytes() if authority else None,
                authority is not None,
            )
            self.port = self._server.add_secure_port(address, credentials)
        await self._server.start()
        log.info("listening for gRPC on %s, port %d", host, self.port)

    async def stop(self, grace: float) -> None:
        """Take no more requests, and finish those under way within ``grace`` seconds."""
        await self._server.stop(grace)

    def _guarded(self, method: str) -> Callable[[Any, Any], Awaitable[Any]]:
        """The method's handler: checks the API key, answers or says why not, counts and logs."""
        route = f"grpc/{method}"

        async def handle(request: Any, context: Any) -> Any:
            start = time.perf_counter()
            code, detail = grpc.StatusCode.OK, ""
            answer = None
            metadata = dict(context.invocation_metadata() or ())
            request_id = accepted_id(metadata.get(REQUEST_ID.lower(), ""))
            context.set_trailing_metadata(((REQUEST_ID.lower(), request_id),))
            try:
                if method not in _OPEN:
                    given = metadata.get("authorization", ""), metadata.get("x-api-key", "")
                    self._keys.check(*given)
                if method == "ModelInfer":
                    answer = await self._infer(request, context)
                else:
                    response = MESSAGES[f"{method}Response"]()
                    answer = ParseDict(await self._answer(method, request), response)
            except Exception as error:
                found = answer_to(error)
                if found is None:
                    log.exception("the gRPC request %s (%s) failed", request_id, method)
                    code = grpc.StatusCode.INTERNAL
                    detail = "The service failed to answer this request; its log says why."
                else:
                    code = _CODES.get(found.status, grpc.StatusCode.INVALID_ARGUMENT)
                    detail = found.detail
            metrics = self._service.metrics
            metrics.requests.labels(route, code.name).inc()
            seconds = time.perf_counter() - start
            metrics.request_seconds.labels(route).observe(seconds)
            log_access(
                request_id=request_id,
                client=context.peer(),
                method="gRPC",
                path=f"/{PROTOCOL.full_name}/{method}",
                status=code.name,
                ms=round(seconds * 1e3, 3),
            )
            if code is not grpc.StatusCode.OK:
                await context.abort(code, detail)
            return answer

        return handle

    async def _answer(self, method: str, request: Any) -> dict[str, Any]:
        """The response's fields, to every method but inference."""
        service, repository = self._service, self._service.repository
        match method:
            case "ServerLive":
                return {"live": True}
            case "ServerReady":
                return {"ready": service.ready}
            case "ModelReady":
                return {"ready": repository.get(request.name).version is not None}
            case "ServerMetadata":
                return ServerMetadata().model_dump()
            case "ModelMetadata":
                return model_metadata(self._card(request)).model_dump()
            case "ModelConfig":
                found = model_config(self._card(request), service.settings)
                return {"config": found.model_dump(exclude_none=True)}
            case "ModelStatistics":
                return model_statistics(service, request.name, request.version).model_dump()
            case "RepositoryIndex":
                index = repository_index(repository, ready=request.ready)
                return {"models": [entry.model_dump() for entry in index]}
            case "RepositoryModelLoad":
                await load_model(service, request.model_name)
            case "RepositoryModelUnload":
                await unload_model(service, request.model_name)
        return {}

    async def _infer(self, request: Any, context: Any) -> Any:
        service = self._service
        service.check_loaded()
        size = request.ByteSize()
        service.budget.take(size)
        try:
            return await self._run(request, context)
        finally:
            service.budget.give(size)

    async def _run(self, request: Any, context: Any) -> Any:
        service = self._service
        model = service.repository.get_version(request.model_name, request.model_version)
        wanted = _read(request, service.repository.card(model), service.settings.max_images)
        left = context.time_remaining()
        limits = [ms for ms in (wanted.timeout_ms, left and left * 1e3) if ms]
        deadline = service.deadline(min(limits) if limits else None)
        client = context.peer().rpartition(":")[0]
        count = len(wanted.images)
        with service.admission.admit(client, count):
            async with service.repository.lease(model) as version:
                start = time.perf_counter()
                outputs, stages = await infer(service, version, wanted, deadline)
                service.count(version.name, stages, count)
                service.tracing.record(
                    f"{PROTOCOL.full_name}/ModelInfer",
                    dict(context.invocation_metadata() or ()),
                    time.perf_counter() - start,
                    stages,
                    {"rpc.system": "grpc", "fdconv.model": version.name},
                )
                return _written(version, wanted, outputs)

    def _card(self, request: Any) -> ModelCard:
        repository = self._service.repository
        return repository.card(repository.get_version(request.name, request.version))


def _read(request: Any, card: ModelCard, max_images: int) -> InferRequest:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RefusedError(400, "raw_input_contents must hold every input's bytes, or none's.")
    inputs = []
    for place, given in enumerate(request.inputs):
        contents = given.contents
        inputs.append(
            InputTensor(
                given.name,
                given.datatype,
                list(given.shape),
                raw[place] if raw else None,
                contents.fp32_contents if given.datatype == "FP32" else contents.uint_contents,
            )
        )
    timeout = None
    if "timeout" in request.parameters:
        timeout = request.parameters["timeout"].int64_param
        if timeout < 0:
            raise RefusedError(400, "The parameter 'timeout' is a number of microseconds above 0.")
    names = [output.name for output in request.outputs]
    return infer_request(card, request.id, inputs, names, timeout, max_images)


def _written(version: Version, request: InferRequest, outputs: dict[str, Any]) -> Any:
    answer = MESSAGES["ModelInferResponse"](
        model_name=version.name, model_version=version.card.version, id=request.id
    )
    for name, array in outputs.items():
        answer.outputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        answer.raw_output_contents.append(np.ascontiguousarray(array).tobytes())
    return answer
