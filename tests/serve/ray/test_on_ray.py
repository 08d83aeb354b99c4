"""The service on Ray: a cluster of this machine alone, with two replicas of toy bundles."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import psutil
import pytest
import yaml
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import ValidationError

ray = pytest.importorskip("ray", reason="needs pip install 'ray[serve]'")
from ray import serve  # noqa: E402
from ray.exceptions import ActorDiedError, RayTaskError  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from benchmarks.serving.harness import kserve_request  # noqa: E402
from benchmarks.serving.ray import cluster as ray_cluster  # noqa: E402
from fdconv_deploy.errors import BackendError, FDConvError  # noqa: E402
from fdconv_deploy.runtime import Bundle, open_session  # noqa: E402
from fdconv_deploy.serve import Settings, create_app  # noqa: E402
from fdconv_deploy.serve.batching import DeadlineError, WorkerDiedError  # noqa: E402
from fdconv_deploy.serve.ray import app, run  # noqa: E402
from fdconv_deploy.serve.ray.ingress import ReplicaRunner  # noqa: E402
from fdconv_deploy.serve.ray.model import model_id  # noqa: E402
from fdconv_deploy.serve.settings import RaySettings  # noqa: E402
from tests.runtime import toy  # noqa: E402
from tests.serve.conftest import encoded, wait_until_ready  # noqa: E402

YAML = Path(__file__).parents[3] / "serve" / "ray" / "serve.yaml"
LIMITS = {"max_body_bytes": 400_000, "max_pixels": 40_000}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(object_store_mb=80):
        yield


@pytest.fixture(scope="module")
def on_ray(cluster: None, bundles: list[Path], detectors: list[Path]) -> Iterator[httpx.Client]:
    serve.start(http_options={"port": 0}, proxy_location="HeadOnly")
    serve.run(
        app(
            RaySettings(
                bundles=[*bundles, *detectors],
                replicas=2,
                models_per_replica=4,
                batch_delay_ms=20,
                **LIMITS,
            )
        ),
        name="fdconv",
    )
    port = serve.status().proxies and listening()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        yield client


def listening() -> int:
    """The port of Ray's proxy."""
    (proxy,) = processes("ProxyActor")
    ports = [c.laddr.port for c in proxy.net_connections("tcp") if c.status == "LISTEN"]
    for port in ports:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/-/healthz", timeout=10).text == "success":
                return port
        except httpx.HTTPError:
            continue
    raise AssertionError(ports)


def processes(kind: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith(f"ray::{kind}"):
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


@pytest.fixture(scope="module")
def alone(bundles: list[Path], detectors: list[Path]) -> Iterator[TestClient]:
    """The same models and limits in one process."""
    made = create_app([*bundles, *detectors], Settings(threads=1, **LIMITS))
    with TestClient(made, raise_server_exceptions=False) as opened:
        wait_until_ready(opened)
        yield opened


def same(answer: httpx.Response) -> tuple[int, str, bytes]:
    """Status, type and body, but for what differs from one run to another."""
    body = re.sub(rb'"timings_ms":\{[^}]*\}|"request_id":"[^"]*"', b"", answer.content)
    return answer.status_code, answer.headers.get("content-type", ""), body


@pytest.mark.parametrize("model", ["street", "sliding", "things", "boxes"])
@pytest.mark.parametrize("accept", ["application/json", "image/png", "application/zip"])
def test_answers_are_those_of_one_process(on_ray, alone, png, model: str, accept: str) -> None:
    asked = dict(content=png, headers={"Content-Type": "image/png", "Accept": accept})
    answers = [client.post(f"/v1/models/{model}/segment", **asked) for client in (on_ray, alone)]
    assert same(answers[0]) == same(answers[1])
    assert answers[0].status_code == (200 if model != "boxes" or "json" in accept else 406)
    for name in ("X-Model", "X-Fit", "X-Mode"):
        assert answers[0].headers.get(name) == answers[1].headers.get(name)


def test_two_replicas_give_the_sessions_logits_bit_for_bit(on_ray, bundles, proved) -> None:
    rng, before = np.random.default_rng(0), batches(on_ray)
    with open_session(bundles[0], threads=1) as session:
        height, width = session.input_size
        images = rng.normal(size=(16, 1, 3, height, width)).astype(np.float32)
        for image in images[:8]:
            assert logits(on_ray, image).tobytes() == session.run(image).tobytes()
        ran, count = np.subtract(batches(on_ray), before)
        assert (ran, count) == (8, 8)  # one by one
        # Asked for together they share batches, whose graph may round otherwise.
        found, expected = logits(on_ray, images[:, 0]), session.run(images[:, 0])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        ran, count = np.subtract(batches(on_ray), before)
    assert count == 8 + 16
    assert ran < 8 + 16
    proved("Ray Serve's two replicas answer as one session, bit for bit")


def logits(client: httpx.Client, images: np.ndarray) -> np.ndarray:
    """(N, classes, h, w) of (N, 3, H, W), by KServe v2 with binary tensors."""
    path, body, headers = kserve_request(images, "street")
    answer = client.post(path, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    head = int(answer.headers["Inference-Header-Content-Length"])
    shape = json.loads(answer.content[:head])["outputs"][0]["shape"]
    return np.frombuffer(answer.content[head:], np.float32).reshape(shape)


def batches(client: httpx.Client) -> list[float]:
    """How many batches have run of "street", and images in them."""
    text = client.get("/metrics").text
    lines = [f'fdconv_batch_size_{what}{{model="street"}} ' for what in ("count", "sum")]
    return [float(text.partition(line)[2].partition("\n")[0] or 0) for line in lines]


def test_refusals_are_those_of_one_process(on_ray, alone, png, picture) -> None:
    image = {"Content-Type": "image/png"}
    requests = [
        ("GET", "/nothing", {}),
        ("DELETE", "/v1/segment", {}),
        ("POST", "/v1/models/none/segment", dict(content=png, headers=image)),
        ("POST", "/v1/segment?mode=round", dict(content=png, headers=image)),
        ("POST", "/v1/segment", dict(content=b"no image", headers=image)),
        ("POST", "/v1/segment", dict(content=png[:-90], headers=image)),
        ("POST", "/v1/segment", dict(content=png, headers={"Content-Type": "text/plain"})),
        ("POST", "/v1/segment", dict(content=png, headers={**image, "Accept": "text/plain"})),
        ("POST", "/v1/segment", dict(content=png, headers={**image, "X-Timeout-Ms": "soon"})),
        ("POST", "/v1/segment", dict(content=bytes(500_000), headers=image)),
        ("POST", "/v1/segment", dict(content=encoded(np.tile(picture, (4, 4, 1)), "PNG"))),
        ("POST", "/v2/models/street/infer", dict(json={"inputs": []})),
        ("POST", "/v2/models/none/infer", dict(json={"inputs": []})),
        ("POST", "/v2/repository/models/street/load", {}),
    ]
    for method, path, options in requests:
        answers = [client.request(method, path, **options) for client in (on_ray, alone)]
        assert same(answers[0]) == same(answers[1]), path
        assert answers[0].status_code >= 400
        assert len(answers[0].headers.get_list("X-Request-ID")) == 1
    unreadable = [(b"content-type", b"image/png"), (b"x-request-id", b"\xff")]
    assert on_ray.post("/v1/segment", content=png, headers=unreadable).status_code == 400
    for path in ("/", "/docs", "/openapi.json", "/v1/models/street", "/v2", "/v2/models/street"):
        assert on_ray.get(path).status_code == alone.get(path).status_code == 200


def test_a_client_that_left_is_counted_as_such(on_ray) -> None:
    head = b"POST /v1/segment HTTP/1.1\r\nHost: ray\r\nContent-Type: image/png\r\n"

    def counted() -> bool:
        with socket.create_connection(("127.0.0.1", on_ray.base_url.port or 0)) as client:
            client.sendall(head + b"Content-Length: 1000\r\n\r\nimage")
            time.sleep(0.3)  # for the ingress to have it
        return 'segment",status="499"' in on_ray.get("/metrics").text

    until(counted)
    assert 'status="0"' not in on_ray.get("/metrics").text


def test_killed_processes_cost_no_answer(on_ray, png) -> None:
    expected, over = same(ask(on_ray, png)), threading.Event()
    before = {process.pid for process in processes("ServeReplica:fdconv:Model")}
    assert len(before) == 2

    def client(_: int) -> list[httpx.Response]:
        found = []
        while not over.is_set():
            found.append(ask(on_ray, png))
        return found

    with ThreadPoolExecutor(8) as pool:
        clients = pool.map(client, range(8))
        try:
            time.sleep(0.5)
            for pid in before:  # the second while the first's is not back
                psutil.Process(pid).kill()
                time.sleep(0.5)
            until(lambda: len(processes("ServeReplica:fdconv:Model")) == 2)
            (ingress,) = processes("ServeReplica:fdconv:Ingress")
            ingress.kill()
            until(lambda: ask(on_ray, png).status_code == 200)
        finally:
            over.set()
        answers = [answer for found in clients for answer in found]
    assert before.isdisjoint(p.pid for p in processes("ServeReplica:fdconv:Model"))
    # What had both replicas, or the ingress, is told to come again.
    told = [answer for answer in answers if answer.status_code != 200]
    assert all(a.status_code == 503 and a.headers["Retry-After"] for a in told), told[0].text
    assert {same(answer) for answer in answers if answer.status_code == 200} == {expected}


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ask(
    client: httpx.Client, png: bytes, path: str = "/v1/segment", key: str = ""
) -> httpx.Response:
    headers = {"Content-Type": "image/png", "Accept": "image/png", "X-API-Key": key}
    return client.post(path, content=png, headers=headers)


def test_a_bundle_that_is_not_there_is_said(cluster, tmp_path) -> None:
    made = app(RaySettings(bundles=[tmp_path / "gone"]))
    with pytest.raises(RuntimeError):
        serve.run(made, name="gone", route_prefix="/gone")
    deployment = serve.status().applications["gone"].deployments["Ingress"]
    assert f"{tmp_path / 'gone'} does not exist. Check the path." in deployment.message
    serve.delete("gone")


def test_a_replaced_bundle_is_followed(on_ray, tmp_path, png) -> None:
    """Of an application of its own, with keys, in a folder whose name is no ASCII.

    And a replica starts without a bundle that went.
    """
    folder, keys = tmp_path / "modèles %41", tmp_path / "keys"
    toy.make_bundle(folder / "one", seed=5)
    assert model_id(Bundle.open(folder / "one")).isascii()
    keys.write_text("first\nsecond\n")
    arguments = RaySettings(
        bundles=[folder / "one", toy.make_bundle(folder / "two").path],
        reload_seconds=0.2,
        threads=1,
        api_keys_file=keys,
    )
    serve.run(app(arguments), name="changing", route_prefix="/changing")
    assert ask(on_ray, png, "/changing/v1/segment").status_code == 401
    expected = {}
    for seed in (5, 6):
        with open_session(toy.make_bundle(tmp_path / str(seed), seed=seed), threads=1) as session:
            image = np.asarray(Image.open(io.BytesIO(png)))
            expected[seed] = session.segment(image).labels

    def mask() -> np.ndarray:
        answer = ask(on_ray, png, "/changing/v1/segment", "second")
        assert answer.status_code == 200, answer.text
        return np.asarray(Image.open(io.BytesIO(answer.content)))

    np.testing.assert_array_equal(mask(), expected[5])
    toy.make_bundle(folder / "one", seed=6, overwrite=True)
    until(lambda: np.array_equal(mask(), expected[6]))
    shutil.rmtree(folder / "two")
    (replica,) = processes("ServeReplica:changing:Model")
    replica.kill()
    np.testing.assert_array_equal(mask(), expected[6])
    serve.delete("changing")


def test_a_bundle_that_went_is_said_by_a_new_replica(on_ray, tmp_path, png) -> None:
    """At once, not at the deadline: a replica starts without any bundle, too."""
    path = toy.make_bundle(tmp_path / "lone").path
    serve.run(app(RaySettings(bundles=[path], threads=1)), name="lone", route_prefix="/lone")
    assert ask(on_ray, png, "/lone/v1/segment").status_code == 200
    shutil.rmtree(path)
    (replica,) = processes("ServeReplica:lone:Model")
    replica.kill()
    answer = ask(on_ray, png, "/lone/v1/segment")
    assert (answer.status_code, "cannot be run" in answer.text) == (503, True)
    serve.delete("lone")


def test_an_address_where_nobody_listens_is_said_at_once(bundles) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for address in (f"127.0.0.1:{port}", "nowhere", "127.0.0.1:99999"):
        with pytest.raises(FDConvError, match=r"(?i)no (Ray cluster answers|address of a Ray)"):
            run(RaySettings(bundles=bundles), address)


def test_a_token_that_is_missing_is_said(cluster, bundles, tmp_path) -> None:
    command = [sys.executable, "-m", "fdconv_deploy", "serve", str(bundles[0]), "--ray"]
    command.append(ray.get_runtime_context().gcs_address)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none"),
    }
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 1
    assert "wants a token. Set RAY_AUTH_MODE=token" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_serve_yaml_is_one(tmp_path) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(YAML.read_text()))
    (application,) = config.applications
    assert application.import_path == "fdconv_deploy.serve.ray:app"
    made = app(RaySettings.model_validate(application.args))
    names = {deployment.name for deployment in application.deployments}
    assert made._bound_deployment.name == "Ingress"
    assert names == {"Model"}


def test_arguments_take_what_a_command_line_gives() -> None:
    given = {"bundles": "/models/a,/models/b", "replicas": "2", "deadline_ms": "500"}
    found = RaySettings.model_validate({**given, "formats": "PNG,JPEG", "api_keys": "a"})
    assert found.bundles == (Path("/models/a"), Path("/models/b"))
    assert found.formats == ("PNG", "JPEG")
    assert [key.get_secret_value() for key in found.api_keys] == ["a"]
    assert (found.replicas, found.deadline_ms) == (2, 500)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": 2}, "replicas"),
        ({"grpc_port": 1}, "gRPC"),
        ({"isolation": "process"}, "process of its own"),
        ({"replicas": 3, "max_replicas": 2}, "less than replicas"),
        ({"replica": 3}, "replica"),
        ({"bundles": []}, "bundles"),
    ],
)
def test_arguments_that_do_nothing_here_are_refused(given: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RaySettings.model_validate({"bundles": ["bundle"], **given})


class Response:
    """A call's answer: a value, an error, or none ever."""

    def __init__(self, answer: object) -> None:
        self.answer, self.cancelled = answer, False

    def __await__(self):
        yield from asyncio.sleep(3600 if self.answer is None else 0).__await__()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def cancel(self) -> None:
        self.cancelled = True


def answer_of(bundle: Path, answers: list[object], seconds: float = 600.0):
    """What a runner makes of its replicas' answers, how many were lost, and the calls."""
    calls = [Response(answer) for answer in answers]
    left, lost = iter(calls), []
    handle = SimpleNamespace(run=SimpleNamespace(remote=lambda *_: next(left)))
    handle.options = lambda **_: handle
    deaths = SimpleNamespace(inc=lambda: lost.append(1))
    service = SimpleNamespace(settings=Settings(), metrics=SimpleNamespace(deaths=deaths))
    runner = ReplicaRunner(Bundle.open(bundle), handle, service)
    try:
        found: object = asyncio.run(runner.run({}, time.perf_counter() + seconds))
    except Exception as error:
        found = error
    return found, len(lost), calls


def test_what_a_dead_replica_had_is_sent_to_another_once(bundles) -> None:
    answer, lost, _ = answer_of(bundles[0], [ActorDiedError(), "answer"])
    assert (answer, lost) == ("answer", 1)
    answer, lost, _ = answer_of(bundles[0], [ActorDiedError(), ActorDiedError(), "answer"])
    assert isinstance(answer, WorkerDiedError)
    assert lost == 2


def test_a_deadline_ends_what_a_replica_has_to_do(bundles) -> None:
    answer, lost, calls = answer_of(bundles[0], [None], seconds=0.05)
    assert isinstance(answer, DeadlineError)
    assert lost == 0
    assert calls[0].cancelled


def test_a_replicas_own_error_is_not_sent_again(bundles) -> None:
    error = RayTaskError("run", "traceback", BackendError("It has no memory."))
    answer, lost, _ = answer_of(bundles[0], [error.as_instanceof_cause()])
    assert isinstance(answer, BackendError)
    assert str(answer) == "It has no memory."
    assert lost == 0
