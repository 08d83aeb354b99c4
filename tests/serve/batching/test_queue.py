"""The policy, parameter by parameter, on a clock of the test's own."""

from __future__ import annotations

import pytest
from fdconv_deploy.serve.batching.queue import Batch, BatchQueue, Item

from fdconv_deploy.runtime.batching import measured_cost


def filled(queue: BatchQueue, lane: str, *names: str, at: float = 0.0, **options) -> list[Item]:
    items = [Item(name, at, **options) for name in names]
    for item in items:
        queue.push(lane, item)
    return items


def names(found: Batch | float | None) -> list[str]:
    assert isinstance(found, Batch), found
    return [item.payload for item in found.items]


def drained(queue: BatchQueue, *, seconds_per_item: float = 1.0, now: float = 0.0) -> list[str]:
    """Lanes in the order in which they are served, by one worker."""
    order = []
    while isinstance(batch := queue.pop(now), Batch):
        order.append(str(batch.lane))
        queue.done(batch, seconds_per_item * len(batch.items))
    return order


class TestBatches:
    def test_nothing_waits(self) -> None:
        queue = BatchQueue()
        assert queue.pop(0.0) is None
        queue.add_lane("a", (1, 4))
        assert queue.pop(0.0) is None

    @pytest.mark.parametrize(
        ("waiting", "sizes", "batches"),
        [
            (1, (1, 4), [1]),
            (3, (1, 4), [1, 1, 1]),
            (4, (1, 4), [4]),
            (6, (1, 4), [4, 1, 1]),
            (9, (1, 2, 4), [4, 4, 1]),
            (3, (2,), [2, 1]),
        ],
    )
    def test_sizes_of_the_bundle(self, waiting: int, sizes, batches: list[int]) -> None:
        queue = BatchQueue()
        queue.add_lane("a", sizes)
        filled(queue, "a", *map(str, range(waiting)))
        found = []
        while isinstance(batch := queue.pop(0.0), Batch):
            found.append(batch)
        assert [len(batch.items) for batch in found] == batches
        assert [name for batch in found for name in names(batch)] == list(map(str, range(waiting)))
        assert queue.waiting == 0

    def test_cost_decides_whether_a_batch_is_padded(self) -> None:
        """Where a call is dear and images are cheap, three run in one batch of four."""
        queue = BatchQueue()
        queue.add_lane("gpu", (1, 4), cost=lambda batch: 5 + 0.1 * batch)
        filled(queue, "gpu", "x", "y", "z")
        assert names(queue.pop(0.0)) == ["x", "y", "z"]

    @pytest.mark.parametrize(("four", "batches"), [(4.4, [1, 1, 1, 1]), (3.7, [4])])
    def test_a_batch_measured_to_be_dear_is_not_made(self, four, batches: list[int]) -> None:
        queue = BatchQueue()
        queue.add_lane("a", (1, 4), cost=measured_cost({1: 0.2, 4: 0.2 * four}))
        filled(queue, "a", *"wxyz")
        assert [len(names(queue.pop(0.0))) for _ in batches] == batches
        assert queue.waiting == 0

    def test_max_batch(self) -> None:
        queue = BatchQueue(max_batch=2)
        queue.add_lane("a", (1, 2, 4))
        filled(queue, "a", *"wxyz")
        assert [len(names(queue.pop(0.0))) for _ in range(2)] == [2, 2]

    def test_max_batch_below_the_smallest_graph(self) -> None:
        queue = BatchQueue(max_batch=1)
        queue.add_lane("a", (4,))
        filled(queue, "a", *"wxyz")
        assert len(names(queue.pop(0.0))) == 4

    def test_never_of_two_models(self) -> None:
        queue = BatchQueue()
        for lane in "ab":
            queue.add_lane(lane, (4,))
            filled(queue, lane, f"{lane}1", f"{lane}2")
        assert sorted([names(queue.pop(0.0)), names(queue.pop(0.0))]) == [
            ["a1", "a2"],
            ["b1", "b2"],
        ]

    def test_alone(self) -> None:
        queue = BatchQueue()
        queue.add_lane("a", (4,))
        filled(queue, "a", "1", "2")
        filled(queue, "a", "slide", alone=True)
        filled(queue, "a", "3")
        assert [names(queue.pop(0.0)) for _ in range(3)] == [["1", "2"], ["slide"], ["3"]]


class TestDelay:
    def test_without_a_delay_nobody_waits(self) -> None:
        queue = BatchQueue(delay=0.0)
        queue.add_lane("a", (1, 4))
        filled(queue, "a", "x", at=10.0)
        assert names(queue.pop(10.0)) == ["x"]

    def test_the_oldest_waits_so_long_and_no_longer(self) -> None:
        queue = BatchQueue(delay=0.5)
        queue.add_lane("a", (4,))
        filled(queue, "a", "x", at=10.0)
        assert queue.pop(10.0) == 10.5
        filled(queue, "a", "y", at=10.4)
        assert queue.pop(10.4) == 10.5
        assert names(queue.pop(10.5)) == ["x", "y"]

    def test_a_full_batch_does_not_wait(self) -> None:
        queue = BatchQueue(delay=0.5)
        queue.add_lane("a", (2,))
        filled(queue, "a", "x", "y", at=10.0)
        assert names(queue.pop(10.0)) == ["x", "y"]

    def test_a_model_that_waits_does_not_hold_up_another(self) -> None:
        queue = BatchQueue(delay=0.5)
        queue.add_lane("a", (4,))
        queue.add_lane("b", (1,))
        filled(queue, "a", "x", at=10.0)
        filled(queue, "b", "y", at=10.0)
        assert names(queue.pop(10.0)) == ["y"]
        assert queue.pop(10.0) == 10.5


class TestFairness:
    def test_time_is_shared_not_requests(self) -> None:
        """A model three times as slow gets a third of the turns."""
        queue = BatchQueue()
        for lane in ("slow", "fast"):
            queue.add_lane(lane, (1,))
            filled(queue, lane, *map(str, range(40)))
        used = {"slow": 0.0, "fast": 0.0}
        for _ in range(40):
            batch = queue.pop(0.0)
            assert isinstance(batch, Batch)
            seconds = 3.0 if batch.lane == "slow" else 1.0
            used[str(batch.lane)] += seconds
            queue.done(batch, seconds)
        assert abs(used["slow"] - used["fast"]) <= 3.0

    def test_a_flood_does_not_starve_the_other(self) -> None:
        queue = BatchQueue()
        queue.add_lane("flood", (1,))
        queue.add_lane("rare", (1,))
        filled(queue, "flood", *map(str, range(100)))
        for _ in range(50):
            batch = queue.pop(0.0)
            assert isinstance(batch, Batch)
            queue.done(batch, 1.0)
        filled(queue, "rare", "x")
        assert names(queue.pop(0.0)) == ["x"]

    def test_idle_time_is_not_saved_up(self) -> None:
        """A model idle for long does not then lock the others out."""
        queue = BatchQueue()
        for lane in "ab":
            queue.add_lane(lane, (1,))
        filled(queue, "a", *map(str, range(60)))
        for _ in range(40):
            batch = queue.pop(0.0)
            assert isinstance(batch, Batch)
            queue.done(batch, 1.0)
        filled(queue, "b", *map(str, range(20)))
        assert abs(drained(queue)[:20].count("a") - 10) <= 1

    def test_weights(self) -> None:
        queue = BatchQueue()
        queue.add_lane("heavy", (1,), weight=3.0)
        queue.add_lane("light", (1,))
        for lane in ("heavy", "light"):
            filled(queue, lane, *map(str, range(60)))
        assert abs(drained(queue)[:40].count("heavy") - 30) <= 1

    def test_several_workers_do_not_pile_on_one_lane(self) -> None:
        """What runs is charged before it is done, by what it took before."""
        queue = BatchQueue()
        for lane in "ab":
            queue.add_lane(lane, (1,))
            filled(queue, lane, *map(str, range(10)))
        drained_once = [queue.pop(0.0), queue.pop(0.0)]
        for batch in drained_once:
            assert isinstance(batch, Batch)
            queue.done(batch, 1.0)
        running = [queue.pop(0.0) for _ in range(4)]
        assert sorted(str(batch.lane) for batch in running if isinstance(batch, Batch)) == [*"aabb"]


class TestWhatDoesNotRun:
    def test_past_its_deadline(self) -> None:
        queue = BatchQueue()
        queue.add_lane("a", (1,))
        filled(queue, "a", "late", deadline=5.0)
        filled(queue, "a", "x", deadline=9.0)
        assert names(queue.pop(5.0)) == ["x"]
        assert queue.waiting == 0

    def test_cancelled(self) -> None:
        queue = BatchQueue()
        queue.add_lane("a", (4,))
        first, second = filled(queue, "a", "x", "y")
        queue.cancel("a", first)
        assert queue.waiting == 1
        assert names(queue.pop(0.0)) == ["y"]
        queue.cancel("a", second)  # runs already; nothing to forget
        assert queue.waiting == 0

    def test_a_lane_that_was_closed(self) -> None:
        queue = BatchQueue()
        queue.add_lane("a", (1,))
        filled(queue, "a", "x")
        queue.remove_lane("a")
        assert queue.waiting == 0
        assert queue.pop(0.0) is None


def test_backlog_is_known_from_what_was_measured() -> None:
    queue = BatchQueue()
    queue.add_lane("a", (1,))
    filled(queue, "a", *"wxyz")
    assert queue.backlog_seconds() == 0.0
    batch = queue.pop(0.0)
    assert isinstance(batch, Batch)
    queue.done(batch, 2.0)
    assert queue.backlog_seconds() == pytest.approx(6.0)
