"""What a report says beside timings."""

from __future__ import annotations

import json

import pytest

from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.latency.html import page
from fdconv_deploy.latency.report import Report, markdown
from fdconv_deploy.profiling import PARTS
from tests.latency.test_command import BRIEF
from tests.test_cli import fdconv


@pytest.fixture(scope="module")
def report(streets, tmp_path_factory) -> dict:
    """Of the packaged network, exported, its checkpoint, and a copy of the bundle."""
    import shutil
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("sections")
    shutil.copytree(streets, folder / "copy")
    arguments = [streets, folder / "copy", packaged_checkpoint(), "--profile", "--divergence"]
    arguments += ["--native", "off"]
    command = [sys.executable, "-m", "fdconv_deploy", "bench", *arguments, *BRIEF, "-q"]
    done = subprocess.run(
        list(map(str, [*command, "--json", "-"])), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_time_by_layer(report):
    bundle, copy, eager = report["profiles"]
    assert bundle["title"] == "streets, onnxruntime-cpu, batch 1"
    assert eager["title"] == "streets.pth, eager, batch 1"
    assert copy["source"] != bundle["source"]
    names = {layer["name"] for layer in bundle["layers"]}
    # The same layers in both, under the network's own names.
    assert names == {layer["name"] for layer in eager["layers"]} - {"before the first convolution"}
    assert {"backbone.layer2.0.conv2", "decode_head.conv_seg"} <= names
    for section in (bundle, eager):
        for part in PARTS:
            spent = sum(layer["ms"].get(part, 0.0) for layer in section["layers"])
            assert section["sums"][part] == pytest.approx(spent, abs=0.01)
            assert spent > 0


def test_divergence_by_layer(report):
    (section,) = report["divergences"]
    assert section["title"].startswith("copy and streets (fp32 and fp32)")
    assert len(section["layers"]) > 60
    assert all(layer["max_rel"] == 0 for layer in section["layers"])


def test_both_are_in_every_form(report):
    found = Report.model_validate(report)
    text, html = markdown(found), page(found)
    for said in ("Milliseconds by layer: streets, onnxruntime-cpu", "Divergence by layer: copy"):
        assert said in text
    for said in ("Milliseconds by layer: streets, onnxruntime-cpu", "Divergence by layer: copy"):
        assert said in html
    assert text.count("backbone.layer2.0.conv2") == 4
    assert html.count("backbone.layer2.0.conv2<") == 4


def test_divergence_needs_two_bundles(toy_bundle, monkeypatch, capfd):
    code, _, err = fdconv(monkeypatch, capfd, "bench", toy_bundle, "--divergence", *BRIEF)
    assert code == 2
    assert "give two bundles" in err


def test_layers_of_toys_are_few(toy_bundle, other_bundle, monkeypatch, capfd):
    code, out, err = fdconv(
        monkeypatch, capfd, "bench", toy_bundle, other_bundle, "--divergence", "--profile", *BRIEF
    )
    assert code == 0, err
    assert "Milliseconds by layer: toy" in out
    assert "Divergence by layer: other" in out
