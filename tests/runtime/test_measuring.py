from __future__ import annotations

from fdconv_deploy.runtime.batching import least_seconds


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
