"""The KServe protocol and gRPC's health checks, on the event loop, models and queue of HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import unquote

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from fdconv_deploy.serve.batching import After
from fdconv_deploy.serve.errors import REQUEST_ID, RefusedError, answer_to
from fdconv_deploy.serve.http_limits import LAST_REQUEST_SECONDS
from fdconv_deploy.serve.kserve import metadata as documents
from fdconv_deploy.serve.kserve.inference import (
    DATATYPE_OF,
    PIECE,
    InferRequest,
    InputTensor,
    check_parameters,
    infer,
    infer_request,
)
from fdconv_deploy.serve.middleware import Client, Clients, accepted_id
from fdconv_deploy.serve.model_cards import ModelCard
from fdconv_deploy.serve.model_repository import Version
from fdconv_deploy.serve.service import Service, timeout_of
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
# Asked every few seconds by machines, which would end a service that does not answer.
_PROBES = ("ServerLive", "ServerReady", "Check", "Watch")
# What needs no API key. Reflection tells the protocol, which the documentation tells, too.
_OPEN = (*_PROBES, "ServerReflectionInfo")
_WATCH_SECONDS = 0.5
_ENDED = ("OK", "CANCELLED")  # as streams are by their clients
# Requests of one stream of inference at a time: enough for a batch, while others are read.
_STREAM_REQUESTS = 8
# A connection without any call for so long is ended; clients make another when they need one.
_IDLE_SECONDS = 300.0
_STOPPING = "The service is stopping."


def _load_protocols() -> tuple[Any, Any, dict[str, Any]]:
    """The descriptors of the KServe and the health service, and message classes by name.

    They are in a pool of their own, so that they cannot clash with those of a client
    (tritonclient registers messages of the same names) in the same process.
    """
    pool = descriptor_pool.DescriptorPool()
    messages, services = {}, []
    for name in ("open_inference", "health"):
        compiled = (files("fdconv_deploy.serve") / "kserve" / f"{name}.binpb").read_bytes()
        (file,) = descriptor_pb2.FileDescriptorSet.FromString(compiled).file
        pool.Add(file)
        found = pool.FindFileByName(file.name)
        for message, descriptor in found.message_types_by_name.items():
            messages[message] = message_factory.GetMessageClass(descriptor)
        services += found.services_by_name.values()
    protocol, health = services
    return protocol, health, messages


PROTOCOL, HEALTH, MESSAGES = _load_protocols()


class _Call(NamedTuple):
    """One call, or one stream of them, with its metadata of text."""

    service: str
    method: str
    metadata: list[tuple[str, str]]
    request_id: str
    client: Client


class GrpcServer:
    """Answers gRPC beside the application; needs ``grpcio`` and ``protobuf``."""

    def __init__(self, service: Service, clients: Clients) -> None:
        self._service, self._clients = service, clients
        self._calls = 0
        # What calls without anything to do wait for, the longest first, and why it was ended.
        self._idle: dict[asyncio.Future[Any], str] = {}
        self._stopping = False
        settings = service.settings
        limits = {
            "server_handshake_timeout": settings.header_seconds,
            "max_connection_idle": _IDLE_SECONDS,
            # A client that does not even answer a ping reads nothing.
            "keepalive_time": settings.write_seconds,
            "keepalive_timeout": settings.header_seconds,
        }
        self._server = grpc.aio.server(
            options=[
                *((f"grpc.{name}_ms", int(seconds * 1e3)) for name, seconds in limits.items()),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        for protocol in (PROTOCOL, HEALTH):
            handlers = {method.name: self._handler(method) for method in protocol.methods}
            self._register(protocol.full_name, handlers)
        self._add_reflection()
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
        asyncio.get_running_loop().call_later(LAST_REQUEST_SECONDS, self._end_idle)
        await self._server.stop(grace)

    def _end_idle(self) -> None:
        self._stopping = True
        for waiting in self._idle:
            self._end(waiting, _STOPPING)

    def _end(self, waiting: asyncio.Future[Any], why: str) -> None:
        self._idle[waiting] = why
        waiting.cancel()

    def _register(self, service: str, handlers: dict[str, Any]) -> None:
        found = grpc.method_handlers_generic_handler(service, handlers)
        self._server.add_generic_rpc_handlers((found,))

    def _handler(self, method: Any) -> Any:
        """The handler of one of the two protocols' methods."""
        name, response = method.name, MESSAGES[method.output_type.name]

        async def once(context: Any, call: _Call) -> AsyncIterator[Any]:
            if name == "ModelInfer":
                self._service.check_loaded()
                self._service.admission.check_room(call.client.name)
            request = await self._first(context)
            if name == "ModelInfer":
                yield await self._infer(request, context, call)
            else:
                yield ParseDict(await self._answer(name, request), response())

        streams = {"ModelStreamInfer": self._infer_stream, "Watch": self._watch}
        return self._streamed(
            method.containing_service.full_name,
            name,
            streams.get(name, once),
            MESSAGES[method.input_type.name],
        )

    def _add_reflection(self) -> None:
        """Let tools such as grpcurl ask for the protocols, where grpcio-reflection is installed."""
        try:
            from grpc_reflection.v1alpha import reflection, reflection_pb2
        except ImportError:
            log.info("no gRPC reflection, since grpcio-reflection is not installed")
            return
        services = {service.full_name: service for service in (PROTOCOL, HEALTH)}
        servicer = reflection.aio.ReflectionServicer(services, PROTOCOL.file.pool)

        async def named(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
            async for request in requests:
                # The pool finds no methods (findings/grpcio-reflection-knows-no-methods.sh).
                name, _, method = request.file_containing_symbol.rpartition(".")
                if name in services and method in services[name].methods_by_name:
                    request.file_containing_symbol = name
                yield request

        def reflect(context: Any, call: _Call) -> Any:
            return servicer.ServerReflectionInfo(named(self._requests(context)), context)

        message, name = reflection_pb2.ServerReflectionRequest, "ServerReflectionInfo"
        for version in ("v1", "v1alpha"):  # which have the same messages
            service = f"grpc.reflection.{version}.ServerReflection"
            self._register(service, {name: self._streamed(service, name, reflect, message)})

    def _streamed(
        self, service: str, method: str, answers: Callable[..., AsyncIterator[Any]], message: Any
    ) -> Any:
        """The handler of a method whose ``answers`` are made of its context and call.

        Of a stream also where it is none, which is all the same to clients: here, calls that send
        no message and answers that are not read are then seen to.
        """

        def parsed(data: bytes) -> Any:
            try:
                return message.FromString(data)
            except DecodeError as error:
                raise RefusedError(
                    400, f"The message is not what this method takes: {error}."
                ) from error

        async def handle(_: Any, context: Any) -> AsyncIterator[Any]:
            async with self._called(service, method, context) as call:
                task = asyncio.current_task()
                assert task is not None
                async for answer in answers(context, call):
                    # gRPC itself keeps an answer that is not read as long as the connection, which
                    # it ends when the client answers no pings.
                    with After(self._service.settings.write_seconds, task.cancel):
                        yield answer

        return grpc.stream_stream_rpc_method_handler(
            handle,
            request_deserializer=parsed,
            response_serializer=lambda answer: answer.SerializeToString(),
        )

    async def _requests(self, context: Any) -> AsyncIterator[Any]:
        """A stream's messages; clients open streams long before they have something to ask."""
        while (request := await self._idly(context.read())) is not grpc.aio.EOF:
            yield request

    async def _first(self, context: Any) -> Any:
        """The message of a call that has one, which must come in time."""
        seconds = self._service.settings.body_seconds
        waiting = asyncio.ensure_future(context.read())
        late = f"No message arrived within {seconds:g} s. Send it faster, or less of it."
        with After(seconds, self._end, waiting, late):
            request = await self._idly(waiting)
        if request is grpc.aio.EOF:
            raise RefusedError(400, "The call ended without a message. Send one.")
        return request

    def _take_place(self, method: str) -> None:
        """Find room for one more call, if need be in place of the one that is idle longest."""
        most = self._service.settings.max_connections
        if self._calls <= most:
            return
        longest = next((waiting for waiting, why in self._idle.items() if not why), None)
        if longest is not None:
            self._end(longest, "The call was idle and others had no place. Start another.")
        elif method not in _PROBES:  # health is answered all the same
            raise RefusedError(503, f"The service has {most} calls, all it takes. Try again.")

    async def _idly(self, awaitable: Awaitable[Any]) -> Any:
        """Await what a call waits for, unless its place is needed before that: then a 503."""
        waiting = asyncio.ensure_future(awaitable)
        self._idle[waiting] = ""
        if self._stopping:
            self._end(waiting, _STOPPING)
        try:
            return await waiting
        except asyncio.CancelledError:
            why = self._idle[waiting]
            if not why:  # it is the call that ends
                raise
            raise RefusedError(503, why) from None
        finally:
            del self._idle[waiting]

    @asynccontextmanager
    async def _called(self, service: str, method: str, context: Any) -> AsyncIterator[_Call]:
        """A call's ``with`` block: checks the API key, explains errors, counts and logs."""
        start, name = time.perf_counter(), REQUEST_ID.lower()
        metadata = [(k, v) for k, v in context.invocation_metadata() or () if isinstance(v, str)]
        client = self._clients.identify(_address(context), metadata)
        call = _Call(
            service, method, metadata, accepted_id(_first_of(metadata, name) or ""), client
        )
        context.set_trailing_metadata(((name, call.request_id),))
        code, detail = grpc.StatusCode.CANCELLED, ""
        self._calls += 1
        try:
            self._take_place(method)
            if method not in _OPEN:
                self._clients.check(call.client)
            yield call
            code = grpc.StatusCode.OK
        except Exception as error:
            code, detail = _explained(error, call)
        finally:
            self._calls -= 1
            # The requests of a stream of inference have been recorded one by one.
            if method != "ModelStreamInfer" or code.name not in _ENDED:
                self._record(call, code, start)
        if code is not grpc.StatusCode.OK:
            await context.abort(code, detail)

    def _record(self, call: _Call, code: grpc.StatusCode, start: float) -> None:
        """Count an answer, and write it to the access log."""
        seconds = time.perf_counter() - start
        self._service.metrics.answered(f"grpc/{call.method}", code.name, seconds, call.client.key)
        log_access(
            probe=call.method in _PROBES and code.name in _ENDED,
            request_id=call.request_id,
            client=call.client.name,
            method="gRPC",
            path=f"/{call.service}/{call.method}",
            status=code.name,
            ms=round(seconds * 1e3, 3),
        )

    async def _answer(self, method: str, request: Any) -> dict[str, Any]:
        """The response's fields, to every method but inference."""
        service, repository = self._service, self._service.repository
        if method.startswith("Repository") and request.repository_name:
            raise RefusedError(
                400, "There is one repository, which has no name. Leave repository_name out."
            )
        match method:
            case "ServerLive":
                return {"live": True}
            case "ServerReady":
                return {"ready": service.ready}
            case "ModelReady":
                return {"ready": repository.is_ready(request.name, request.version)}
            case "Check":
                return {"status": self._serving(request.service)}
            case "ServerMetadata":
                return documents.ServerMetadata().model_dump()
            case "ModelMetadata":
                return documents.model_metadata(self._card(request)).model_dump()
            case "ModelConfig":
                found = documents.model_config(self._card(request), service.settings)
                return {"config": found.model_dump(exclude_none=True)}
            case "ModelStatistics":
                # These are empty, and only Triton's own messages have them.
                rest_only = {"model_stats": {"__all__": {"response_stats", "memory_usage"}}}
                statistics = service.model_statistics(request.name, request.version)
                return statistics.model_dump(exclude=rest_only)
            case "RepositoryIndex":
                cards = [model.current_card for model in repository]
                index = documents.repository_index(cards, ready=request.ready)
                return {"models": [entry.model_dump(exclude_none=True) for entry in index]}
            case "RepositoryModelLoad":
                await service.load_model(request.model_name, _parameters(request))
            case "RepositoryModelUnload":
                await service.unload_model(request.model_name)
        return {}

    def _serving(self, name: str) -> str:
        """The health of the service, which has two names for itself, or of a model."""
        ready = self._service.ready
        if name not in ("", PROTOCOL.full_name):
            ready &= self._service.repository.get(name).version is not None
        return "SERVING" if ready else "NOT_SERVING"

    async def _watch(self, context: Any, call: _Call) -> AsyncIterator[Any]:
        """The health that the one request asks for, now and at each change."""
        request = await self._first(context)

        def status() -> str:
            try:
                return self._serving(request.service)
            except RefusedError:
                return "SERVICE_UNKNOWN"

        async def changed(told: str) -> str:
            while (found := status()) == told:
                await asyncio.sleep(_WATCH_SECONDS)
            return found

        told = ""
        while True:
            told = await self._idly(changed(told))
            yield MESSAGES["HealthCheckResponse"](status=told)

    async def _infer_stream(self, context: Any, call: _Call) -> AsyncIterator[Any]:
        """Answer a stream's requests, several at a time, in their order."""
        most = min(_STREAM_REQUESTS, self._service.settings.client_limit or _STREAM_REQUESTS)
        room, running = asyncio.Semaphore(most - 1), set[asyncio.Task[Any]]()
        order: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue()

        def begin(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
            running.add(task := asyncio.create_task(work))
            return task

        async def read() -> None:
            try:
                async for request in self._requests(context):
                    order.put_nowait(begin(self._infer_in_stream(request, context, call)))
                    await room.acquire()
            finally:
                order.put_nowait(None)

        reader = begin(read())
        try:
            while (task := await order.get()) is not None:
                yield await task
                running.discard(task)
                room.release()
            await reader  # which says why the stream ends, if it was not the client's doing
        finally:
            for task in running:
                task.cancel()

    async def _infer_in_stream(self, request: Any, context: Any, call: _Call) -> Any:
        """The answer to one of a stream's requests; an error does not end the stream."""
        start, answer = time.perf_counter(), MESSAGES["ModelStreamInferResponse"]()
        code, found = grpc.StatusCode.OK, answer.infer_response
        try:
            found.MergeFrom(await self._infer(request, context, call))
        except Exception as error:
            code, answer.error_message = _explained(error, call)
            found.id = request.id
        # One request, one response, which Triton's clients are told so.
        found.parameters["triton_final_response"].bool_param = True
        self._record(call, code, start)
        return answer

    async def _infer(self, request: Any, context: Any, call: _Call) -> Any:
        service, arrived, size = self._service, time.perf_counter(), request.ByteSize()
        service.check_loaded()
        service.admission.take_body(size)
        try:
            model = service.repository.get(request.model_name, request.model_version)
            read = partial(_read, request, model.current_card, service.settings.max_images)
            # Numbers one by one would keep the event loop.
            wanted = read() if request.raw_input_contents else await service.scheduler.code(read)
            left = context.time_remaining()
            header = timeout_of(_first_of(call.metadata, "x-timeout-ms"))
            limits = wanted.timeout_ms, left and left * 1e3, header
            deadline = service.deadline(*limits, arrived=arrived)
            images, work = len(wanted.images), partial(infer, request=wanted, write=_written)
            answer, stages = await service.answer(model, call.client.name, images, deadline, work)
        finally:
            service.admission.give_body(size)
        service.metrics.later(service.count, model.name, stages, images)
        service.tracing.record(
            f"{call.service}/{call.method}",
            dict(call.metadata),
            time.perf_counter() - arrived,
            stages,
            {"rpc.system": "grpc", "fdconv.model": model.name},
        )
        return answer

    def _card(self, request: Any) -> ModelCard:
        return self._service.repository.get(request.name, request.version).current_card


def _first_of(metadata: list[tuple[str, str]], name: str) -> str | None:
    """The first of a call's entries of that name."""
    return next((value for key, value in metadata if key == name), None)


def _address(context: Any) -> str:
    """The peer's address, of ``ipv4:127.0.0.1:5000``, ``ipv6:%5B::1%5D:5000`` and the like."""
    peer = unquote(context.peer())
    kind, _, rest = peer.partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else peer


def _explained(error: Exception, call: _Call) -> tuple[grpc.StatusCode, str]:
    """The status of an error, and the sentence for the client."""
    found = answer_to(error)
    if found is not None:
        return _CODES.get(found.status, grpc.StatusCode.INVALID_ARGUMENT), found.detail
    log.error("the gRPC request %s (%s) failed", call.request_id, call.method, exc_info=error)
    detail = "The service failed to answer this request; its log says why."
    return grpc.StatusCode.INTERNAL, detail


def _read(request: Any, card: ModelCard, max_images: int) -> InferRequest:
    parameters = _parameters(request)
    for holder in (parameters, *map(_parameters, (*request.inputs, *request.outputs))):
        check_parameters(holder)
    raw = request.raw_input_contents
    if raw and any(given.HasField("contents") for given in request.inputs):
        raise RefusedError(
            400, "Tensors are in raw_input_contents or in their inputs' contents, not in both."
        )
    if raw and len(raw) != len(request.inputs):
        raise RefusedError(400, "raw_input_contents must hold every input's bytes, or none's.")
    inputs = []
    for place, given in enumerate(request.inputs):
        contents = given.contents
        listed = contents.fp32_contents if given.datatype == "FP32" else contents.uint_contents
        data, shape = raw[place] if raw else None, list(given.shape)
        inputs.append(InputTensor(given.name, given.datatype, shape, data, _pieces(listed)))
    timeout = parameters.get("timeout", 0)
    if type(timeout) is not int or timeout < 0:
        raise RefusedError(
            400,
            "The parameter 'timeout' is a whole number of microseconds, 0 for none; found "
            f"{str(timeout)[:40]!r}.",
        )
    names = [output.name for output in request.outputs]
    return infer_request(card, request.id, inputs, names, timeout, max_images)


def _pieces(listed: Any) -> Iterator[Any]:
    """A message's numbers, some at a time: (count,) float64."""
    for at in range(0, len(listed), PIECE):
        yield np.array(listed[at : at + PIECE], np.float64)


def _parameters(holder: Any) -> dict[str, Any]:
    """The parameters of a message, or of a part of it, by name."""
    found = {}
    for name, value in holder.parameters.items():
        kind = value.WhichOneof("parameter_choice")
        found[name] = None if kind is None else getattr(value, kind)
    return found


def _written(request: InferRequest, version: Version, outputs: dict[str, Any]) -> Any:
    answer = MESSAGES["ModelInferResponse"](
        model_name=version.name, model_version=version.card.version, id=request.id
    )
    for name, array in outputs.items():
        answer.outputs.add(name=name, datatype=DATATYPE_OF[array.dtype], shape=array.shape)
        answer.raw_output_contents.append(np.ascontiguousarray(array).tobytes())
    return answer
