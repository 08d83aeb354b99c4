"""The GPU kernels' numbers, in Triton's interpreter, against the float64 layer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install triton)", allow_module_level=True)

from tests.ops.gpu.cases import BANDS, LAYERS, NETWORKS

ROOT = Path(__file__).parents[3]
TOLERANCE = {"float32": 2e-6, "float16": 1.5e-3, "bfloat16": 1.3e-2}
FAST = [name for name, case in LAYERS.items() if not case.slow]
SLOW = [name for name, case in LAYERS.items() if case.slow]


def interpreted(*names: str) -> dict[str, Any]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.ops.gpu.cases", *names]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return interpreted(*FAST, *BANDS, *NETWORKS)


def check_layer(name: str, result: dict[str, Any]) -> None:
    assert "failed" not in result, result["failed"]
    case = LAYERS[name]
    assert result["kernel"] <= TOLERANCE[case.dtype]
    assert result["layer"] <= TOLERANCE[case.dtype]
    assert result["memory format"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FAST)
def test_a_layer(results, name, proved):
    check_layer(name, results[name])
    proved("layers through the interpreted GPU kernels, equal to the float64 layer", 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SLOW)
def test_a_large_layer(name):
    check_layer(name, interpreted(name)[name])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", BANDS)
def test_band_modulation(results, name, proved):
    result = results[name]
    assert "failed" not in result, result["failed"]
    assert result["bands"] <= TOLERANCE[BANDS[name].dtype]
    assert result["memory format"]
    proved("band modulations through the interpreted GPU kernel, equal to float64", 1)


@pytest.mark.timeout(900)
def test_the_cases_meet_what_they_are_named_for(results):
    assert results["second slots"]["second slots"]
    assert results["more than 256 attentions"]["wide"]
    assert results["dense rows"]["dense"] == [True, False]
    assert results["dense columns"]["dense"] == [False, True]
    assert results["dense both"]["dense"] == [True, True]
    assert results["2x2"]["dense"] == [False, True]
    assert results["pointwise, more in, features scaled"]["sides"] == ["feature", "feature"]
    assert results["pointwise"]["attends"]
    for name in ("no spatial, softmax", "more than 256 attentions", "dense rows"):
        assert not results[name]["attends"], name
    assert results["complex rows, batch 2"]["complex rows"]
    assert not results["symmetric rows"]["complex rows"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["network", "network, half, last"])
def test_a_network(results, name):
    result = results[name]
    assert "failed" not in result, result["failed"]
    half = "half" in name
    assert result["network"] <= (5e-3 if half else 4e-6)
    assert result["dtype"] == ("torch.float16" if half else "torch.float32")
    # BatchNorms, ReLUs and the one sum of a convolution alone have gone into the convolutions.
    kinds = "FinishedConv2d FusedConv2d FusedConv2d FinishedConv2d FusedConv2d FusedConv2d"
    assert sorted(result["convolutions"]) == sorted([*kinds.split(), "FinishedConv2d"])
    assert sum(result["relus"]) == 4
    assert sum(result["pooled"]) == 3
    left = [node for node in result["nodes"] if "getitem" not in node]
    assert left == ["aten.sigmoid.default", "aten.add.Tensor"], left
    assert result["launched"] == result["counted"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["in place", "in place, last", "feed-forward network"])
def test_a_network_of_what_does_not_fuse(results, name):
    result = results[name]
    assert "failed" not in result, result["failed"]
    assert max(result["errors"]) <= TOLERANCE["float32"]


@pytest.mark.timeout(900)
def test_the_operators_are_what_they_tell_pytorch(results):
    expected = "assemble_kernels attend attend_and_assemble finish_convolution modulate_bands pool"
    assert results["operators"].get("operators") == expected.split(), results["operators"]
