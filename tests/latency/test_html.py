"""The report's page: complete, on its own, and looked at in a browser where there is one."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.screenshots import find_browser, take
from fdconv_deploy.latency import machine
from fdconv_deploy.latency.html import page
from fdconv_deploy.latency.report import Report, as_json


def row(name: str, ms: float, **changes: object) -> dict:
    return {
        "kind": "bundle", "source": name, "backend": "onnxruntime-cpu", "choice": "",
        "operators": "", "network": "", "native": None,
        "device": "cpu",
        "precision": "fp32", "batch": 1, "concurrency": 1, "size": [64, 96], "whole": False,
        "threads": 2, "runs": 100, "images_per_second": 1e3 / ms, "steady": True,
        "ms": dict.fromkeys(("p50", "q1", "q3", "min", "mean"), ms)
        | {"p90": ms * 1.1, "p99": ms * 1.3},
        "windows_ms": [ms] * 3, "over_first": None, "import_seconds": 0.3, "load_seconds": 0.2,
        "first_ms": ms * 2, "loaded_mb": 120, "peak_mb": 150, "device_mb": None,
        "cpu_seconds": 9.0, "joules_per_image": None, "manner": "", "phases_ms": None, "gpu": None,
        "engine": None,
        **changes,
    }  # fmt: skip


@pytest.fixture
def report() -> Report:
    long = "a network with a rather long name, as such names are"
    return Report.model_validate({
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
                "title": "toy", "source": "toy", "how": "By a stopwatch.",
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
    })  # fmt: skip


def test_everything_is_on_the_page(report):
    text = page(report)
    for said in (
        "&lt;script&gt;alert(1)", "850", "20 ms ~", "Not &amp; here.", "1.0e-03",
        "layer1.0.conv2", "By a stopwatch. In all: convolutions 3.0, kernel",
        report.machine["cpu"].replace("&", "&amp;"),
        "Measured on a shared machine (20 % of CPU used by other processes)", "b1×2", "150 MB",
    ):  # fmt: skip
        assert said in text, said
    assert text.count("<h2>") == 8


def test_nothing_comes_from_elsewhere_and_nothing_runs(report):
    text = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page(report))
    # Within the page, plots refer to their own shapes.
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)|src=|href=\"(?!#)", text)
    assert not re.search(r"https?://(?!127\.0\.0\.1)", text)


def test_plots_are_whole_and_in_the_colours_of_the_page(report):
    plots = re.findall(r'<svg class="plot".*?</svg>', page(report), re.S)
    assert len(plots) == 6
    for plot in plots:
        tree = ElementTree.fromstring(plot)
        assert any(text.text for text in tree.iter("{http://www.w3.org/2000/svg}text"))
        colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", plot))
        assert {c for c in colours if not c.startswith(("var(--", "none"))} == set(), colours


def test_names_are_no_formulas(report):
    report.rows[0] = report.rows[0].model_copy(update={"source": "$\\frac"})
    assert "$\\frac, onnxruntime-cpu" in page(report)


def test_light_dark_and_print(report):
    text = page(report)
    dark, printed = text.index("prefers-color-scheme: dark"), text.index("@media print")
    assert dark < printed  # a dark screen's page is printed light


@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_in_a_browser(report, tmp_path):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    file = tmp_path / "report.html"
    file.write_text(page(report))
    written = take(file, tmp_path / "pictures")  # fails where it fetches or overflows
    assert len(written) == 5
    assert all(picture.stat().st_size > 10_000 for picture in written)


def test_layers_that_hold_infinities_are_drawn(report):
    """Those of a half-precision graph that overflowed."""
    report.divergences[0].layers[0].max_rel = float("inf")
    assert "inf, 1 − cosine" in page(report)
    assert Report.model_validate_json(as_json(report)) == report
