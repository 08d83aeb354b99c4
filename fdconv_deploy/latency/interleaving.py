"""Interleaved timing: targets take turns, so that a machine's drift slows all of them alike.

A machine's speed drifts: its clock, its memory, its neighbours. Targets that take turns see the
same drift, so ratios of their times hold where milliseconds do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import BaseModel

from fdconv_deploy.latency.machine import Reading
from fdconv_deploy.runtime.backends.base import Phases

R = TypeVar("R")
Clock = Callable[[], float]
# So many windows must agree.
AGREEING = 3


class Interleaver(Generic[R]):
    """Calls every target once a round, and keeps the seconds of each call.

    Each round begins with another target, so that none always follows the same one.

    Args:
        targets: what is called.
        clock: seconds, as `time.perf_counter` gives them.

    Attributes:
        seconds: for each target, the seconds of each round.
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


class Sample(BaseModel):
    """One turn of a target.

    Attributes:
        seconds: of each run.
        wall: seconds of all runs together.
        joules: of all runs, where they are known.
        phases: on a GPU, of runs after those.
        readings: of the GPU meanwhile.
        peak_mb: the most memory that the process ever held; it, and what follows, where known.
        cpu_seconds: CPU time of the process so far.
        device_mb: GPU memory taken since the process started.
    """

    seconds: list[float]
    wall: float
    joules: float | None = None
    phases: list[Phases] = []
    readings: list[Reading] = []
    peak_mb: int | None = None
    cpu_seconds: float = 0.0
    device_mb: int | None = None


@dataclass(frozen=True)
class Schedule:
    """How long targets take turns.

    Attributes:
        seconds: no round starts after this long.
        warm_up: seconds of each target that do not count, two runs at the least.
        turn: seconds that one target runs for in a round; one run if that takes longer.
        window: rounds in a window.
        agree: three windows agree when their medians lie within this share of the middle one.
    """

    seconds: float = 60.0
    warm_up: float = 0.5
    turn: float = 0.2
    window: int = 5
    agree: float = 0.03


@dataclass
class Series:
    """A target at one concurrency, and its samples: one for each round.

    Attributes:
        sample: runs the target so often in so many threads, as `workers.Worker.sample` does.
        runs: in a sample, and thread.
        windows: median seconds of each window.
        steady: whether the last three windows agree.
    """

    sample: Callable[[int, int], Sample]
    concurrency: int = 1
    runs: int = 1
    samples: list[Sample] = field(default_factory=list)
    windows: list[float] = field(default_factory=list)
    steady: bool = False

    @property
    def seconds(self) -> list[float]:
        """Of every run that counts."""
        return [second for sample in self.samples for second in sample.seconds]

    @property
    def medians(self) -> list[float]:
        """Median seconds of each round."""
        return [float(np.median(sample.seconds)) for sample in self.samples]

    def warm_up(self, schedule: Schedule, clock: Clock) -> None:
        """Run until caches are full and clocks are up; settle how many runs make a sample."""
        start, done, last = clock(), 0, 0.0
        while done < 2 or clock() - start < schedule.warm_up:
            last = float(np.median(self.sample(1, self.concurrency).seconds))
            done += 1
        self.runs = max(1, round(schedule.turn / max(last, 1e-6)))

    def take(self) -> None:
        """Take a sample."""
        self.samples.append(self.sample(self.runs, self.concurrency))

    def end_window(self, schedule: Schedule) -> None:
        """Note the window's median, and whether the last three agree."""
        window = self.samples[len(self.windows) * schedule.window :]
        self.windows.append(float(np.median([s for sample in window for s in sample.seconds])))
        self.steady = agree(self.windows, schedule.agree)


def agree(medians: Sequence[float], share: float) -> bool:
    """Whether the last three of some medians lie within ``share`` of the middle one."""
    last = sorted(medians[-AGREEING:])
    return len(last) == AGREEING and last[-1] - last[0] <= share * last[1]


def sample_until_steady(
    series: Sequence[Series],
    schedule: Schedule,
    progress: Callable[[int, int, float], None] = lambda *_: None,
    clock: Clock = time.perf_counter,
) -> None:
    """Warm series up, and sample them in turn until each is steady, or time is up.

    Series that are steady go on while others are not: all have the same rounds.

    Args:
        progress: called after every round with the number of rounds, the number of steady
            series and the seconds so far.
        clock: seconds, as `time.perf_counter` gives them.
    """
    for one in series:
        one.warm_up(schedule, clock)
    turns = Interleaver([one.take for one in series], clock)
    start, rounds, elapsed = clock(), 0, 0.0
    while not all(one.steady for one in series) and (not rounds or elapsed <= schedule.seconds):
        for number in range(schedule.window):
            turns.round()
            rounds, elapsed = rounds + 1, clock() - start
            progress(rounds, sum(one.steady for one in series), elapsed)
            # A window is cut short only where the next round would be of no use.
            if number >= 1 and elapsed > schedule.seconds:
                break
        for one in series:
            one.end_window(schedule)


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
