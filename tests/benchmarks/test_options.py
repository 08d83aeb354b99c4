"""What the scripts' command lines share."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from benchmarks.options import keep, script
from benchmarks.records import newest
from fdconv_deploy.latency import machine

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if all(part in path.read_text() for part in ('__name__ == "__main__"', "parse_args("))
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_does(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert " ".join(module.__doc__.split())[:40] in said


def test_a_result_is_kept_with_its_machine_and_found_by_its_kind(tmp_path, capsys):
    where = machine.describe(1)
    parsed = script("Measures.").parse_args(["--threads", "1"])
    keep(parsed, "thing", where, {"ms": 2})
    assert where["cpu"] in capsys.readouterr().out
    assert newest("thing", tmp_path) is None
    parsed = script("Measures.").parse_args(["--json", str(tmp_path / "new" / "a.json")])
    keep(parsed, "thing", where, {"ms": 2})
    found = newest("thing", tmp_path / "new")
    assert found is not None
    assert found["ms"] == 2
    assert found["machine"] == where
