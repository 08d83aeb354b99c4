from __future__ import annotations

import gc
import itertools

import pytest

from benchmarks.timing import FEWEST_ROUNDS, interleave, spread


class TestInterleave:
    def test_every_target_runs_once_a_round_and_warm_up_does_not_count(self) -> None:
        order: list[str] = []
        targets = {name: (lambda name=name: order.append(name)) for name in "abc"}
        times = interleave(targets, rounds=6, warm_up=2)
        assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 6)
        assert len(order) == 3 * (6 + 2)
        rounds = [order[start : start + 3] for start in range(0, len(order), 3)]
        assert all(sorted(one) == list("abc") for one in rounds)
        assert {one[0] for one in rounds} == set("abc")  # none is always first

    def test_stops_after_its_time_but_not_before_the_fewest_rounds(self) -> None:
        ticks = itertools.count()
        times = interleave(
            {"slow": lambda: None}, rounds=1000, seconds=0.0, clock=lambda: float(next(ticks))
        )
        assert times["slow"] == [1.0] * FEWEST_ROUNDS

    def test_garbage_is_not_collected_meanwhile_and_is_afterwards(self) -> None:
        seen = []
        interleave({"a": lambda: seen.append(gc.isenabled())}, rounds=2)
        assert not any(seen)
        assert gc.isenabled()
        with pytest.raises(ZeroDivisionError):
            interleave({"a": lambda: 1 / 0})
        assert gc.isenabled()


def test_spread() -> None:
    assert spread([0.004, 0.001, 0.002, 0.003, 0.010]) == {
        "median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "runs": 5,
    }  # fmt: skip
