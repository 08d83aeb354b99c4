"""The protocol over gRPC, on the same event loop, models and queue as HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
from fdconv_deploy.serve.batching import DeadlineError, WorkerDiedError
from fdconv_deploy.serve.errors import DIED, LATE, REQUEST_ID, RefusedError
from fdconv_deploy.serve.kserve.inference import (
    EXTENSIONS,
    TYPES,
    InferRequest,
    check_tensor,
    infer,
    model_metadata,
    put_together,
)
from fdconv_deploy.serve.kserve.messages import MESSAGES, METHODS, SERVICE
from fdconv_deploy.serve.kserve.model_config import model_config, model_statistics
from fdconv_deploy.serve.kserve.repository_index import index_of, require_control
from fdconv_deploy.serve.kserve.rest import timeout_ms
from fdconv_deploy.serve.logging import log_access
from fdconv_deploy.serve.middleware import accepted_id
from fdconv_deploy.serve.security import Keys
from fdconv_deploy.serve.service import Service
from google.protobuf.json_format import ParseDict

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.version import __version__

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
# Calls at a time beside those that run or wait: health, metadata, and those told to come back.
_SPARE = 16


class GrpcServer:
    """Answers gRPC beside the application; needs ``grpcio`` and ``protobuf``."""

    def __init__(self, service: Service, keys: Keys) -> None:
        self._service, self._keys = service, keys
        settings = service.settings
        limit = settings.max_body_bytes
        self._server = grpc.aio.server(
            # Messages are received whole before anybody can count them.
            maximum_concurrent_rpcs=settings.workers + settings.queue_limit + _SPARE,
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, self._handlers()),)
        )
        self.port: int | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 lets the system choose, ``port`` then says which."""
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

    def _handlers(self) -> dict[str, Any]:
        return {
            method: grpc.unary_unary_rpc_method_handler(
                self._guarded(method, getattr(self, f"_{method}")),
                request_deserializer=MESSAGES[f"{method}Request"].FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            for method in METHODS
        }

    def _guarded(
        self, method: str, call: Callable[[Any, Any], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
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
                    self._authorise(metadata)
                answer = await call(request, context)
            except RefusedError as error:
                code = _CODES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT)
                detail = error.detail
            except DeadlineError:
                code, detail = grpc.StatusCode.DEADLINE_EXCEEDED, LATE
            except WorkerDiedError:
                code, detail = grpc.StatusCode.UNAVAILABLE, DIED
            except Exception:
                log.exception("the gRPC request %s (%s) failed", request_id, method)
                code = grpc.StatusCode.INTERNAL
                detail = "The service failed to answer this request; its log says why."
            metrics = self._service.metrics
            metrics.requests.labels(route, code.name).inc()
            seconds = time.perf_counter() - start
            metrics.request_seconds.labels(route).observe(seconds)
            log_access(
                request_id=request_id,
                client=context.peer(),
                method="gRPC",
                path=f"/{SERVICE}/{method}",
                status=code.name,
                ms=round(seconds * 1e3, 3),
            )
            if code is not grpc.StatusCode.OK:
                await context.abort(code, detail)
            return answer

        return handle

    def _authorise(self, metadata: dict[str, str]) -> None:
        self._keys.check(metadata.get("authorization", ""), metadata.get("x-api-key", ""))

    async def _ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return MESSAGES["ServerLiveResponse"](live=True)

    async def _ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return MESSAGES["ServerReadyResponse"](ready=self._service.ready)

    async def _ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        model = self._service.repository.get(request.name)
        return MESSAGES["ModelReadyResponse"](ready=model.version is not None)

    async def _ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return MESSAGES["ServerMetadataResponse"](
            name="fdconv-deploy", version=__version__, extensions=EXTENSIONS
        )

    async def _ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        repository = self._service.repository
        model = repository.get_version(request.name, request.version)
        return MESSAGES["ModelMetadataResponse"](
            **model_metadata(model.version, repository.card(model))
        )

    async def _ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        repository = self._service.repository
        card = repository.card(repository.get_version(request.name, request.version))
        found = {"config": model_config(card, self._service.settings)}
        return ParseDict(found, MESSAGES["ModelConfigResponse"]())

    async def _ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        found = model_statistics(self._service, request.name, request.version)
        return ParseDict(found, MESSAGES["ModelStatisticsResponse"]())

    async def _ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        service = self._service
        service.check_loaded()
        size = request.ByteSize()
        service.budget.take(size)
        try:
            return await self._infer(request, context)
        finally:
            service.budget.give(size)

    async def _infer(self, request: Any, context: Any) -> Any:
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
                    f"{SERVICE}/ModelInfer",
                    dict(context.invocation_metadata() or ()),
                    time.perf_counter() - start,
                    stages,
                    {"rpc.system": "grpc", "fdconv.model": version.name},
                )
                return _written(version, wanted, outputs)

    async def _RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        found = index_of(self._service.repository, ready=request.ready)
        entry = MESSAGES["RepositoryIndexResponse.ModelIndex"]
        return MESSAGES["RepositoryIndexResponse"](models=[entry(**model) for model in found])

    async def _RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        require_control(self._service)
        repository = self._service.repository
        try:
            await repository.load(repository.get(request.model_name))
        except FDConvError as error:
            raise RefusedError(400, "The model does not load; the log says why.") from error
        return MESSAGES["RepositoryModelLoadResponse"]()

    async def _RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        require_control(self._service)
        repository = self._service.repository
        await repository.unload(repository.get(request.model_name))
        return MESSAGES["RepositoryModelUnloadResponse"]()


def _read(request: Any, card: Any, most: int) -> InferRequest:
    raw = list(request.raw_input_contents)
    most_inputs = 1 if card.instances is None else 2
    if not 1 <= len(request.inputs) <= most_inputs:
        wanted = "exactly one input, 'images'" if most_inputs == 1 else "'images' and 'sizes'"
        raise RefusedError(400, f"The request must have {wanted}.")
    if raw and len(raw) != len(request.inputs):
        raise RefusedError(400, "raw_input_contents must hold every input's bytes, or none's.")
    tensors = {
        given.name: _tensor(given, raw[place] if raw else None, card, most)
        for place, given in enumerate(request.inputs)
    }
    parameter = request.parameters.get("timeout") if "timeout" in request.parameters else None
    limit = None if parameter is None else timeout_ms(parameter.int64_param)
    names = [output.name for output in request.outputs]
    return put_together(card, request.id, tensors, names, limit)


def _tensor(given: Any, raw: bytes | None, card: Any, most: int) -> Any:
    """One input, (N, …), out of its bytes or its numbers."""
    shape = list(given.shape)
    check_tensor(card, given.name, given.datatype, shape, most)
    dtype = TYPES[given.datatype]
    if raw is not None:
        if len(raw) != int(np.prod(shape)) * dtype.itemsize:
            raise RefusedError(
                400, f"raw_input_contents must hold the bytes of the input {given.name!r}."
            )
        array = np.frombuffer(raw, dtype)
    else:
        contents = given.contents
        field = contents.fp32_contents if given.datatype == "FP32" else contents.uint_contents
        array = np.array(field, np.float64 if given.datatype == "FP32" else np.int64)
        if array.size != int(np.prod(shape)) or (dtype == np.uint8 and array.max() > 255):
            raise RefusedError(400, "The input's contents do not fit its shape and datatype.")
        array = array.astype(dtype)
    return np.require(array, requirements="A").reshape(shape)


def _written(version: Any, request: InferRequest, outputs: dict[str, Any]) -> Any:
    answer = MESSAGES["ModelInferResponse"](
        model_name=version.name, model_version=version.card.version, id=request.id
    )
    for name, array in outputs.items():
        kind = next(k for k, dtype in TYPES.items() if dtype == array.dtype)
        answer.outputs.add(name=name, datatype=kind, shape=array.shape)
        answer.raw_output_contents.append(np.ascontiguousarray(array).tobytes())
    return answer
