"""What whoever runs the service sees: metrics, logs, traces, deadlines, the way down."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import logging.config
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.runtime import open_session
from fdconv_deploy.serve import Settings, create_app
from fdconv_deploy.serve.telemetry import JsonFormatter, log_config
from tests.serve.conftest import wait_until_ready
from tests.serve.test_refusals import refused

PNG = {"Content-Type": "image/png"}


class TestMetrics:
    @pytest.fixture
    def scraped(self, bundles: list[Path], png: bytes) -> str:
        with TestClient(create_app(bundles, Settings(threads=1))) as client:
            wait_until_ready(client)
            for _ in range(3):
                client.post("/v1/segment", content=png, headers=PNG)
            client.post("/v1/segment", content=b"x", headers=PNG)
            client.get("/v1/models/none")
            client.get("/nowhere/at/all")
            return client.get("/metrics").text

    @pytest.mark.parametrize(
        "line",
        [
            'fdconv_requests_total{route="/v1/segment",status="200"} 3.0',
            'fdconv_requests_total{route="/v1/segment",status="415"} 1.0',
            'fdconv_requests_total{route="/v1/models/{name}",status="404"} 1.0',
            'fdconv_requests_total{route="unmatched",status="404"} 1.0',
            'fdconv_images_total{model="street"} 3.0',
            'fdconv_batch_size_count{model="street"} 3.0',
            'fdconv_stage_seconds_count{model="street",stage="inference"} 3.0',
            'fdconv_stage_seconds_count{model="street",stage="decode"} 3.0',
            "fdconv_queue_images 0.0",
            "fdconv_in_hand_images 0.0",
            "fdconv_ready 1.0",
            "process_resident_memory_bytes",
        ],
    )
    def test_count(self, scraped: str, line: str) -> None:
        assert line in scraped

    def test_are_of_the_format(self, client: TestClient) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        names = {family.name for family in text_string_to_metric_families(answer.text)}
        assert {"fdconv_rejected", "fdconv_worker_deaths", "fdconv_model_loads"} <= names


class TestLogs:
    def test_a_line_per_request(self, client: TestClient, png: bytes, caplog) -> None:
        with caplog.at_level(logging.INFO, "fdconv.access"):
            client.post("/v1/segment", content=png, headers={**PNG, "X-Request-ID": "abc"})
        fields = caplog.records[-1].fields
        assert fields["request_id"] == "abc"
        assert (fields["method"], fields["path"], fields["status"]) == ("POST", "/v1/segment", 200)
        assert fields["model"] == "street"
        assert fields["timings_ms"]["inference"] >= 0

    def test_no_line_break_gets_in(self, client: TestClient, caplog) -> None:
        with caplog.at_level(logging.INFO, "fdconv.access"):
            client.get("/v1/models/a%0Ab%22")
        assert "\n" not in caplog.records[-1].getMessage()

    def test_json(self) -> None:
        logger = logging.Logger("x")
        record = logger.makeRecord("x", 20, "f", 1, "hello %s", ("you",), None)
        record.fields = {"request_id": "abc"}
        found = json.loads(JsonFormatter().format(record))
        assert found["message"] == "hello you"
        assert found["level"] == "info"
        assert found["request_id"] == "abc"
        assert found["time"].endswith("+00:00")

    @pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v2/health/ready", "/metrics"])
    def test_probes_are_below_info(self, client: TestClient, caplog, path: str) -> None:
        with caplog.at_level(logging.DEBUG, "fdconv.access"):
            client.get(path)
            client.get("/v1/models")
        assert [record.levelname for record in caplog.records[-2:]] == ["DEBUG", "INFO"]

    def test_a_probe_that_is_refused_is_information(self, bundles: list[Path], caplog) -> None:
        app = create_app(bundles, Settings(threads=1))
        with caplog.at_level(logging.DEBUG, "fdconv.access"), TestClient(app) as client:
            wait_until_ready(client)
            app.state.service.drain()
            assert client.get("/readyz").status_code == 503
        assert caplog.records[-1].levelname == "INFO"

    def test_text_has_the_time(self) -> None:
        config = log_config("info", "text")
        made = logging.config.DictConfigurator(config)
        formatter = made.configure_formatter(config["formatters"]["default"])
        record = logging.Logger("x").makeRecord("x", 20, "f", 1, "hello %s", ("you",), None)
        record.created, record.msecs = 1795921200.25, 250.0
        found = formatter.format(record)
        assert found.startswith("2026-11-29T03:00:00.250+00:00 INFO")
        assert found.endswith("hello you")

    def test_json_config_is_one(self) -> None:
        config = log_config("info", "json")
        assert config["formatters"]["default"]["()"] is JsonFormatter
        logging.config.dictConfigClass(config)


class TestTracing:
    def test_spans(self, bundles: list[Path], png: bytes) -> None:
        pytest.importorskip("opentelemetry.sdk")
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        with TestClient(create_app(bundles, Settings(threads=1, tracing=True))) as client:
            wait_until_ready(client)
            client.post("/v1/segment", content=png, headers={**PNG, "traceparent": parent})
            client.post("/v1/segment", content=b"x", headers=PNG)
            client.get("/healthz")
        found = exporter.get_finished_spans()
        statuses = [span.attributes.get("http.response.status_code") for span in found]
        assert sorted(filter(None, statuses)) == [200, 415]
        spans = {span.name: span for span in reversed(found)}
        assert {"POST /v1/segment", "decode", "queue", "inference", "encode"} <= set(spans)
        whole = spans["POST /v1/segment"]
        assert f"{whole.context.trace_id:032x}" == parent.split("-")[1]
        assert whole.attributes["fdconv.model"] == "street"
        for name in ("decode", "inference", "encode"):
            assert spans[name].parent.span_id == whole.context.span_id
            assert whole.start_time <= spans[name].start_time <= spans[name].end_time

    def test_go_where_the_environment_says(self, bundles: list[Path], png: bytes) -> None:
        """The command, told by OpenTelemetry's own variables, and a collector that listens."""
        pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        got: list[ExportTraceServiceRequest] = []

        class Collector(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                got.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_) -> None:
                pass

        collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        program = (
            "import sys; from serve import Settings, running; import urllib.request as u\n"
            "with running([sys.argv[1]], settings=Settings(threads=1, tracing=True)) as url:\n"
            "    u.urlopen(u.Request(url + '/v1/segment', open(sys.argv[2], 'rb').read(),\n"
            "        {'Content-Type': 'image/png'})).read()\n"
        )
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            Path(file.name).write_bytes(png)
            subprocess.run(
                [sys.executable, "-c", program, str(bundles[0]), file.name],
                env={
                    **os.environ,
                    "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
                    "OTEL_SERVICE_NAME": "segmentation",
                },
                check=True,
                timeout=60,
            )
        collector.shutdown()
        collector.server_close()
        resources = [spans for request in got for spans in request.resource_spans]
        names = {span.name for r in resources for scope in r.scope_spans for span in scope.spans}
        assert {"POST /v1/segment", "inference"} <= names
        labels = {a.key: a.value.string_value for a in resources[0].resource.attributes}
        assert labels["service.name"] == "segmentation"

    def test_an_exporter_that_is_unknown(self, bundles: list[Path], monkeypatch) -> None:
        trace = pytest.importorskip("opentelemetry.trace")
        monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
        with pytest.raises(FDConvError, match="'zipkin', which is not understood"):
            create_app(bundles, Settings(tracing=True))


def held_app(bundles: list[Path], **settings):
    """An application whose model answers when told to."""
    session = open_session(bundles[0], threads=1)
    app = create_app([session], Settings(threads=1, **settings))
    started, go_on = threading.Event(), threading.Event()
    run = session.run_batches

    def held(inputs):
        started.set()
        assert go_on.wait(60)
        return run(inputs)

    return app, session, held, started, go_on


class TestDeadlines:
    def test_of_the_client(self, bundles: list[Path], png: bytes) -> None:
        app, session, held, _, go_on = held_app(bundles)
        with TestClient(app) as client:
            wait_until_ready(client)
            session.run_batches = held
            answer = client.post("/v1/segment", content=png, headers={**PNG, "X-Timeout-Ms": "30"})
            assert "deadline" in refused(answer, 504)
            go_on.set()
        session.close()

    def test_of_the_service(self, bundles: list[Path], png: bytes) -> None:
        app, session, held, _, go_on = held_app(bundles, deadline_ms=30)
        with TestClient(app) as client:
            wait_until_ready(client)
            session.run_batches = held
            refused(client.post("/v1/segment", content=png, headers=PNG), 504)
            go_on.set()
        session.close()

    @pytest.mark.parametrize("given", ["0", "-1", "x", "nan", "inf"])
    def test_that_is_none(self, client: TestClient, png: bytes, given: str) -> None:
        headers = {**PNG, "X-Timeout-Ms": given}
        assert "X-Timeout-Ms" in refused(
            client.post("/v1/segment", content=png, headers=headers), 422
        )


def test_a_client_that_leaves_frees_its_place(bundles: list[Path], png: bytes) -> None:
    app, session, held, started, go_on = held_app(bundles, queue_limit=1)

    async def test() -> None:
        service = app.state.service
        async with app.router.lifespan_context(app):
            while not service.ready:
                await asyncio.sleep(0.005)
            session.run_batches = held
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                first = asyncio.ensure_future(client.post("/v1/segment", content=png, headers=PNG))
                while not started.is_set():
                    await asyncio.sleep(0.002)
                leaves = asyncio.Event()
                second = asyncio.ensure_future(app(*leaving(png, leaves)))
                while service.scheduler.waiting < 1:
                    await asyncio.sleep(0.002)
                leaves.set()
                await second
                assert service.scheduler.waiting == 0
                assert service.admission.in_hand == 1
                go_on.set()
                assert (await first).status_code == 200

    asyncio.run(test())
    session.close()


def leaving(body: bytes, leaves: asyncio.Event):
    """The ASGI side of a client that sends an image and goes when told to."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/segment",
        "raw_path": b"/v1/segment",
        "query_string": b"",
        "headers": [(b"content-type", b"image/png")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    sent = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict:
        if sent:
            return sent.pop()
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        pass

    return scope, receive, send


def test_on_the_way_down_it_is_unready_and_still_answers(bundles: list[Path], png: bytes) -> None:
    app = create_app(bundles, Settings(threads=1))
    with TestClient(app) as client:
        wait_until_ready(client)
        app.state.service.drain()
        assert "stopping" in refused(client.get("/readyz"), 503)
        assert client.get("/healthz").status_code == 200
        answer = client.post("/v1/segment", content=png, headers=PNG)
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"


def test_a_thread_that_dies_costs_its_requests_a_503(bundles: list[Path], png: bytes) -> None:
    session = open_session(bundles[0], threads=1)
    run = session.run_batches
    with TestClient(create_app([session], Settings(threads=1))) as client:
        wait_until_ready(client)

        def die(inputs):
            session.run_batches = run
            raise SystemExit

        session.run_batches = die  # type: ignore[method-assign]
        answer = client.post("/v1/segment", content=png, headers=PNG)
        assert "Send the request again" in refused(answer, 503)
        assert answer.headers["retry-after"] == "1"
        assert client.post("/v1/segment", content=png, headers=PNG).status_code == 200
        assert "fdconv_worker_deaths_total 1.0" in client.get("/metrics").text
    session.close()
