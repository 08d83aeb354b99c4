"""``python -m benchmarks.stability``: its noise, and a small run of it."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import stability
from benchmarks.stability import perturbed, share, size_of


def test_noise_is_a_share_of_the_largest_value():
    x = torch.full((1, 3, 64, 64), -4.0)
    change = perturbed(x, 1e-3, seed=0) - x
    assert change.dtype == torch.float64
    assert float(change.std()) == pytest.approx(4e-3, rel=0.05)


def test_noise_moves_a_frame_of_zeros_too():
    change = perturbed(torch.zeros(1, 3, 64, 64), 1e-3, seed=0)
    assert float(change.std()) == pytest.approx(1e-3, rel=0.05)


def test_share_is_of_the_largest_logit():
    logits = torch.tensor([[-8.0, 1.0]])
    assert share(logits + 2, logits) == pytest.approx(0.25)


def test_size_is_height_by_width():
    assert size_of("64x96") == (64, 96)


def test_prints_every_frame_and_keeps_the_record(tmp_path, monkeypatch, capsys):
    path = tmp_path / "record.json"
    arguments = ["--size", "64x64", "--scenes", "1", "--threads", "1", "--layers", "--json"]
    monkeypatch.setattr(sys, "argv", ["stability", *arguments, str(path)])
    stability.main()
    told = capsys.readouterr().out
    assert "64x64 black bars: " in told
    assert "0 of 13 above 1e-03" in told
    assert "backbone.layer3.5.conv3" in told
    record = json.loads(path.read_text())
    found = record["checkpoints"]["streets.pth"]
    assert len(found) == 13
    assert all(0 < each["noise_float64"] < 1e-3 for each in found)
