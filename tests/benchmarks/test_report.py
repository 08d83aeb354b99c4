from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import report
from benchmarks.cases import Case, grid, sweep
from benchmarks.records import newest, write_json
from benchmarks.speed import RATIOS
from fdconv_deploy.latency import machine


def result(case: Case, exported: float) -> dict:
    ms = {"eager": 1000.0, "folded": 700.0, "exported": exported, "plain_eager": 300.0}
    ms |= {"plain": 150.0, "native": exported * 0.6}
    ms |= {"openvino_plain": 140.0, "openvino_bf16_native": 100.0}
    return {
        "errors": {"openvino_bf16_native": 0.03},
        "cpu_ms": {"openvino_bf16_native": {"median": 190.0}},
        "title": case.title,
        "case": case.as_dict(),
        "commit": "abc1234",
        "ms": {
            side: {"median": t, "q1": t * 0.9, "q3": t * 1.1, "min": t * 0.8, "runs": 9}
            for side, t in ms.items()
        },
        "ratios": {
            f"{a}/{b}": {"value": round(ms[a] / ms[b], 3)} for a, b in RATIOS if {a, b} <= set(ms)
        },
        "max_rel_error": 1e-6,
        "others_cpu": 0.01,
        "export": {
            "export_seconds": 20.0, "peak_mb": 2000, "nodes": 900, "bundle_mb": 283.0,
            "bundle_over_weights": 1.043,
        },
    }  # fmt: skip


def record(**changes: dict) -> dict:
    cases = {case.key: result(case, 300.0 * case.batch) for case in [*grid(), *sweep("size")]}
    cases |= {case.key: result(case, 300.0) for case in sweep("kernel_num")}
    return {"kind": "matrix", "machine": machine.describe(2), "cases": cases | changes}


def four_images(divided: float, date: str) -> dict:
    def ms(median: float) -> dict:
        return {"median": median, "q1": median - 10, "q3": median + 10}

    times = {"one": ms(100.0), "graph": ms(460.0), "divided": ms(100 * divided)}
    side = {
        "ms": times,
        "of one": {way: {"value": found["median"] / 100} for way, found in times.items()},
        "ways": {"1": "its graph", "4": "single images, 2 at a time"},
    }
    return {
        "kind": "batches", "machine": {"date": date}, "title": report.BACKBONE.title,
        "sides": {"native": side}, "others_cpu": 0.01,
    }  # fmt: skip


def table(text: str, title: str) -> list[list[str]]:
    """The rows of the table under a heading, without its head."""
    section = text.split(f"## {title}")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


class TestTables:
    def test_limits_are_judged(self) -> None:
        rows = table(report.markdown(record()), "Limits set beforehand")
        judged = {row[0]: row[3] for row in rows}
        assert judged["R50 backbone, 512×512, batch 1: exported/eager"] == "held"  # 0.3
        slow = {report.UPERNET.key: result(report.UPERNET, 700.0)}
        rows = table(report.markdown(record(**slow)), "Limits set beforehand")
        judged = {row[0]: row[3] for row in rows}
        assert judged["UPerNet-R50, 512×512, batch 1: exported/eager"] == "**missed**"

    def test_four_images_are_judged_as_they_are_run(self) -> None:
        older, newer = four_images(3.9, "2026-01-01"), four_images(4.2, "2026-01-02")
        text = report.markdown(record(), batches=[newer, older])
        judged = {row[0]: row[2:] for row in table(text, "Limits set beforehand")}
        assert judged["R50 backbone, 512×512: four images over one, native"] == [
            "4.20×",
            "**missed**",
        ]
        (native,) = table(text, "Four images beside one")
        assert native[0] == "R50 backbone, 512×512, native"
        assert native[2:] == [
            "460 [450–470]", "4.60", "420 [410–430]", "4.20", "single images, 2 at a time"
        ]  # fmt: skip
        assert "four images" not in report.markdown(record()).lower()

    def test_every_case_has_a_row(self) -> None:
        text = report.markdown(record())
        assert len(table(text, "ResNet backbone")) == 12
        assert len(table(text, "UPerNet, 150 classes")) == 12
        assert len(table(text, "Exports")) == 24
        first = table(text, "ResNet backbone")[0]
        assert first[0] == "R18, 512×512, batch 1"
        assert first[3] == "300 [270–330]"
        assert first[-4:] == ["0.30", "2.00", "0.18", "1.20"]
        assert [row[0] for row in table(text, "kernel_num")] == ["4", "16", "64"]
        assert len(table(text, "Image size")) == 5

    def test_openvino_beside_it(self) -> None:
        rows = table(report.markdown(record()), "In OpenVINO, in the same runs")
        name = "R50 backbone, 512×512, batch 1"
        (found,) = (row for row in rows if row[0] == name and "native op., OpenVINO" in row[1])
        assert found[2:] == ["100 [90–110]", "190", "0.56", "3.0e-02"]

    def test_records_from_before_there_were_native_operators(self) -> None:
        old = result(report.BACKBONE, 300.0)
        del old["ms"]["native"], old["ratios"]["native/eager"], old["ratios"]["native/plain"]
        text = report.markdown(
            {"machine": machine.describe(2), "cases": {report.BACKBONE.key: old}}
        )
        (row,) = table(text, "ResNet backbone")
        assert row.count("–") == 3
        assert not [row for row in table(text, "Limits set beforehand") if "native" in row[0]]

    def test_noisy_cases_are_marked(self) -> None:
        noisy = {**result(report.BACKBONE, 300.0), "others_cpu": 0.4}
        rows = table(report.markdown(record(**{report.BACKBONE.key: noisy})), "ResNet backbone")
        assert [row[0] for row in rows if row[0].endswith("\\*")] == ["R50, 512×512, batch 1\\*"]

    def test_what_was_not_measured_is_said_with_the_reason(self) -> None:
        large = Case("upernet", 101, 512, 1024, 4)
        text = report.markdown(record(**{large.key: {"skipped": "needs about 16.0 GB"}}))
        assert len(table(text, "UPerNet, 150 classes")) == 11
        assert "512×1024, batch 4, kernel_num 64: skipped, needs about 16.0 GB" in text

    def test_a_single_case_is_enough(self) -> None:
        cases = {report.BACKBONE.key: result(report.BACKBONE, 300.0)}
        text = report.markdown({"machine": machine.describe(2), "cases": cases})
        assert len(table(text, "ResNet backbone")) == 1
        assert "## UPerNet" not in text
        assert "## kernel_num" not in text

    def test_families_take_the_last_row_of_each_network(self) -> None:
        row = {
            "name": "segformer_b2", "size": [512, 512], "export_seconds": 19.1,
            "export_peak_gb": 1.45, "bundle_over_weights": 1.0438, "nodes": 1167,
            "error": {"logits": 1.3e-6}, "worst_part": {"error": 9e-7, "allowed": 1e-5},
            "nvidia_parser": "taken, 4186 layers", "native_over_plain": 1.119,
        }  # fmt: skip
        detector = {"name": "mask_rcnn_r50", "failed": "export: exit 1"}
        newer = {"rows": [row]}
        older = {
            "rows": [{**row, "nodes": 9}, {**row, "name": "maskdino_r50", "nodes": 8}, detector]
        }
        text = report.markdown(record(), families=[newer, older])
        assert table(text, "Every family at full size") == [
            ["segformer_b2", "512×512", "19", "1.4 GB", "1.044×", "1167", "1.3e-06", "9.0e-07",
             "1.119", "–", "yes"],
            ["maskdino_r50", "512×512", "19", "1.4 GB", "1.044×", "8", "1.3e-06", "9.0e-07",
             "1.119", "–", "yes"],
        ]  # fmt: skip
        assert "Every family" not in report.markdown(record())


class TestFiles:
    def test_page_and_plot(self, tmp_path: Path, monkeypatch, capsys) -> None:
        write_json(tmp_path / "results" / "m.json", record())
        write_json(tmp_path / "results" / "other.json", {"kind": "precision", "machine": {}})
        arguments = f"report --results {tmp_path}/results --output {tmp_path}/docs"
        monkeypatch.setattr(sys, "argv", arguments.split())
        report.main()
        assert "R50 backbone" in (tmp_path / "docs" / "performance-cpu.md").read_text()
        drawn = ElementTree.parse(tmp_path / "docs" / "cost.svg").getroot()
        texts = ["".join(node.itertext()).strip() for node in drawn.iter() if "text" in node.tag]
        assert "1000 ms" in texts
        assert [text for text in texts if text.startswith("300 ms") and "(0.30×)" in text]
        before = (tmp_path / "docs" / "cost.svg").read_bytes()
        report.main()
        assert (tmp_path / "docs" / "cost.svg").read_bytes() == before  # nothing but the figures

    def test_nothing_measured_yet(self, tmp_path: Path, monkeypatch, capsys) -> None:
        monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path)])
        with pytest.raises(SystemExit):
            report.main()
        assert "benchmarks.matrix" in capsys.readouterr().err

    def test_the_newest_record_counts(self, tmp_path: Path) -> None:
        for name, date in (("a", "2026-11-22 10:00 UTC"), ("b", "2026-11-21 10:00 UTC")):
            write_json(tmp_path / f"{name}.json", {"kind": "session", "machine": {"date": date}})
        (tmp_path / "list.json").write_text("[]")
        found = newest("session", tmp_path)
        assert found is not None
        assert found["machine"]["date"] == "2026-11-22 10:00 UTC"
        assert newest("matrix", tmp_path) is None
