"""``python -m benchmarks.table1``: what it counts, prints and measures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import table1
from benchmarks.rivals import METHODS
from benchmarks.table1 import count, markdown
from benchmarks.table1_rows import Frame, rows
from fdconv_deploy.ops.native import native_library

DOCS = Path(__file__).resolve().parents[2] / "docs" / "table1.md"


@pytest.fixture(scope="module")
def counts() -> dict:
    return count(rows(), Frame())


def test_the_documented_table_is_what_is_printed(counts):
    text = markdown({"frame": {"channels": 64}, "counts": counts})
    lines = text.splitlines()
    assert len(lines) == 2 + len(METHODS) + 2
    assert text in DOCS.read_text()


def test_the_documented_sums_for_fdconv(counts):
    documented = dict(
        re.findall(r"^\| \*?\*?([a-z -]+?)\*?\*? \| \*?\*?([\d.]+)", DOCS.read_text(), re.M)
    )
    fdconv = counts["fdconv"]
    assert documented["convolutions"] == f"{fdconv['multiply_adds'] / 1e9:.3f}"
    both = (fdconv["multiply_adds"] + fdconv["elementwise"]) / 1e9
    assert documented["with element-wise arithmetic"] == f"{both:.3f}"


def test_rows_keep_the_papers_order():
    assert list(rows(["kw1", "condconv"])) == ["plain", "condconv", "kw1", "fdconv"]


def test_a_segmentor_gains_what_its_backbone_gains():
    assert count(["dcd"], Frame("upernet"))["dcd"] == count(["dcd"], Frame())["dcd"]


@pytest.mark.slow
def test_a_narrow_run(tmp_path, capsys):
    file = tmp_path / "table1.json"
    prepared = str(tmp_path / "prepared")
    narrow = "--methods dcd --channels 16 --kernel-num 16 --size 64x64 --prepare"
    table1.main([*narrow.split(), prepared])
    table1.main(["--latency", prepared, *"--seconds 5 --threads 1 --json".split(), str(file)])
    result = json.loads(file.read_text())
    timed = result["latency"]
    names = ["plain", "dcd", "fdconv"]
    sides = {f"{s}/{n}" for s in ("eager", "exported") for n in names}
    natively = {"exported/fdconv-native"} if native_library()[0] else set()
    assert set(timed["ms"]) == sides | natively
    assert all(values["runs"] >= 2 for values in timed["ms"].values())
    assert all(error < 1e-4 for error in timed["max_rel_error"].values())
    assert set(timed["over_plain"]) == {k for k in timed["ms"] if not k.endswith("plain")}
    memory = timed["memory_mb"]
    # The deployed form's process holds no PyTorch.
    assert all(memory[f"exported/{n}"] < memory[f"eager/{n}"] for n in names)
    out = capsys.readouterr().out
    counts, latency = out.split("\n\n")[:2]
    assert len(counts.splitlines()) == 2 + 3
    assert len(latency.splitlines()) == 2 + 3 + len(natively)
    assert "+3.6 M" not in out  # the paper's numbers are of the full width
