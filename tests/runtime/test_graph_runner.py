"""How warm-up decides what runs a batch, and that every way gives the same answers."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fdconv_deploy.errors import BackendError
from fdconv_deploy.runtime import Bundle, Session, graph_runner, open_session
from tests.runtime import toy

SECOND = 1.0  # what one image takes with all threads, by the test's clock


class Graph:
    def __init__(self, backend: Timed, name: str, seconds: float) -> None:
        self.backend, self.name, self.seconds = backend, name, seconds

    def run(self, feeds):
        images = feeds["images"]
        if self.name == "alone" and self.backend.together is not None:
            self.backend.together.wait()
        with self.backend.lock:
            self.backend.runs.append((self.name, len(images)))
            self.backend.now += self.seconds
        return {"logits": toy.reference_logits(images)}


class Timed:
    """A backend whose graphs take, by its own clock, as many images' time as a test says.

    ``four``: of the graph of four images; ``alone``: of an image on its share of the threads.
    """

    name = device = "timed"
    operators = ""

    def __init__(self, four: float, alone: float, threads: int = 2) -> None:
        self.four, self.alone, self.threads = four, alone, threads
        self.runs: list[tuple[str, int]] = []
        self.loads: list[tuple[int, int | None]] = []
        self.lock = threading.Lock()
        self.now = 0.0
        self.together: threading.Barrier | None = None

    def clock(self) -> float:
        return self.now

    def load(self, bundle: Bundle, batch: int, threads: int | None = None) -> Graph:
        self.loads.append((batch, threads))
        if threads is not None:
            # As many run at a time as there are shares: each adds its part to the clock.
            streams = self.threads // threads
            return Graph(self, "alone", self.alone * SECOND / streams)
        return Graph(self, str(batch), (self.four if batch == 4 else 1.0) * SECOND)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 32, 48)).astype(np.float32)


def runs_of_four(backend: Timed, bundle: Path) -> tuple[Session, list[tuple[str, int]]]:
    """A session that has been warmed up, and what it then runs for four images."""
    session = toy.session(Bundle.open(bundle), backend, clock=backend.clock)
    session.warm_up()
    backend.runs.clear()
    x = images(4)
    assert np.abs(session.run(x) - toy.reference_logits(x)).max() < 1e-6
    return session, backend.runs


@pytest.mark.parametrize(
    ("four", "alone", "ran", "way"),
    [
        (2.0, 8.0, [("4", 4)], "its graph"),
        (8.0, 8.0, [("1", 1)] * 4, "its graph"),  # four single runs, one after another
        (8.0, 1.2, [("alone", 1)] * 4, "single images, 2 at a time"),
    ],
)
def test_the_cheapest_way_is_taken(toy_bundle, four, alone, ran, way) -> None:
    session, runs = runs_of_four(Timed(four, alone), toy_bundle)
    assert runs == ran
    assert session.runner.ways == {1: "its graph", 4: way}
    assert session.runner.batch_cost(4) > session.runner.batch_cost(1) > SECOND


def test_images_side_by_side_run_at_the_same_time(toy_bundle) -> None:
    backend = Timed(8.0, 1.5)
    session, runs = runs_of_four(backend, toy_bundle)
    backend.together = threading.Barrier(2, timeout=60)  # breaks if they came one by one
    session.run(images(4))
    assert runs == [("alone", 1)] * 8


def test_one_thread_has_nothing_to_share(toy_bundle) -> None:
    backend = Timed(8.0, 0.1, threads=1)
    _, runs = runs_of_four(backend, toy_bundle)
    assert runs == [("1", 1)] * 4
    assert backend.loads == [(1, None), (4, None)]


def test_threads_are_shared_out_evenly(toy_bundle) -> None:
    backend = Timed(8.0, 1.2, threads=9)
    session, _ = runs_of_four(backend, toy_bundle)
    assert backend.loads[-1] == (1, 2)
    assert session.runner.ways[4] == "single images, 4 at a time"


def test_only_one_way_stays_in_memory(toy_bundle) -> None:
    session, _ = runs_of_four(Timed(8.0, 1.2), toy_bundle)
    assert session.runner.loaded_batch_sizes == (1, 4)
    assert session.runner._graphs.loaded == (1,)
    session, _ = runs_of_four(Timed(2.0, 8.0), toy_bundle)
    assert session.runner._graphs.loaded == (1, 4)
    assert session.runner._beside.loaded == ()


def test_run_raw_keeps_to_the_graph_it_is_asked_for(toy_bundle) -> None:
    session, runs = runs_of_four(Timed(8.0, 1.2), toy_bundle)
    runs.clear()
    session.run_raw({"images": images(4)})
    assert runs == [("4", 4)]


def test_is_measured_once(toy_bundle) -> None:
    session, runs = runs_of_four(Timed(8.0, 1.2), toy_bundle)
    cost = session.runner.batch_cost
    runs.clear()
    session.warm_up()
    session.warm_up([4])
    assert runs == [("1", 1)] + [("alone", 1)] * 8
    assert session.runner.batch_cost is cost


def test_a_bundle_of_one_size_is_not_timed(tmp_path) -> None:
    toy.make_bundle(tmp_path / "b", batches=(1,))
    backend = Timed(4.0, 1.0)
    toy.session(Bundle.open(tmp_path / "b"), backend).warm_up()
    assert backend.runs == [("1", 1)]


class TestForReal:
    @pytest.fixture
    def session(self, toy_bundle, monkeypatch):
        """ONNX Runtime with images side by side, however fast they are."""
        monkeypatch.setattr(graph_runner, "_BETTER", 1e9)
        with open_session(toy_bundle, "onnxruntime-cpu", threads=2) as opened:
            opened.warm_up()
            assert opened.runner.ways[4] == "single images, 2 at a time"
            yield opened

    def test_threads_get_their_own_answers(self, session) -> None:
        def wrong(seed: int) -> bool:
            x = np.random.default_rng(seed).normal(size=(4, 3, 32, 48)).astype(np.float32)
            return bool(np.abs(session.run_batches({"images": x})["logits"]
                               - toy.reference_logits(x)).max() > 2e-5)  # fmt: skip

        with ThreadPoolExecutor(4) as pool:
            assert not any(pool.map(wrong, range(40)))

    def test_closed(self, session) -> None:
        held = weakref.ref(session.runner._beside.get(2))
        session.close()
        gc.collect()
        assert held() is None
        with pytest.raises(BackendError, match="closed"):
            session.run(images(4))
