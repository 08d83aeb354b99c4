"""Sides that cannot be opened: left out and said, or an error where they were asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.latency import machine
from fdconv_deploy.latency.interleaving import Rules
from fdconv_deploy.latency.measure import measure
from fdconv_deploy.latency.targets import Plan, UnavailableError, plan

BRIEF = Rules(seconds=0.1, warm_up=0.0, turn=0.01)


@pytest.fixture
def two(toy_bundle: Path, other_bundle: Path) -> Plan:
    return plan([toy_bundle, other_bundle], threads=1, batches=[1])


def unnamed(asked: Plan) -> Plan:
    return replace(asked, sides=tuple(replace(side, named=False) for side in asked.sides))


def starve(monkeypatch: pytest.MonkeyPatch, free: Iterator[float]) -> None:
    """What is free whenever it is asked for."""
    real = machine.memory

    def memory(key: str = "MemAvailable") -> float:
        return next(free) if key == "MemAvailable" else real(key)

    monkeypatch.setattr(machine, "memory", memory)


def test_a_side_too_many_for_the_memory_is_left_out(two, monkeypatch):
    starve(monkeypatch, iter((8e9, 3e8)))
    report = measure(unnamed(two), BRIEF)
    assert [Path(row["source"]).name for row in report["rows"]] == ["toy"]
    (left_out,) = report["skipped"]
    assert left_out["what"].startswith("other")
    assert "300 MB of memory are free, and a side held" in left_out["why"]


def test_asked_for_by_name_it_is_an_error(two, monkeypatch):
    starve(monkeypatch, iter((8e9, 3e8)))
    with pytest.raises(UnavailableError, match=r"other.* is the first too many"):
        measure(two, BRIEF)


def test_no_side_at_all(two, monkeypatch):
    starve(monkeypatch, iter((1e6, 1e6)))
    with pytest.raises(
        FDConvError, match=r"Nothing could be timed\. toy.*: 1 MB of memory are free"
    ):
        measure(unnamed(two), BRIEF)
