"""The report's page: complete, on its own, and looked at in a browser where there is one."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.screenshots import find_browser, take
from fdconv_deploy.latency import machine
from fdconv_deploy.latency.html import page
from fdconv_deploy.latency.svg import powers, ticks


def row(name: str, ms: float, **changes: object) -> dict:
    return {
        "kind": "bundle", "source": name, "backend": "onnxruntime-cpu", "choice": "",
        "operators": "", "native": None,
        "device": "cpu",
        "precision": "fp32", "batch": 1, "concurrency": 1, "size": [64, 96], "whole": False,
        "threads": 2, "runs": 100, "images_per_second": 1e3 / ms, "steady": True,
        "ms": dict.fromkeys(("p50", "q1", "q3", "min", "mean"), ms)
        | {"p90": ms * 1.1, "p99": ms * 1.3},
        "windows_ms": [ms] * 3, "over_first": None, "import_seconds": 0.3, "load_seconds": 0.2,
        "first_ms": ms * 2, "loaded_mb": 120, "peak_mb": 150, "device_mb": None,
        "joules_per_image": None, **changes,
    }  # fmt: skip


@pytest.fixture
def report() -> dict:
    long = "a network with a rather long name, as such names are"
    return {
        "kind": "bench",
        "machine": machine.describe(2),
        "settings": {"seconds": 60, "agree": 0.03, "concurrency": [1, 2]},
        "rows": [
            row("<script>alert(1)", 12.5),
            row("<script>alert(1)", 20.0, concurrency=2, steady=False),
            row(long, 850.0, over_first={"value": 68.0, "q1": 67.0, "q3": 69.0}),
            row("http://127.0.0.1:8000", 30.0, kind="service", peak_mb=None, loaded_mb=None),
        ],
        "skipped": [{"what": "x", "why": "Not & here."}],
        "others_cpu": 0.2,
        "profiles": [
            {
                "title": "toy", "how": "By a stopwatch.", "parts": ["convolutions", "rest"],
                "sums": {"convolutions": 3.0, "rest": 1.5},
                "layers": [
                    {"name": "layer1.0.conv1", "ms": {"convolutions": 2.0, "rest": 1.5}},
                    {"name": "layer1.0.conv2", "ms": {"convolutions": 1.0}},
                ],
            }
        ],
        "divergences": [
            {
                "title": "a and b", "how": "On one image.",
                "layers": [{"name": "layer1.0.conv1", "max_rel": 1e-3, "angle": 1e-6}],
            }
        ],
    }  # fmt: skip


def test_everything_is_on_the_page(report):
    text = page(report)
    for said in (
        "&lt;script&gt;alert(1)", "850", "20 ms ~", "Not &amp; here.", "1.0e-03",
        "layer1.0.conv2", "By a stopwatch. Milliseconds in all: convolutions 3.0, rest 1.5.",
        report["machine"]["cpu"].replace("&", "&amp;"), "Others had 20%", "b1×2", "150 MB",
    ):  # fmt: skip
        assert said in text, said
    assert text.count("<h2>") == 8


def test_nothing_comes_from_elsewhere_and_nothing_runs(report):
    text = page(report)
    assert not re.search(r"<script|<link|<img|@import|url\(|src=|href=", text)
    assert not re.search(r"https?://(?!127\.0\.0\.1)", text)


def test_plots_are_whole_and_within_the_page(report):
    plots = re.findall(r'<svg class="plot".*?</svg>', page(report), re.S)
    assert len(plots) == 6
    for plot in plots:
        tree = ElementTree.fromstring(plot)
        for shape in tree.iter("rect"):
            end = sum(float(shape.get(key).rstrip("%")) for key in ("x", "width"))
            assert 0 <= end <= 80
        for mark in tree.iter():
            for key in ("x1", "x2", "cx"):
                value = mark.get(key, "0").rstrip("%")
                assert 0 <= float(value) <= 100
                assert math.isfinite(float(value))


def test_light_dark_and_print(report):
    text = page(report)
    dark, printed = text.index("prefers-color-scheme: dark"), text.index("@media print")
    assert dark < printed  # a dark screen's page is printed light


@given(st.floats(1e-6, 1e9))
def test_ticks_cover_what_there_is(most):
    found = ticks(most)
    assert found[0] == 0
    assert found[-1] >= most * 0.999
    assert 4 <= len(found) <= 6
    assert found[-2] < most


@given(st.lists(st.floats(1e-3, 1e6), min_size=1))
def test_powers_enclose_what_there_is(values):
    found = powers(values)
    assert found[0] <= min(values)
    assert found[-1] >= max(values)
    assert len(found) >= 2
    assert found == sorted(set(found))
    assert len(found) < 3 or found[1] > min(values)


@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_in_a_browser(report, tmp_path):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    file = tmp_path / "report.html"
    file.write_text(page(report))
    written = take(file, tmp_path / "pictures")  # fails where it fetches or overflows
    assert len(written) == 5
    assert all(picture.stat().st_size > 10_000 for picture in written)
