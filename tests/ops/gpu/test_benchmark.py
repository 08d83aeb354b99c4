"""`benchmarks/gpu.sh` runs from end to end without a GPU, and its page is up to date."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import arithmetic
from benchmarks.gpu.shapes import RESNET50

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT")}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_triton
def test_a_dry_run_measures_every_part(tmp_path):
    done = run("--dry-run", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert record["dry_run"]
    assert record["not_run"] == []
    assert record["environment"]["torch"] == torch.__version__
    for row in record["kernels"]:
        assert row["error"] <= (2e-6 if row["dtype"] == "float32" else 1.5e-3)
        assert row["us"].keys() == {"rows", "columns"}
    errors = {(r["backend"], r["dtype"]): r["error"] for r in record["networks"]}
    assert errors.pop(("baseline", "float16")) is None
    assert errors.pop(("baseline", "float32")) is None
    assert len(errors) == 4
    for (_, dtype), error in errors.items():
        assert error <= (4e-6 if dtype == "float32" else 5e-3)
    assert str(path) in done.stdout
    assert "images/s" in done.stdout


@needs_triton
def test_what_there_is_no_time_for_is_recorded(tmp_path):
    done = run("--dry-run", "--seconds", "0", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads(next(tmp_path.iterdir()).read_text())
    assert record["kernels"] == record["networks"] == []
    assert all(r["reason"] == "no time left of 0 s" for r in record["not_run"])
    assert len(record["not_run"]) > 3


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do():
    done = run()
    assert done.returncode == 1
    assert "need an NVIDIA GPU" in done.stderr
    assert "--dry-run" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_page_is_what_the_script_writes():
    assert arithmetic.PAGE.read_text() == arithmetic.page(), (
        "run python -m benchmarks.gpu.arithmetic"
    )


@pytest.mark.parametrize("shape", RESNET50, ids=str)
def test_the_floor_is_the_spectrum_and_the_kernel(shape):
    rows, half = shape.out_channels * shape.kernel, shape.in_channels * shape.kernel // 2 + 1
    least = (9 * rows * half + 2 * shape.weights) / arithmetic.MEMORY
    # A last tile of columns may be partly empty.
    assert least <= arithmetic.floor(shape) <= least * 1.1
    assert all(cost.predicted > arithmetic.START for cost in arithmetic.costs(shape))
