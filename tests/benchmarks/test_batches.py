"""``python -m benchmarks.batches`` on a tiny network."""

from __future__ import annotations

import json
import time

import pytest

from benchmarks import batches
from fdconv_deploy.runtime import Session

TINY = "--depth 18 --size 64 --kernel-num 4 --channels 8 --threads 1 --rounds 5 --sides portable"


def test_one_image_and_four(tmp_path, capsys, monkeypatch):
    real = Session.run_batches

    def slow(session: Session, feeds):
        time.sleep(0.5)
        return real(session, feeds)

    monkeypatch.setattr(Session, "run_batches", slow)
    batches.main([*TINY.split(), "--json", str(tmp_path / "b.json")])
    result = json.loads((tmp_path / "b.json").read_text())
    found = result["sides"]["portable"]
    ms = {name: value["median"] for name, value in found["ms"].items()}
    assert set(result["sides"]) == {"portable"}
    assert 0 < ms["one"] < ms["graph"] < ms["divided"]
    assert ms["divided"] > 500
    for name in ("graph", "divided"):
        assert found["of one"][name]["value"] == pytest.approx(ms[name] / ms["one"], rel=0.1)
    printed = capsys.readouterr().out
    assert f"{found['of one']['divided']['value']:.2f} times one" in printed
    assert "of the CPUs" in printed
