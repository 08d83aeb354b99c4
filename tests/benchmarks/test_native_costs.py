from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import native_costs, report
from benchmarks.cases import Case
from fdconv_deploy.latency import machine
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.runtime.backends.onnxruntime import blocked_layout
from tests.benchmarks.test_report import record


def test_needed_counts_what_sizes_ask_for() -> None:
    x, weight, y = [1, 64, 32, 32], [128, 64, 3, 3], [1, 128, 16, 16]
    products, moved = native_costs.needed("plain", [x, weight], [y], 4 * 128 * 64 * 9)
    assert products == 128 * 16 * 16 * 64 * 9
    assert moved == 4 * (64 * 32 * 32 + 128 * 64 * 9 + 128 * 16 * 16)
    assert native_costs.needed("reorder", [x], [x], 0) == (0, 8 * 64 * 32 * 32)


@pytest.mark.slow
def test_every_kind_of_node_is_counted(tmp_path: Path) -> None:
    if native_library()[0] is None or not blocked_layout()[0]:
        pytest.skip("no native operators in blocks here")
    result = native_costs.measure(Case("backbone", 18, 64, 64, 1, 4, 32), tmp_path, 2)
    fdconv, plain = result["fdconv"], result["plain"]
    assert set(native_costs.KINDS) - {"rest"} <= set(fdconv)
    assert fdconv["FrequencyAssembly"]["nodes"] == fdconv["KernelAttention"]["nodes"] == 16
    assert fdconv["dynamic"]["nodes"] == 16
    assert plain["plain"]["nodes"] == 20
    # The same convolutions; padded to whole blocks, so a little more on one side at most.
    ours = fdconv["plain"]["products"] + fdconv["dynamic"]["products"]
    assert ours == pytest.approx(plain["plain"]["products"], rel=0.05)
    native_costs.show(result)
    costs = {**result, "machine": machine.describe(1)}
    text = report.markdown(record(), costs=costs)
    assert "| kernel assembly | 16 |" in text
