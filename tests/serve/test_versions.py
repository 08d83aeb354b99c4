"""What a model's card says of time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fdconv_deploy.runtime import open_session
from fdconv_deploy.serve.model_repository import timed_runs


def test_card_times_runs_of_the_network_alone(bundles: list[Path], monkeypatch) -> None:
    """Every batch size more than once, the least of them taken; no loading, no pixels."""
    with open_session(bundles[0], threads=1) as session:
        session.warm_up()
        ran: list[int] = []
        run = session.run_batches

        def recorded(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            ran.append(len(feeds["images"]))
            return run(feeds)

        monkeypatch.setattr(session, "run_batches", recorded)
        monkeypatch.setattr(session, "pipeline", None)
        found = timed_runs(session)
        assert [entry.batch for entry in found] == list(session.batch_sizes)
        assert set(ran) == set(session.batch_sizes)
        assert len(ran) > len(found)
