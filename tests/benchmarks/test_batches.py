"""``python -m benchmarks.batches`` on a tiny network."""

from __future__ import annotations

import json
from functools import partial

from benchmarks import batches
from fdconv_deploy.runtime import Session

TINY = "--depth 18 --size 64 --kernel-num 4 --channels 8 --threads 1 --rounds 5 --sides portable"


def test_one_image_and_four(tmp_path, capsys, monkeypatch):
    """By a clock that a run turns: 3 ms an image in one graph, 8 ms where they are divided."""
    now, run_raw, run_batches = [0.0], Session.run_raw, Session.run_batches

    def in_one(session: Session, feeds):
        now[0] += 0.003 * len(feeds["input"])
        return run_raw(session, feeds)

    def divided(session: Session, feeds):
        now[0] += 0.008 * len(feeds["input"])
        return run_batches(session, feeds)

    monkeypatch.setattr(Session, "run_raw", in_one)
    monkeypatch.setattr(Session, "run_batches", divided)
    clock = partial(batches.interleave, clock=lambda: now[0])
    monkeypatch.setattr(batches, "interleave", clock)
    batches.main([*TINY.split(), "--json", str(tmp_path / "b.json")])
    result = json.loads((tmp_path / "b.json").read_text())
    assert set(result["sides"]) == {"portable"}
    found = result["sides"]["portable"]
    ms = {name: value["median"] for name, value in found["ms"].items()}
    assert ms == {"one": 3, "graph": 12, "divided": 32}
    assert found["of one"]["graph"]["value"] == 4
    printed = capsys.readouterr().out
    assert "10.67 times one" in printed
    assert "of the CPUs" in printed
