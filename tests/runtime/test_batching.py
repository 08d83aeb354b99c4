from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdconv_deploy.runtime.batching import least_seconds, linear_cost, measured_cost, plan_batches


@pytest.mark.parametrize(
    ("images", "sizes", "expected"),
    [
        (0, (1, 4), []),
        (1, (1, 4), [1]),
        (3, (1, 4), [1, 1, 1]),
        (4, (1, 4), [4]),
        (6, (1, 4), [4, 1, 1]),
        (1, (4,), [4]),
        (5, (4,), [4, 4]),
        (5, (3, 4), [3, 3]),
        (9, (1, 2, 8), [8, 1]),
    ],
)
def test_plans(images, sizes, expected) -> None:
    assert plan_batches(images, sizes) == expected


def test_a_backend_where_a_call_costs_more_fills_up_instead() -> None:
    assert plan_batches(3, (1, 4), lambda batch: batch + 1.0) == [4]
    assert plan_batches(2, (1, 4), lambda batch: batch + 1.0) == [1, 1]


@pytest.mark.parametrize(
    ("four", "images", "expected"),
    [
        (4.3, 4, [1, 1, 1, 1]),
        (4.03, 4, [4]),  # no more than noise dearer: fewer runs
        (3.7, 4, [4]),
        (3.7, 6, [4, 1, 1]),
        (3.7, 3, [1, 1, 1]),
        (2.5, 3, [4]),
    ],
)
@pytest.mark.parametrize("second", [1e-3, 7.0])
def test_plans_by_what_was_measured(four, images, expected, second) -> None:
    cost = measured_cost({1: second, 4: four * second})
    assert plan_batches(images, (1, 4), cost) == expected


SIZES = st.lists(st.integers(1, 16), min_size=1, max_size=3, unique=True)


@given(st.integers(1, 200), SIZES)
def test_covers_and_wastes_less_than_the_last_batch(images: int, sizes: list[int]) -> None:
    plan = plan_batches(images, sizes)
    assert set(plan) <= set(sizes)
    assert plan == sorted(plan, reverse=True)
    assert 0 <= sum(plan) - images < plan[-1]


@given(st.integers(1, 12), SIZES)
def test_is_the_cheapest_of_all(images: int, sizes: list[int]) -> None:
    def cost(plan) -> float:
        return sum(map(linear_cost, plan))

    every = (
        plan
        for length in range(1, images + 1)
        for plan in itertools.combinations_with_replacement(sizes, length)
        if sum(plan) >= images
    )
    best = min(cost(plan) for plan in every)
    assert cost(plan_batches(images, sizes)) == pytest.approx(best)


def test_many_images_are_planned_quickly() -> None:
    plan = plan_batches(100_003, (1, 4, 8))
    assert sum(plan) == 100_003


class Clock:
    """Time that passes only in runs."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, *seconds: float):
        left = iter(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += next(left)

        return run


def test_the_least_of_runs_that_take_turns() -> None:
    clock = Clock()
    runs = {"a": clock.run("a", 3, 1, 2), "b": clock.run("b", 0.5, 9, 4)}
    assert least_seconds(runs, rounds=3, seconds=100, clock=clock) == {"a": 1, "b": 0.5}
    assert "".join(clock.order) == "ababab"


def test_no_round_starts_when_time_is_up_but_the_first() -> None:
    clock = Clock()
    runs = {"a": clock.run("a", 4, 1, 1), "b": clock.run("b", 4, 1, 1)}
    assert least_seconds(runs, rounds=9, seconds=9, clock=clock) == {"a": 1, "b": 1}
    assert len(clock.order) == 4
    slow = Clock()
    assert least_seconds({"a": slow.run("a", 60)}, seconds=9, clock=slow) == {"a": 60}
