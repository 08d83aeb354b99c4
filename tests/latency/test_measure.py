"""Targets that cannot be opened: skipped and named, or an error where they were asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.latency import machine
from fdconv_deploy.latency.measure import Schedule, measure
from fdconv_deploy.latency.networks import RunOptions, Target, UnavailableError, expand_targets

BRIEF = Schedule(seconds=0.1, warm_up=0.0, turn=0.01)


@pytest.fixture
def two(toy_bundle: Path, other_bundle: Path) -> list[Target]:
    return expand_targets([toy_bundle, other_bundle], RunOptions(threads=1), batches=[1])[0]


def unnamed(targets: list[Target]) -> list[Target]:
    return [target.model_copy(update={"named": False}) for target in targets]


def starve(monkeypatch: pytest.MonkeyPatch, free: Iterator[float]) -> None:
    """What is free whenever it is asked for."""
    real = machine.memory

    def memory(key: str = "MemAvailable") -> float:
        return next(free) if key == "MemAvailable" else real(key)

    monkeypatch.setattr(machine, "memory", memory)


def test_a_target_too_many_for_the_memory_is_skipped(two, monkeypatch):
    starve(monkeypatch, iter((8e9, 3e8)))
    report = measure(unnamed(two), BRIEF)
    assert [Path(row.source).name for row in report.rows] == ["toy"]
    (skipped,) = report.skipped
    assert skipped.what.startswith("other")
    assert "300 MB of memory are free, and a target held" in skipped.why


def test_asked_for_by_name_it_is_an_error(two, monkeypatch):
    starve(monkeypatch, iter((8e9, 3e8)))
    with pytest.raises(UnavailableError, match=r"other.* is the first too many"):
        measure(two, BRIEF)


def test_no_target_at_all(two, monkeypatch):
    starve(monkeypatch, iter((1e6, 1e6)))
    with pytest.raises(
        FDConvError, match=r"Nothing could be timed\. toy.*: 1 MB of memory are free"
    ):
        measure(unnamed(two), BRIEF)
