"""Turns: who runs when, and when it is enough."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdconv_deploy.latency.interleaving import Case, Rules, Turn, agree, take_turns
from benchmarks.timing import ratio

QUICK = Rules(seconds=0.2, warm_up=0, turn=0, window=4)


class Machine:
    """Whose speed changes with every run that anybody makes on it."""

    def __init__(self, speed: Callable[[int], float]) -> None:
        self.speed, self.count = speed, 0
        self.order: list[str] = []


class Pretender:
    """Takes ``cost`` units of its machine's time, none of ours."""

    def __init__(self, machine: Machine, name: str, cost: float) -> None:
        self.machine, self.name, self.cost = machine, name, cost

    def turn(self, runs: int, concurrency: int) -> Turn:
        self.machine.order.append(self.name)
        self.machine.count += 1
        one = self.cost * self.machine.speed(self.machine.count)
        return Turn((one,) * (runs * concurrency), one * runs)


def cases(speed: Callable[[int], float], **costs: float) -> tuple[Machine, list[Case]]:
    machine = Machine(speed)
    return machine, [Case(Pretender(machine, name, cost)) for name, cost in costs.items()]


def test_a_quiet_machine_is_done_after_three_windows():
    machine, made = cases(lambda _: 1.0, a=0.01, b=0.02, c=0.03)
    take_turns(made, QUICK)
    assert [len(case.windows) for case in made] == [3, 3, 3]
    assert all(case.steady for case in made)
    assert [case.windows[-1] for case in made] == [0.01, 0.02, 0.03]
    rounds = [machine.order[at : at + 3] for at in range(6, len(machine.order), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {one[0] for one in rounds} == {"a", "b", "c"}  # none is always first


def test_a_machine_that_slows_down_for_ever_is_never_steady_but_its_ratios_are():
    _, made = cases(lambda run: 1.02 ** (run % 1000), a=0.01, b=0.02)
    take_turns(made, QUICK)
    assert not any(case.steady for case in made)
    a, b = made
    assert len(a.rounds) == len(b.rounds) > 10
    found = ratio([one[0] for one in b.rounds], [one[0] for one in a.rounds])
    # Being first and being second in a round take turns, too.
    assert found["value"] == pytest.approx(2.0, rel=0.05)


def test_steady_cases_wait_for_the_others():
    calls = itertools.count()
    machine = Machine(lambda _: 1.0)

    class Restless(Pretender):
        def turn(self, runs: int, concurrency: int) -> Turn:
            self.cost = 0.01 if next(calls) > 30 else 0.01 * (1 + next(calls) % 7)
            return super().turn(runs, concurrency)

    made = [Case(Pretender(machine, "calm", 0.01)), Case(Restless(machine, "restless", 0.01))]
    take_turns(made, Rules(seconds=60, warm_up=0, turn=0, window=5))
    assert all(case.steady for case in made)
    assert len(made[0].rounds) == len(made[1].rounds) > 15


def test_turns_are_as_long_as_asked_for():
    _, (fast, slow) = cases(lambda _: 1.0, fast=0.001, slow=0.5)
    for case in (fast, slow):
        case.warm_up(Rules(warm_up=0, turn=0.2))
    assert (fast.runs, slow.runs) == (200, 1)


def test_time_that_is_up_ends_it_with_a_window_at_least():
    _, made = cases(lambda run: 1.5 ** (run % 1000), a=0.01)
    take_turns(made, Rules(seconds=0, warm_up=0, turn=0, window=5))
    assert len(made[0].rounds) == 2
    assert len(made[0].windows) == 1


def told() -> Iterator[tuple[int, int, float]]:
    seen: list[tuple[int, int, float]] = []
    _, made = cases(lambda _: 1.0, a=0.01)
    take_turns(made, QUICK, lambda *what: seen.append(what))
    return iter(seen)


def test_progress_counts_turns():
    assert [turns for turns, _, _ in told()] == list(range(1, 13))


@given(st.floats(0.001, 1000), st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3))
def test_what_agrees_lies_within_the_share(middle, offsets):
    share = 0.03
    medians = [middle * (1 + offset * share * 0.99) for offset in offsets]
    # Within half the share to either side of one value, so within the share of each other.
    assert agree([1e9, *medians], share * 1.02)
    assert agree(medians, share) == (max(medians) - min(medians) <= share * np.median(medians))
    assert not agree(medians[:2], share)
    assert not agree([*medians[:2], middle * 1.2], share)
