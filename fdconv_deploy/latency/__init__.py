"""Latency, throughput, memory and energy of networks side by side: ``fdconv bench``.

Targets are timed in turns, interleaved. A machine's speed drifts: its clock, its memory, its
neighbours. Targets that take turns see the same drift, so ratios of their times hold where
milliseconds do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

R = TypeVar("R")
Clock = Callable[[], float]


class Interleaver(Generic[R]):
    """Calls every target once a round, and keeps each one's ``seconds``, round by round.

    Each round begins with another target, so that none always follows the same one.
    """

    def __init__(
        self, targets: Sequence[Callable[..., R]], clock: Clock = time.perf_counter
    ) -> None:
        self._targets, self._clock, self._rounds = tuple(targets), clock, 0
        self.seconds: list[list[float]] = [[] for _ in targets]

    def warm_up(self, *arguments: Any) -> None:
        """Call every target once, untimed."""
        for target in self._targets:
            target(*arguments)

    def round(self, *arguments: Any) -> list[R]:
        """Call every target with these arguments; the answers in the targets' order."""
        count = len(self._targets)
        answers: dict[int, R] = {}
        for place in range(count):
            index = (self._rounds + place) % count
            start = self._clock()
            answers[index] = self._targets[index](*arguments)
            self.seconds[index].append(self._clock() - start)
        self._rounds += 1
        return [answers[index] for index in range(count)]


def ratio(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """How many times the baseline's time something took, round by round.

    Returns:
        ``value``: the ratio of medians; ``q1`` and ``q3``: quartiles of the rounds' own ratios,
        in which drift between rounds cancels.
    """
    q1, q3 = np.percentile(np.array(times) / np.array(baseline), [25, 75])
    value = np.median(times) / np.median(baseline)
    return {name: round(float(x), 3) for name, x in (("value", value), ("q1", q1), ("q3", q3))}


def say_ratio(times: Sequence[float], baseline: Sequence[float]) -> str:
    """`ratio` for people, if the rounds can tell which of the two is faster."""
    found = ratio(times, baseline)
    if found["q1"] < 1 < found["q3"]:
        rounds = f"{len(times)} turns cannot tell which is faster"
        return f"{rounds}; fdconv bench takes as many as it needs"
    return f"{found['value']:.2f}× ({found['q1']:.2f} to {found['q3']:.2f} in half of the turns)"
