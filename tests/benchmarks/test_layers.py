"""``python -m benchmarks.layers``: the figure from a result, and a small run of it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.cases import Case
from benchmarks.layers import convolutions, draw, measure, show

NAMES = ("network.layer2.0.conv1", "network.layer2.0.conv2", "network.layer3.0.conv1")


def result() -> dict:
    def layers(scale: float, dynamic: bool) -> list[dict]:
        assembly = {"kernel assembly": 3.0 * scale} if dynamic else {}
        return [{"name": name, "ms": {"convolutions": scale, **assembly}} for name in NAMES]

    sides = {"eager": (4.0, True), "exported": (1.0, True), "plain": (0.5, False)}
    return {
        "title": "R50", "runs": 3, "others_cpu": 0.0,
        "sides": {
            side: {
                "parts": dict.fromkeys(
                    ("convolutions", "kernel assembly", "band modulation", "attention", "rest"), 1.0
                ),
                "layers": [{"name": "network.conv1", "ms": {"convolutions": 9.0}}, *layers(*how)],
            }
            for side, how in sides.items()
        },
    }  # fmt: skip


def test_only_dynamic_layers_are_compared():
    found = convolutions(result())
    assert tuple(found) == NAMES
    assert found["network.layer3.0.conv1"] == {"eager": 16.0, "exported": 4.0, "plain": 0.5}


def test_the_figure_says_what_was_measured(capsys):
    text = draw(result())
    ElementTree.fromstring(text)
    said = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert "as published, PyTorch: 48 ms" in said
    assert "exported, ONNX Runtime: 12 ms" in said
    assert "stage 2: 2 layers" in said
    assert "fill: #ffffff" not in text  # nothing behind it: it stands on dark pages, too
    assert draw(result()) == text
    show(result())
    assert "all 3 dynamic layers                48.0        12.0         1.5" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_a_narrow_run(tmp_path):
    case = Case("backbone", 50, 64, 64, 1, kernel_num=16, channels=16)
    found = measure(case, tmp_path, threads=1, runs=2)
    layers = convolutions(found)
    assert len(layers) > 30
    # Every dynamic layer is found in all of them, under the network's name for it.
    assert all(spent > 0 for one in layers.values() for spent in one.values())
    assert found["sides"]["plain"]["parts"]["kernel assembly"] == 0
    for side in ("eager", "exported"):
        assert all(found["sides"][side]["parts"].values())
