"""docs/performance.md: its record is of today's networks, and the page is of its record."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import asdict

import pytest

from benchmarks.gpu import arithmetic
from benchmarks.gpu.arithmetic import START, START_EARLY, Kernel, kernels_of, page, predicted
from benchmarks.gpu.shapes import RESNET50

RECORD = json.loads(arithmetic.RECORD.read_text())
REFRESH = "run python -m benchmarks.gpu.arithmetic"


def test_the_page_is_what_the_script_writes():
    assert arithmetic.PAGE.read_text() == page(RECORD), REFRESH


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("network", arithmetic.NETWORKS)
def test_the_record_is_of_the_kernels_that_are_launched_today(network, proved):
    from benchmarks.gpu.launches import resnet50

    today: dict[str, int] = {}
    for one in resnet50(arithmetic.NETWORKS[network]):
        today[one.operator] = today.get(one.operator, 0) + 1
    recorded: dict[str, int] = {}
    for kernel in kernels_of(RECORD, network):
        recorded[kernel.operator] = recorded.get(kernel.operator, 0) + kernel.count
    assert recorded == today, REFRESH
    proved(f"a {network} ResNet-50, fp16, batch 1, is {sum(today.values())} kernels")


def test_fdconv_is_predicted_within_its_limit(proved):
    """A regression number: lower it with what was gained."""
    for gpu in arithmetic.RATES:
        plain = predicted(RECORD, "plain", gpu)
        # Kernels that start while others end are assumed to gain; the limit holds without.
        late = predicted(RECORD, "FDConv", gpu, early=False) / plain
        ratio = predicted(RECORD, "FDConv", gpu) / plain
        assert 1 < ratio < late <= 2.0
        proved(
            f"FDConv's ResNet-50 is predicted at {ratio:.2f} times the plain one's time on {gpu}"
        )


def test_attentions_behind_a_convolution_start_when_it_has_ended():
    rows = [asdict(Kernel(name, 1, 0, 0, early=name.startswith("attend")))
            for name in ("convolution", "finish_kernel", "attend_rows_kernel")]  # fmt: skip
    record = {"networks": {"FDConv": {"kernels": rows, "forks": []}}}
    seen = [predicted(record, "FDConv", "H100", ends=ends) for ends in (True, False)]
    assert seen == pytest.approx([2 * START + START_EARLY, 2 * START])


def test_a_kernel_takes_what_takes_longest():
    copy = Kernel("copy", 1, read=30_000_000, written=30_000_000)
    assert copy.seconds("H100") == pytest.approx(START + 20e-6)
    assert copy.seconds("H200") < copy.seconds("H100")
    # A tile more than there are multiprocessors is a second wave.
    one, two = (Kernel("mm", 1, 0, 0, (1, 64 * tiles, 64, 512)) for tiles in (132, 133))
    assert two.work == pytest.approx(2 * one.work)
    own = Kernel("own", 1, 0, 0, None, programs=1, warps=1, registers=32, resident=16,
                 instructions=1000)  # fmt: skip
    assert own.work == pytest.approx(arithmetic.ALONE * 1000 / arithmetic.CLOCK)


@pytest.mark.parametrize("shape", RESNET50, ids=str)
def test_the_floor_is_the_spectrum_and_the_kernel(shape):
    rows, half = shape.out_channels * shape.kernel, shape.in_channels * shape.kernel // 2 + 1
    least = (9 * rows * half + 2 * shape.weights) / arithmetic.MEMORY
    # A last tile of columns may be partly empty.
    assert least <= arithmetic.floor(shape) <= least * 1.1
    assert math.isclose(
        sum(cost.memory for cost in arithmetic.costs(shape)),
        arithmetic.floor(shape) * arithmetic.MEMORY,
    )


def test_a_gpus_record_is_shown_with_both_networks(tmp_path, monkeypatch):
    row = {"backend": "fused, CUDA graph", "dtype": "float16", "batch": 1}
    times = {"FDConv": 0.9, "baseline": 0.45}
    rows = [{**row, "network": network, "ms": ms} for network, ms in times.items()]
    (tmp_path / "2026-12-01-gpu-x-120000.json").write_text(json.dumps({"networks": rows}))
    monkeypatch.setattr(arithmetic, "RESULTS", tmp_path)
    assert "| fused, CUDA graph | 0.900 | 0.450 | 2.000 |" in page(RECORD)
