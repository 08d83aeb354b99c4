"""What a model's card says of time."""

from __future__ import annotations

import numpy as np

from serve.versions import timed_runs


class Recorded:
    """A session that notes the batches it runs, and has nothing else to do."""

    batch_sizes = (1, 4)

    def __init__(self) -> None:
        self.ran: list[int] = []

    def blank(self, count: int) -> np.ndarray:
        return np.zeros((count, 3, 2, 2), np.float32)

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.ran.append(len(batch))
        return batch


def test_card_times_runs_of_the_network_alone() -> None:
    """Every batch size more than once, the least of them taken; no loading, no pixels."""
    session = Recorded()
    found = timed_runs(session)  # type: ignore[arg-type]
    assert [entry.batch for entry in found] == [1, 4]
    assert set(session.ran) == {1, 4}
    assert len(session.ran) > len(found)
