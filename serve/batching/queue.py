"""What waits, and what runs next: the policy alone, without threads or a clock of its own.

Every model has a lane, served in the order of arrival. A batch holds items of one lane only,
as many as the cheapest plan over the bundle's batch sizes starts with. Between lanes,
inference time is shared out by weight (start-time fair queueing): each lane carries the time
it has used divided by its weight, the lane with the least goes next, and a lane that was idle
starts from where the others are, so that it neither pays nor saves for its absence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fdconv_deploy.runtime.batching import linear_cost, plan_batches

# Of a new measurement of a lane's seconds per image, against those before.
_SMOOTHING = 0.2
# Seconds per image that a lane is charged in advance before it was ever measured: enough that
# workers take turns.
_UNKNOWN = 0.001


@dataclass(eq=False)
class Item:
    """One image's input, waiting; times are in seconds of one clock."""

    payload: Any  # what the worker needs
    enqueued: float
    deadline: float = float("inf")
    alone: bool = False  # never batched with others


@dataclass(eq=False)
class Batch:
    """Items of one lane that run together."""

    lane: Hashable
    items: list[Item]
    charged: float


@dataclass(eq=False)
class _Lane:
    sizes: tuple[int, ...]
    cost: Callable[[int], float]
    weight: float
    waiting: deque[Item] = field(default_factory=deque)
    used: float = 0.0  # seconds of inference over weight
    running: int = 0
    seconds_per_item: float | None = None


class BatchQueue:
    """The lanes. Times are seconds of the caller's clock; nothing here blocks.

    Args:
        max_batch: The largest batch; a lane's own largest size when None.
        delay: Seconds that the oldest item of a batch that is not full waits for others.
    """

    def __init__(self, *, max_batch: int | None = None, delay: float = 0.0) -> None:
        self._max_batch, self._delay = max_batch, delay
        self._lanes: dict[Hashable, _Lane] = {}
        self._clock = 0.0  # where a lane that was idle starts
        self.waiting = 0

    def add_lane(
        self,
        key: Hashable,
        sizes: Sequence[int],
        *,
        cost: Callable[[int], float] = linear_cost,
        weight: float = 1.0,
    ) -> None:
        """Open the lane ``key`` for batches of these sizes."""
        limit = self._max_batch
        allowed = tuple(size for size in sizes if limit is None or size <= limit)
        self._lanes[key] = _Lane(allowed or (min(sizes),), cost, weight)

    def remove_lane(self, key: Hashable) -> None:
        """Close a lane; whatever waits in it is forgotten."""
        self.waiting -= len(self._lanes.pop(key).waiting)

    def push(self, key: Hashable, item: Item) -> None:
        """Queue an item in its lane."""
        lane = self._lanes[key]
        if not lane.waiting and not lane.running:
            lane.used = max(lane.used, self._clock)
        lane.waiting.append(item)
        self.waiting += 1

    def cancel(self, key: Hashable, item: Item) -> None:
        """Forget an item, if it still waits."""
        lane = self._lanes.get(key)
        if lane is not None and item in lane.waiting:
            lane.waiting.remove(item)
            self.waiting -= 1

    def pop(self, now: float) -> Batch | float | None:
        """The batch to run now, else when to ask again, else None: nothing waits.

        Items past their deadline are dropped; whoever waits for them knows the deadline too.
        """
        wake: float | None = None
        chosen: _Lane | None = None
        chosen_key: Hashable = None
        for key, lane in self._lanes.items():
            self._drop_late(lane, now)
            if not lane.waiting:
                continue
            ready_at = self._ready_at(lane)
            if ready_at > now:
                wake = ready_at if wake is None else min(wake, ready_at)
            elif chosen is None or lane.used < chosen.used:
                chosen, chosen_key = lane, key
        if chosen is None:
            return wake
        self._clock = max(self._clock, chosen.used)
        items = self._take(chosen)
        # Charged in advance by what it cost before, so that several workers do not all
        # choose the lane whose bill has not come yet; `done` settles the difference.
        charged = (chosen.seconds_per_item or _UNKNOWN) * len(items)
        chosen.used += charged / chosen.weight
        chosen.running += 1
        return Batch(chosen_key, items, charged)

    def done(self, batch: Batch, seconds: float) -> None:
        """Say what a batch took; its lane is charged for it."""
        lane = self._lanes.get(batch.lane)
        if lane is None:
            return
        lane.running -= 1
        lane.used += (seconds - batch.charged) / lane.weight
        each, before = seconds / len(batch.items), lane.seconds_per_item
        lane.seconds_per_item = each if before is None else before + _SMOOTHING * (each - before)

    def backlog_seconds(self) -> float:
        """How long one worker would take for everything that waits, as far as is known."""
        return sum(
            len(lane.waiting) * (lane.seconds_per_item or 0.0) for lane in self._lanes.values()
        )

    def _ready_at(self, lane: _Lane) -> float:
        full = len(lane.waiting) >= max(lane.sizes) or lane.waiting[0].alone
        return lane.waiting[0].enqueued + (0.0 if full else self._delay)

    def _take(self, lane: _Lane) -> list[Item]:
        most, together, count = min(len(lane.waiting), max(lane.sizes)), 0, 1
        while together < most and not lane.waiting[together].alone:
            together += 1
        if together > 1:
            count = min(plan_batches(together, lane.sizes, lane.cost)[0], together)
        self.waiting -= count
        return [lane.waiting.popleft() for _ in range(count)]

    def _drop_late(self, lane: _Lane, now: float) -> None:
        if any(item.deadline <= now for item in lane.waiting):
            kept = deque(item for item in lane.waiting if item.deadline > now)
            self.waiting -= len(lane.waiting) - len(kept)
            lane.waiting = kept
