"""``fdconv bench``, from the command line to files."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fdconv_deploy.cli.bench import show
from fdconv_deploy.demo import packaged_checkpoint, plain_checkpoint
from fdconv_deploy.latency.report import Report, Row, broken_limits, cells
from fdconv_deploy.ops.native import FOLDER, native_library
from fdconv_deploy.runtime import BACKENDS
from fdconv_deploy.serve import Settings, running
from tests.test_cli import fdconv

# A toy's run takes microseconds: these are plumbing tests, and none reads a figure.
BRIEF = ("--seconds", "0.3", "--warm-up", "0", "--threads", "1")


def benched(monkeypatch, capfd, *arguments: object) -> dict:
    code, out, err = fdconv(monkeypatch, capfd, "bench", *arguments, *BRIEF, "-q", "--json", "-")
    assert code == 0, err
    return json.loads(out)


def test_every_output(toy_bundle, other_bundle, tmp_path, monkeypatch, capfd):
    files = [tmp_path / name for name in ("r.json", "r.md", "r.csv", "r.html")]
    named = zip(("--json", "--markdown", "--csv", "--html"), files, strict=True)
    outputs = [part for pair in named for part in pair]
    code, out, err = fdconv(
        monkeypatch, capfd, "bench", toy_bundle, other_bundle, "--concurrency", "1,2",
        *BRIEF, *outputs,
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(files[0].read_text())
    rows = report["rows"]
    # Targets of one batch size are together, and each has every concurrency.
    assert [(Path(r["source"]).name, r["batch"], r["concurrency"]) for r in rows] == [
        ("toy", 1, 1), ("toy", 1, 2), ("other", 1, 1), ("other", 1, 2),
        ("toy", 4, 1), ("toy", 4, 2),
    ]  # fmt: skip
    for row in rows:
        ms = row["ms"]
        assert 0 < ms["min"] <= ms["q1"] <= ms["p50"] <= ms["q3"] <= ms["p90"] <= ms["p99"]
        assert row["backend"] == "onnxruntime-cpu"
        assert row["images_per_second"] > 0
        assert row["peak_mb"] >= row["loaded_mb"] > 0
        assert row["first_ms"] > 0
        assert row["size"] == [32, 48]
        assert row["device_mb"] is row["joules_per_image"] is None
    assert [row["over_first"] is None for row in rows] == [True, True, False, False, True, True]
    assert report["skipped"] == [{"what": "other, batch 4", "why": "It has graphs of 1."}]
    assert report["machine"]["threads"] == 1
    # The same figures in every form.
    p50 = rows[2]["ms"]["p50"]
    parsed = list(csv.DictReader(io.StringIO(files[2].read_text())))
    assert float(parsed[2]["ms.p50"]) == p50
    assert len(parsed) == 6
    markdown = files[1].read_text()
    assert sum(line.startswith("| ") for line in markdown.splitlines()) == 2 + 6
    shown = f"{p50:.2f}" if p50 < 10 else f"{p50:.1f}"
    for text in (out, markdown, files[3].read_text()):
        assert shown in text
        assert "Skipped: other, batch 4. It has graphs of 1." in text
        assert "concurrency" in text
    assert not list(tmp_path.glob(".*"))


def test_a_bundle_beside_its_checkpoint_and_a_service(toy_bundle, tmp_path, monkeypatch, capfd):
    with running([toy_bundle], settings=Settings(threads=1)) as url:
        report = benched(
            monkeypatch, capfd, toy_bundle, packaged_checkpoint(), "--backend", "auto",
            "--backend", "eager", "--url", url, "--batch", 1,
        )  # fmt: skip
    bundle, eager, service = report["rows"]
    assert (bundle["kind"], eager["kind"], service["kind"]) == ("bundle", "checkpoint", "service")
    assert eager["size"] == [32, 48]
    assert eager["peak_mb"] > bundle["peak_mb"]
    assert eager["over_first"]["value"] > 0
    assert service["peak_mb"] is None
    assert service["whole"]
    assert service["choice"].startswith("model toy")
    assert report["others_cpu"] is None


def test_a_baseline_beside_fdconv(streets, tmp_path, monkeypatch, capfd):
    """The plain network becomes a bundle by `fdconv export --baseline`, and an engine as any."""
    export = ("export", plain_checkpoint(), "-o", tmp_path / "plain", "--size", "96x128", "-q")
    code, _, err = fdconv(monkeypatch, capfd, *export)
    assert code == 1
    assert "fdconv export --baseline" in " ".join(err.split())
    code, _, err = fdconv(monkeypatch, capfd, *export, "--baseline")
    assert code == 0, err
    first, second = benched(monkeypatch, capfd, tmp_path / "plain", streets)["rows"]
    assert first["over_first"] is None
    assert second["over_first"]["value"] > 0


@pytest.mark.skipif(native_library()[0] is None, reason="native operators are not built here")
def test_inputs_of_other_sizes_have_no_ratio(toy_bundle, streets, tmp_path, monkeypatch, capfd):
    code, out, err = fdconv(
        monkeypatch, capfd, "bench", toy_bundle, streets, "--batch", "1,4", *BRIEF,
        "--fail-ratio", "1e9", "--json", tmp_path / "r.json",
    )  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["batch"] for row in report["rows"]] == [1, 1, 4]
    assert [row["over_first"] for row in report["rows"]] == [None] * 3
    assert cells(Report.model_validate(report))["vs. first"] == ["1", "–", "1"]
    assert "No ratio where the input has another size" in out
    assert "Different networks do different work" in out
    assert "streets, onnxruntime-cpu" in out.partition("Different networks")[2]
    assert code == 1
    assert "batch 1: its input has another size than the first target's" in err


def test_native_beside_portable(streets, monkeypatch, capfd):
    report = benched(monkeypatch, capfd, streets, "--native", "both", "--profile")
    portable, native = report["rows"]
    assert portable["operators"].startswith("portable")
    assert native["operators"].startswith("native")
    assert Row.model_validate(native).label == "streets, onnxruntime-cpu, native, fp32"
    first, second = report["profiles"]
    assert second["title"] == "streets, onnxruntime-cpu, native, batch 1"
    # The same layers, in whatever order the runtime takes branches; each kernel in one node.
    names = [sorted(x["name"] for x in profile["layers"]) for profile in (first, second)]
    assert names[0] == names[1]
    assert all(one["sums"]["kernel assembly"] > 0 for one in (first, second))


@pytest.mark.skipif(bool(list(FOLDER.glob("*.so"))), reason="native operators are built here")
def test_native_operators_that_are_not_built(toy_bundle, monkeypatch, capfd):
    code, _, err = fdconv(monkeypatch, capfd, "bench", toy_bundle, "--native", "on", *BRIEF)
    assert code == 1
    assert "Native operators are required" in err


def test_a_service_without_that_model(toy_bundle, monkeypatch, capfd):
    with running([toy_bundle], settings=Settings(threads=1)) as url:
        code, _, err = fdconv(monkeypatch, capfd, "bench", "--url", url, "--model", "no", *BRIEF)
    assert code == 1
    assert "has the models toy, not 'no'." in err


def test_whole_requests(toy_bundle, tmp_path, monkeypatch, capfd):
    (row,) = benched(monkeypatch, capfd, toy_bundle, "--end-to-end")["rows"]
    assert row["whole"]
    assert row["batch"] == 1


def test_a_bundle_has_its_size(toy_bundle, monkeypatch, capfd):
    code, _, err = fdconv(monkeypatch, capfd, "bench", toy_bundle, "--size", "64x64")
    assert code == 2
    assert "here 32x48" in err


@pytest.mark.parametrize("width", [80, 140])
def test_tables_fit_a_terminal(width, toy_bundle, other_bundle, monkeypatch, capfd):
    """Nothing is cut: where there is no room for a column, it is not there, and that is said."""
    bundles = (toy_bundle, other_bundle)
    report = benched(monkeypatch, capfd, *bundles, "--batch", 1, "--profile")
    out = io.StringIO()
    show(
        Report.model_validate(report),
        Console(file=out, width=width, force_terminal=True, color_system=None),
    )
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for name in ("toy, onnxruntime-cpu, fp32", "other, onnxruntime-cpu, fp32"):
        assert name in text
    for row in report["rows"]:
        assert f"{row['images_per_second']:.2f}" in text
    assert ("No room for first ms" in text) == (width < 140)
    assert "peak MB" in text.partition("No room")[0]


def test_all_backends_skip_what_is_not_here(toy_bundle, monkeypatch, capfd):
    report = benched(monkeypatch, capfd, toy_bundle, "--backend", "all", "--batch", 1)
    here = [row["backend"] for row in report["rows"]]
    assert here[0] == "onnxruntime-cpu"
    assert ("openvino" in here) == (importlib.util.find_spec("openvino") is not None)
    assert set(here) <= {"onnxruntime-cpu", "openvino", "openvino-bf16"}  # no GPU here
    why = {one["what"]: one["why"] for one in report["skipped"]}
    others = set(BACKENDS) - set(here)
    assert set(why) == {f"toy, {name}, fp32, batch 1" for name in others}
    assert all(sentence.endswith(".") and len(sentence) > 40 for sentence in why.values())


def test_a_backend_asked_for_by_name_is_not_skipped(toy_bundle, monkeypatch, capfd):
    code, out, err = fdconv(
        monkeypatch, capfd, "bench", toy_bundle, "--backend", "onnxruntime-cuda", *BRIEF
    )
    assert code == 1
    assert "has no CUDAExecutionProvider" in err
    assert not out


def test_limits(toy_bundle, other_bundle, tmp_path, monkeypatch, capfd):
    file = tmp_path / "r.json"
    limits = ("--fail-under", "1e9", "--fail-over", "0", "--fail-ratio", "0", "--json", file)
    arguments = ("bench", toy_bundle, other_bundle, "--batch", 1, *BRIEF)
    code, out, err = fdconv(monkeypatch, capfd, *arguments, *limits)
    assert code == 1
    for message in (
        r"toy, onnxruntime-cpu, fp32, batch 1: [\d.]+ images/s; at least 1e\+09 are required\.",
        r"toy, onnxruntime-cpu, fp32, batch 1: [\d.]+ ms; at most 0 are allowed\.",
        r"other, .* times the first target's time; at most 0 are allowed\.",
    ):
        assert re.search(message, err)
    # What broke the limits is there to be read.
    report = Report.model_validate_json(file.read_text())
    assert "images/s" in out
    assert not list(broken_limits(report, 0, 1e9, 1e9))
    assert not list(broken_limits(report))
    assert len(list(broken_limits(report, ratio=0))) == 1  # of the first itself there is none


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--concurrency", "1,x"], 2, "several such as 1,4; not '1,x'"),
        (["--concurrency", "0"], 2, "--concurrency is a number from 1"),
        (["--native", "maybe"], 2, "'maybe' is not one of 'on', 'nchw', 'off', 'both'"),
        (["--json", "no/where.json"], 1, "there is no folder no."),
        (["--json", "a", "--html", "a"], 2, "Two outputs would be written to a."),
        (["--image", "nothing.png"], 1, "nothing.png"),
        (["--backend", "fast"], 2, "There is no backend 'fast'"),
    ],
)
def test_mistakes(toy_bundle, tmp_path, arguments, code, message, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    found, out, err = fdconv(monkeypatch, capfd, "bench", toy_bundle, *BRIEF, *arguments)
    assert found == code
    assert message in " ".join(err.replace("│", " ").split())
    assert not out
    assert not list(tmp_path.iterdir())


def test_bundles_are_timed_without_torch(toy_bundle, tmp_path):
    for name in ("torch", "onnx", "psutil", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    command = [sys.executable, "-m", "fdconv_deploy", "bench", str(toy_bundle), *BRIEF]
    finished = subprocess.run(
        [*command, "--markdown", str(tmp_path / "r.md")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "images/s" in finished.stdout


def test_a_page_without_matplotlib_is_refused_before_anything_is_run(
    toy_bundle, tmp_path, monkeypatch, capfd
):
    monkeypatch.delitem(sys.modules, "fdconv_deploy.latency.html", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("fdconv_deploy.latency.measure.measure", lambda *_, **__: 1 / 0)
    file = tmp_path / "r.html"
    code, _, err = fdconv(monkeypatch, capfd, "bench", toy_bundle, "--html", file, *BRIEF)
    assert code == 1
    assert "(--html) needs matplotlib, which is not installed: pip install" in err
    assert not file.exists()
