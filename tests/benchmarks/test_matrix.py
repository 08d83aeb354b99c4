from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import matrix
from benchmarks.cases import Case, grid, parse_size, sweep

WHERE = {"cpu": "a CPU", "cores": 2, "threads": 2, "versions": {"torch": "1"}, "date": "2026"}
CASES = grid(["backbone"], [18, 50], [(64, 64)], [1])


def measured(case: Case) -> dict:
    """As ``benchmarks.speed.measure``, for a case that takes a millisecond per layer."""
    value = {"value": 0.5, "q1": 0.4, "q3": 0.6}
    return {
        "ms": {"exported": {"median": float(case.depth)}},
        "ratios": {"exported/eager": value, "exported/plain": value},
        "others_cpu": 0.0,
    }


def run(output: Path, measure=measured, **options) -> dict:
    options = {"available": lambda: 1e12, "say": lambda line: None, **options}
    return matrix.run(CASES, measure, output, WHERE, **options)


class TestRun:
    def test_every_case_is_written(self, tmp_path: Path) -> None:
        said: list[str] = []
        record = run(tmp_path / "m.json", say=said.append)
        assert json.loads((tmp_path / "m.json").read_text()) == record
        assert record["machine"] == WHERE
        keys = ["backbone-r50-64x64-b1-k64", "backbone-r18-64x64-b1-k64"]
        assert list(record["cases"]) == keys
        assert record["cases"][keys[0]]["ms"]["exported"]["median"] == 50
        assert said[0].startswith(f"[1/2] {keys[0]}: exported 50.0 ms, 0.5× eager")

    def test_interrupted_and_resumed(self, tmp_path: Path) -> None:
        def interrupted(case: Case) -> dict:
            if case.depth == 18:
                raise KeyboardInterrupt
            return measured(case)

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "m.json", interrupted)
        assert len(json.loads((tmp_path / "m.json").read_text())["cases"]) == 1
        again: list[int] = []

        def remembered(case: Case) -> dict:
            again.append(case.depth)
            return measured(case)

        record = run(tmp_path / "m.json", remembered, resume=True)
        assert again == [18]
        assert len(record["cases"]) == 2

    def test_nothing_is_overwritten_unasked(self, tmp_path: Path) -> None:
        run(tmp_path / "m.json")
        with pytest.raises(matrix.MatrixError, match="--resume"):
            run(tmp_path / "m.json")

    @pytest.mark.parametrize("key", matrix.DECISIVE)
    def test_other_machines_are_not_mixed(self, tmp_path: Path, key: str) -> None:
        run(tmp_path / "m.json")
        other = {**WHERE, key: "another"}
        with pytest.raises(matrix.MatrixError, match="do not belong in one table"):
            matrix.run(CASES, measured, tmp_path / "m.json", other, resume=True)

    def test_too_large_for_memory_is_skipped_with_the_reason(self, tmp_path: Path) -> None:
        enough = max(case.memory for case in CASES)
        record = run(tmp_path / "m.json", available=lambda: enough - 1)
        skipped = [found.get("skipped") for found in record["cases"].values()]
        assert "GB are free" in skipped[0]
        assert skipped[1] is None

    def test_failure_is_noted_and_tried_again(self, tmp_path: Path) -> None:
        def fails(case: Case) -> dict:
            raise matrix.MatrixError("the process was killed")

        record = run(tmp_path / "m.json", fails)
        assert {found["failed"] for found in record["cases"].values()} == {"the process was killed"}
        record = run(tmp_path / "m.json", resume=True)
        assert all("ms" in found for found in record["cases"].values())


class TestSelect:
    def select(self, *arguments: str) -> list[str]:
        return [case.key for case in matrix.select(matrix.parser().parse_args(arguments))]

    def test_everything_asked_for_by_default(self) -> None:
        keys = self.select()
        assert len(keys) == len(set(keys))
        assert len([key for key in keys if key.startswith("upernet")]) == 12
        assert {case.key for case in grid()} < set(keys)
        for name in ("size", "kernel_num"):
            assert {case.key for case in sweep(name)} <= set(keys)

    def test_quick_is_one_case(self) -> None:
        assert self.select("--quick") == ["backbone-r50-512x512-b1-k64"]

    def test_subsets(self) -> None:
        found = self.select("--networks", "upernet", "--depths", "50", "--sweeps", "--batches", "4")
        assert found == ["upernet-r50-512x512-b4-k64", "upernet-r50-512x1024-b4-k64"]
        assert self.select("--only", "*-r101-512x512-b1-*") == [
            "backbone-r101-512x512-b1-k64",
            "upernet-r101-512x512-b1-k64",
        ]
        found = self.select("--only-sweeps", "--sweeps", "kernel_num")
        assert [key.rsplit("-", 1)[1] for key in found] == ["k4", "k16", "k64"]

    def test_sizes(self) -> None:
        assert parse_size("512x1024") == (512, 1024)
        assert parse_size("256") == (256, 256)
        with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
            parse_size("wide")


def test_cases_make_the_networks_they_name() -> None:
    case = Case("upernet", 18, 32, 64, 2, kernel_num=4, channels=8)
    assert case.images().shape == (2, 3, 32, 64)
    dynamic, plain = case.make(), case.make(dynamic=False)
    names = dynamic.state_dict().keys()
    assert any("KSM_Global" in name for name in names)
    assert not any("KSM_Global" in name for name in plain.state_dict())
    assert case.empty().state_dict().keys() == names
    assert Case(**case.as_dict()) == case


def test_larger_cases_need_more_memory() -> None:
    for case in grid():
        larger = Case(case.network, case.depth, case.height, case.width, case.batch + 1)
        assert larger.memory > case.memory
