from __future__ import annotations

import gc
import time

import pytest

from fdconv_deploy.latency.machine import Bystanders, describe
from benchmarks.timing import FEWEST_ROUNDS, interleave, ratio, spread


class TestInterleave:
    def test_every_side_runs_once_a_round_and_warm_up_does_not_count(self) -> None:
        order: list[str] = []
        sides = {name: (lambda name=name: order.append(name)) for name in "abc"}
        times = interleave(sides, rounds=6, warm_up=2)
        assert {side: len(values) for side, values in times.items()} == dict.fromkeys("abc", 6)
        assert len(order) == 3 * (6 + 2)
        rounds = [order[start : start + 3] for start in range(0, len(order), 3)]
        assert all(sorted(one) == list("abc") for one in rounds)
        assert {one[0] for one in rounds} == set("abc")  # none is always first

    def test_stops_after_its_time_but_not_before_the_fewest_rounds(self) -> None:
        times = interleave({"slow": lambda: time.sleep(0.002)}, rounds=1000, seconds=0.0)
        assert len(times["slow"]) == FEWEST_ROUNDS

    def test_garbage_is_not_collected_meanwhile_and_is_afterwards(self) -> None:
        seen = []
        interleave({"a": lambda: seen.append(gc.isenabled())}, rounds=2)
        assert not any(seen)
        assert gc.isenabled()
        with pytest.raises(ZeroDivisionError):
            interleave({"a": lambda: 1 / 0})
        assert gc.isenabled()


def test_spread_and_ratio() -> None:
    assert spread([0.004, 0.001, 0.002, 0.003, 0.010]) == {
        "median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "runs": 5,
    }  # fmt: skip
    # A machine that slows down threefold half-way changes no round's ratio.
    found = ratio([2.0, 2.0, 6.0, 6.0], [1.0, 1.0, 3.0, 3.0])
    assert (found["value"], found["q1"], found["q3"]) == (2.0, 2.0, 2.0)


def test_machine_says_what_a_reader_must_know() -> None:
    found = describe(threads=2)
    assert found["threads"] == 2
    assert found["cpu"]
    assert found["cores"] >= 1
    assert set(found["versions"]) >= {"torch", "onnxruntime"}
    assert found["date"].endswith("UTC")


def test_own_work_is_not_others() -> None:
    with Bystanders() as others:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
    assert others.share is None or 0 <= others.share <= 1
