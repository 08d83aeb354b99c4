"""Inference in worker processes: the same answers, and a crash that costs one request."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient

from fdconv_deploy.errors import BackendError
from fdconv_deploy.runtime import Bundle, Session, open_session
from fdconv_deploy.serve import Settings, create_app
from fdconv_deploy.serve.batching import WorkerDiedError
from fdconv_deploy.serve.workers import BundleMemory, Child, Children, WorkerRunner
from tests.runtime import toy
from tests.runtime.test_bundle import relist
from tests.serve.conftest import wait_until_ready
from tests.serve.kserve.conftest import free_port
from tests.serve.test_refusals import refused
from tests.serve.test_segment_request import decode

PNG = {"Content-Type": "image/png"}


def isolated_session(bundle: Bundle, settings: Settings, children: Children) -> Session:
    return Session(bundle, WorkerRunner(bundle, settings, children))


@pytest.fixture(scope="module")
def isolated(bundles: list[Path]) -> Iterator[TestClient]:
    settings = Settings(threads=1, isolation="process", backend="onnxruntime-cpu")
    with TestClient(create_app(bundles, settings)) as client:
        wait_until_ready(client)
        yield client


def children(client: TestClient) -> Children:
    return client.app.state.service.children  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["street", "sliding"])
def test_the_same_answers(isolated, client, png: bytes, name: str) -> None:
    url = f"/v1/models/{name}/segment"
    here = client.post(url, content=png, headers=PNG).json()
    there = isolated.post(url, content=png, headers=PNG).json()
    assert np.array_equal(decode(there["mask"]), decode(here["mask"]))


def test_the_card_says_so(isolated: TestClient) -> None:
    assert "worker processes" in isolated.get("/v1/models/street").json()["backend"]


def test_a_killed_worker_is_replaced(isolated: TestClient, png: bytes) -> None:
    before = children(isolated).all[0].pid
    os.kill(before, signal.SIGKILL)
    answer = isolated.post("/v1/segment", content=png, headers=PNG)
    assert "Send the request again" in refused(answer, 503)
    assert answer.headers["retry-after"] == "1"
    assert children(isolated).all[0].pid != before
    for name in ("street", "sliding"):
        again = isolated.post(f"/v1/models/{name}/segment", content=png, headers=PNG)
        assert again.status_code == 200
    assert "fdconv_worker_deaths_total 1.0" in isolated.get("/metrics").text


def test_a_terminals_signals_do_not_end_workers(isolated: TestClient, png: bytes) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(children(isolated).all[0].pid, number)
    assert isolated.post("/v1/segment", content=png, headers=PNG).status_code == 200


def test_a_worker_starts_without_a_word(bundles: list[Path], capfd) -> None:
    settings = Settings(threads=1, isolation="process", backend="onnxruntime-cpu")
    workers = Children(settings)
    workers.start()
    workers.close()
    assert capfd.readouterr().err == ""


class TestDirectly:
    @pytest.fixture
    def started(self) -> Iterator[Children]:
        made = Children(Settings(threads=1, backend="onnxruntime-cpu", run_timeout_seconds=60))
        made.start()
        yield made
        made.close()

    def test_sizes_of_all_kinds(self, started: Children, bundles: list[Path]) -> None:
        bundle = Bundle.open(bundles[0])
        session = isolated_session(bundle, Settings(backend="onnxruntime-cpu"), started)
        session.warm_up()
        with open_session(bundle, threads=1) as here:
            for count in (1, 7, 4, 2):
                x = np.random.default_rng(count).normal(size=(count, 3, 32, 48))
                x = x.astype(np.float32)
                assert np.allclose(session.run(x), here.run(x), rtol=1e-5, atol=1e-5)

    def test_an_answer_larger_than_its_question(self, started: Children, tmp_path: Path) -> None:
        bundle = toy.make_bundle(tmp_path / "b", arch=toy.architecture(90))
        session = isolated_session(bundle, Settings(backend="onnxruntime-cpu"), started)
        session.warm_up()
        assert session.run(np.zeros((1, 3, 32, 48), np.float32)).shape == (1, 90, 8, 12)

    def test_one_that_hangs_is_replaced(self, started: Children, bundles: list[Path]) -> None:
        session = isolated_session(
            Bundle.open(bundles[0]), Settings(backend="onnxruntime-cpu"), started
        )
        session.warm_up()
        zeros = np.zeros((1, 3, 32, 48), np.float32)
        child = started.all[0]
        patient = child._settings
        child._settings = patient.model_copy(update={"run_timeout_seconds": 0.5})
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(WorkerDiedError, match=r"within 0\.5 s"):
            session.run(zeros)
        child._settings = patient
        assert session.run(zeros).shape == (1, 5, 8, 12)

    def test_a_model_is_closed_whose_worker_died(self, bundles: list[Path]) -> None:
        """Also in the other workers, as a service ends or a bundle is loaded again."""
        made = Children(Settings(threads=1, workers=2, backend="onnxruntime-cpu"))
        made.start()
        session = isolated_session(Bundle.open(bundles[0]), Settings(), made)
        session.warm_up()
        os.kill(made.all[0].pid, signal.SIGKILL)
        session.close()
        assert not any(child._models for child in made.all)
        made.close()

    def test_each_is_used(self, bundles: list[Path], monkeypatch) -> None:
        """Also once a thread that runs no requests has run something: what times a model."""
        made = Children(Settings(threads=1, workers=2, backend="onnxruntime-cpu"))
        made.start()
        session = isolated_session(Bundle.open(bundles[0]), Settings(), made)
        session.warm_up()
        zeros, run = np.zeros((1, 3, 32, 48), np.float32), Child.run
        with ThreadPoolExecutor(1) as loader:
            loader.submit(session.run, zeros).result()
        both = threading.Barrier(2, timeout=60)

        def together(*given):
            both.wait()
            return run(*given)

        monkeypatch.setattr(Child, "run", together)
        with ThreadPoolExecutor(2) as threads:
            assert len(list(threads.map(session.run, [zeros, zeros]))) == 2
        made.close()

    def test_errors_come_through(self, started: Children, tmp_path: Path) -> None:
        path = toy.make_bundle(tmp_path / "b").path
        onnx.save(toy.segmentor_model(1, 32, 48, 7), str(path / "model.b1.onnx"))
        relist(path, "model.b1.onnx")
        (path / "weights.bin").write_bytes(toy.weight(7).tobytes())
        relist(path, "weights.bin")
        session = isolated_session(Bundle.open(path), Settings(backend="onnxruntime-cpu"), started)
        with pytest.raises(BackendError, match="but the bundle's manifest says"):
            session.warm_up()

    def test_a_new_worker_needs_no_folder(self, started: Children, tmp_path: Path) -> None:
        bundle = toy.make_bundle(tmp_path / "b")
        session = isolated_session(bundle, Settings(backend="onnxruntime-cpu"), started)
        session.warm_up()
        x = np.random.default_rng(0).normal(size=(4, 3, 32, 48)).astype(np.float32)
        before = session.run(x)
        shutil.rmtree(bundle.path)
        os.kill(started.all[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError):
            session.run(x)
        assert np.array_equal(session.run(x), before)
        session.close()

    @pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux seals memory")
    def test_what_was_hashed_cannot_be_changed(self, tmp_path: Path) -> None:
        memory = BundleMemory(toy.make_bundle(tmp_path / "b"))
        with pytest.raises(PermissionError):
            os.pwrite(memory.file, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(memory.file, 0)
        memory.close()

    def test_processes_end_with_their_pipe(self, bundles: list[Path]) -> None:
        made = Children(Settings(threads=1, backend="onnxruntime-cpu"))
        made.start()
        child = made.all[0]
        process = child._process
        child._pipe.close()
        assert process.wait(60) == 0
        os.close(child._memory.file)


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_folder_with_files_of_the_users_own_names(
    bundles: list[Path], tmp_path: Path, png: bytes, isolation: str
) -> None:
    """``fdconv serve`` where a user's own serve.py, export.py and tests.py lie."""
    for name in ("serve", "export", "tests"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user was imported')")
    port = free_port()
    command = [sys.executable, "-m", "fdconv_deploy", "serve", str(bundles[0]), "--port", str(port)]
    command += ["--isolation", isolation, "--threads", "1", "--backend", "onnxruntime-cpu"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        while not is_ready(url):
            assert process.poll() is None, process.communicate()[1]
        answer = httpx.post(f"{url}/v1/segment", content=png, headers=PNG, timeout=60)
        assert answer.status_code == 200
    finally:
        process.terminate()
        process.communicate()


def is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz").status_code == 200
    return False
