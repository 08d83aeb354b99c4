"""The full-size detector's script: how it compares, and a small run of the whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.detector import compare, errors_between
from fdconv_deploy.errors import ExportError
from fdconv_deploy.latency import machine
from tests.export.validation.test_comparison import A, B, C, answer

near = (1, 0.4001, 50, 50, 90, 90)


def test_compare():
    found = compare(
        [answer([A, B, C]), answer([A])], [answer([A, B, near]), answer([A])], 0.05, lambda _: ()
    )
    assert (found["pictures"], found["objects"], found["on_both_sides"]) == (2, 4, 4)
    assert found["classes_per_picture"] == 1.5
    assert found["max_abs_error"]["scores"] == pytest.approx(1e-4, rel=0.01)
    assert set(found["max_abs_error"]) == {"boxes", "scores", "masks"}


def test_rounding_is_asked_of_the_picture_in_question():
    asked = []

    def others(picture):
        asked.append(picture)
        return [answer([A])]

    found = compare([answer([A]), answer([A, C])], [answer([A]), answer([A])], 0.05, others)
    assert (found["objects"], found["on_both_sides"]) == (3, 2)
    with pytest.raises(ExportError, match="network finds class 1"):
        compare([answer([A, C])], [answer([A])], 0.05, lambda _: [answer([A, C])])


def test_errors_over_pictures_and_none_where_other_objects_are_found():
    found = errors_between([answer([A, B, C])] * 2, [answer([A, B, C]), answer([A, B, near])], 0.05)
    assert found is not None
    assert found["scores"] == pytest.approx(1e-4, rel=0.01)
    assert errors_between([answer([A, C])], [answer([A])], 0.05) is None


@pytest.mark.slow
def test_a_small_run(tmp_path):
    path = tmp_path / "record.json"
    small = ["--size", "64x96", "--channels", "20", "--kernel-num", "4", "--pictures", "1"]
    command = [sys.executable, "-m", "benchmarks.detector", *small, "--repeats", "1"]
    subprocess.run([*command, "--json", str(path)], check=True, cwd=machine.ROOT)
    record = json.loads(path.read_text())
    assert all(record["held"].values())
    assert record["parity"]["objects"] > 0
    for side in record["from_float64"].values():
        # Rounding, and not nothing: float64 is another computation.
        assert 0 < side["masks_of_the_same_boxes"] < 1e-4
        assert 0 < side["answer"]["masks"] < 1e-3
