"""``python -m benchmarks.stopwatch``: that its clock measures runs, and what it compares."""

from __future__ import annotations

import pytest

from benchmarks import stopwatch
from tests.runtime import toy


@pytest.fixture
def bundle(tmp_path):
    return toy.make_bundle(tmp_path / "toy", batches=(1,))


def test_the_loop_runs_the_graph(bundle):
    found = stopwatch.stopwatch(bundle.model_path(1), 1, 1000)
    assert 0.001 < found < 5  # milliseconds of a convolution of 32×48 pixels


def test_distances(bundle, monkeypatch):
    rows, walls = iter([100.0, 102.0]), iter([50.0, 90.0, 97.0, 99.0])

    def bench(*_: object) -> dict:
        return {"ms": {"p50": next(rows)}, "steady": True, "others_cpu": None}

    monkeypatch.setattr(stopwatch, "bench", bench)
    monkeypatch.setattr(stopwatch, "stopwatch", lambda *_: next(walls))
    found = stopwatch.measure(bundle.path, threads=1, seconds=1)
    assert found["twice"] == 0.02
    assert found["stopwatch_ms"] == [90.0, 97.0, 99.0]  # the first only tells how many to run
    assert found["outside"] == pytest.approx(102 / 97 - 1, abs=1e-4)
