"""Who runs when, and when it is enough; by a clock that the tests turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdconv_deploy.latency import Interleaver, ratio, say_ratio
from fdconv_deploy.latency.measure import Schedule, Series, agree, sample_until_steady
from fdconv_deploy.latency.workers import Sample

QUICK = Schedule(seconds=20, warm_up=0, turn=0, window=4)


class Machine:
    """Whose speed changes with every sample taken on it, and whose clock only samples turn."""

    def __init__(self, speed: Callable[[int], float]) -> None:
        self.speed, self.count, self.now = speed, 0, 0.0
        self.order: list[str] = []

    def clock(self) -> float:
        return self.now


class Pretender:
    """Takes ``cost`` units of its machine's time, none of ours."""

    def __init__(self, machine: Machine, name: str, cost: float) -> None:
        self.machine, self.name, self.cost = machine, name, cost

    def sample(self, runs: int, concurrency: int) -> Sample:
        self.machine.order.append(self.name)
        self.machine.count += 1
        one = self.cost * self.machine.speed(self.machine.count)
        self.machine.now += one * runs
        return Sample(seconds=[one] * (runs * concurrency), wall=one * runs)


def sampled(
    schedule: Schedule, speed: Callable[[int], float], *progress, **costs: float
) -> tuple[Machine, list[Series]]:
    machine = Machine(speed)
    made = [Series(Pretender(machine, name, cost).sample) for name, cost in costs.items()]
    sample_until_steady(made, schedule, *progress, clock=machine.clock)
    return machine, made


def test_interleaver_begins_each_round_with_another_target_and_keeps_the_order_of_answers():
    order: list[str] = []
    now = itertools.count()

    def call(name: str, argument: int) -> str:
        order.append(name)
        return f"{name}{argument}"

    calls = [partial(call, name) for name in "abc"]
    timer = Interleaver(calls, clock=lambda: float(next(now)))
    timer.warm_up(0)
    assert [timer.round(number) for number in (1, 2)] == [["a1", "b1", "c1"], ["a2", "b2", "c2"]]
    assert order == list("abc" + "abc" + "bca")
    assert timer.seconds == [[1.0, 1.0]] * 3


def test_a_quiet_machine_is_done_after_three_windows():
    machine, made = sampled(QUICK, lambda _: 1.0, a=0.01, b=0.02, c=0.03)
    assert [len(series.windows) for series in made] == [3, 3, 3]
    assert all(series.steady for series in made)
    assert [series.windows[-1] for series in made] == [0.01, 0.02, 0.03]
    rounds = [machine.order[at : at + 3] for at in range(6, len(machine.order), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {one[0] for one in rounds} == {"a", "b", "c"}  # none is always first


def test_a_machine_that_slows_down_for_ever_is_never_steady_but_its_ratios_are():
    _, made = sampled(QUICK, lambda run: 1.02**run, a=0.01, b=0.02)
    assert not any(series.steady for series in made)
    a, b = made
    assert len(a.samples) == len(b.samples) > 10
    # Being first and being second in a round take turns, too.
    assert ratio(b.medians, a.medians)["value"] == pytest.approx(2.0, rel=0.05)


def test_steady_series_wait_for_the_others():
    calls = itertools.count()
    machine = Machine(lambda _: 1.0)

    class Restless(Pretender):
        def sample(self, runs: int, concurrency: int) -> Sample:
            self.cost = 0.01 if next(calls) > 30 else 0.01 * (1 + next(calls) % 7)
            return super().sample(runs, concurrency)

    calm, restless = Pretender(machine, "calm", 0.01), Restless(machine, "restless", 0.01)
    made = [Series(calm.sample), Series(restless.sample)]
    schedule = Schedule(seconds=60, warm_up=0, turn=0, window=5)
    sample_until_steady(made, schedule, clock=machine.clock)
    assert all(series.steady for series in made)
    assert len(made[0].samples) == len(made[1].samples) > 15


def test_samples_are_as_long_as_the_schedule_says():
    _, (fast, slow) = sampled(
        Schedule(seconds=0, warm_up=0, turn=0.2), lambda _: 1.0, fast=0.001, slow=0.5
    )
    assert (fast.runs, slow.runs) == (200, 1)


def test_warming_up_takes_its_seconds_and_two_runs_at_least():
    for seconds, runs in ((0.0, 2), (0.35, 4)):
        schedule = Schedule(seconds=0, warm_up=seconds, turn=0)
        machine, (series,) = sampled(schedule, lambda _: 1.0, a=0.1)
        assert machine.count - len(series.samples) == runs


def test_time_that_is_up_ends_it_with_a_window_at_least():
    schedule = Schedule(seconds=0, warm_up=0, turn=0, window=5)
    _, (series,) = sampled(schedule, lambda run: 1.5**run, a=0.01)
    assert len(series.samples) == 2
    assert len(series.windows) == 1


def test_progress_counts_rounds():
    seen: list[tuple[int, int, float]] = []
    sampled(QUICK, lambda _: 1.0, lambda *what: seen.append(what), a=0.01)
    assert [rounds for rounds, _, _ in seen] == list(range(1, 13))
    assert seen[-1][2] == pytest.approx(0.12)


def test_ratio_is_of_rounds():
    # A machine that slows down threefold half-way changes no round's ratio.
    found = ratio([2.0, 2.0, 6.0, 6.0], [1.0, 1.0, 3.0, 3.0])
    assert (found["value"], found["q1"], found["q3"]) == (2.0, 2.0, 2.0)


@given(st.floats(0.001, 1000), st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3))
def test_what_agrees_lies_within_the_share(middle, offsets):
    share = 0.03
    medians = [middle * (1 + offset * share * 0.99) for offset in offsets]
    # Within half the share to either side of one value, so within the share of each other.
    assert agree([1e9, *medians], share * 1.02)
    assert agree(medians, share) == (max(medians) - min(medians) <= share * np.median(medians))
    assert not agree(medians[:2], share)
    assert not agree([*medians[:2], middle * 1.2], share)


def test_a_ratio_is_said_where_the_rounds_can_tell():
    assert say_ratio([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]) == (
        "0.50× (0.50 to 0.50 in half of the turns)"
    )
    unclear = say_ratio([1.0, 9.0, 1.0, 9.0], [9.0, 1.0, 9.0, 1.0])
    assert "4 turns cannot tell which is faster" in unclear
