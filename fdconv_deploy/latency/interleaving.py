"""Letting sides take turns until their figures stand still.

A machine's speed drifts: its clock, its memory, its neighbours. Sides that take turns all see
the same drift, so their ratios do not. A side's time is taken for steady when the medians of
its last three windows agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

AGREEING = 3


@dataclass(frozen=True)
class Turn:
    """What one turn took: seconds of every run, of all together, and energy if it is known."""

    seconds: tuple[float, ...]
    wall: float
    joules: float | None = None


class Runner(Protocol):
    """What can take a turn: a `handle.Child`, or a stand-in."""

    def turn(self, runs: int, concurrency: int) -> Turn:
        """Run so often in so many threads at once."""


@dataclass(frozen=True)
class Rules:
    """How long to go on.

    Attributes:
        seconds: no round starts after this long.
        warm_up: seconds of each case before anything counts, two runs at the least.
        turn: seconds that a turn shall take; one run if that takes longer.
        window: turns in a window.
        agree: three medians agree when they lie within this share of the middle one.
    """

    seconds: float = 60.0
    warm_up: float = 0.5
    turn: float = 0.2
    window: int = 5
    agree: float = 0.03


@dataclass
class Case:
    """A side at one concurrency, and what its turns took.

    ``rounds``: for each turn, the seconds of its runs. ``walls``, ``joules``: of each turn.
    """

    runner: Runner
    concurrency: int = 1
    runs: int = 1
    rounds: list[list[float]] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    windows: list[float] = field(default_factory=list)
    steady: bool = False

    @property
    def seconds(self) -> list[float]:
        """Of every run that counts."""
        return [second for one in self.rounds for second in one]

    def warm_up(self, rules: Rules) -> None:
        """Run until caches are full and clocks are up; settle how many runs make a turn."""
        start, done = time.perf_counter(), 0
        last = math.inf
        while done < 2 or time.perf_counter() - start < rules.warm_up:
            last = float(np.median(self.runner.turn(1, self.concurrency).seconds))
            done += 1
        self.runs = max(1, round(rules.turn / max(last, 1e-6)))

    def take(self) -> None:
        """One turn that counts."""
        taken = self.runner.turn(self.runs, self.concurrency)
        self.rounds.append(list(taken.seconds))
        self.walls.append(taken.wall)
        if taken.joules is not None:
            self.joules.append(taken.joules)

    def end_window(self, rules: Rules) -> None:
        """Note the window's median, and whether the last three agree."""
        counted = len(self.windows) * rules.window
        window = [second for one in self.rounds[counted:] for second in one]
        self.windows.append(float(np.median(window)))
        self.steady = agree(self.windows, rules.agree)


def agree(medians: Sequence[float], share: float) -> bool:
    """Whether the last three of some medians lie within ``share`` of the middle one."""
    last = sorted(medians[-AGREEING:])
    return len(last) == AGREEING and last[-1] - last[0] <= share * last[1]


def take_turns(
    cases: Sequence[Case],
    rules: Rules,
    progress: Callable[[int, int, float], None] = lambda *_: None,
) -> None:
    """Let cases take turns until each is steady, or time is up.

    Each round starts with another case, so that none always follows the same one. Cases that
    are steady go on while others are not: every case has the same rounds.

    :param progress: told after every turn how many there were, how many cases are steady, and
        the seconds so far.
    """
    for case in cases:
        case.warm_up(rules)
    start = time.perf_counter()
    turns = 0
    while not all(case.steady for case in cases):
        for number in range(rules.window):
            for place in range(len(cases)):
                cases[(place + number) % len(cases)].take()
                turns += 1
                steady = sum(case.steady for case in cases)
                progress(turns, steady, time.perf_counter() - start)
            # A window is cut short only where the next round would be of no use.
            if number >= 1 and time.perf_counter() - start > rules.seconds:
                break
        for case in cases:
            case.end_window(rules)
        if time.perf_counter() - start > rules.seconds:
            return
