"""The fuzzer finds what it looks for, and nothing today."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import fuzz_readers
from benchmarks.fuzz_readers import READERS, mutated, run_once, said, summary
from fdconv_deploy.ops.native import native_library


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    if name == "graph-native" and native_library()[0] is None:
        pytest.skip("the native operators are not built")
    ends = [run_once(name, number, tmp_path) for number in range(12)]
    found = summary(name, ends)
    assert found["runs"] == 12
    assert found["failures"] == []
    assert list(tmp_path.glob("*.pth")) == []


# What of the seeds is refused whole: see `benchmarks.fuzz.bundles`.
NOT_READ = {"detector.json"}


@pytest.mark.parametrize(
    "name", [name for name in READERS if name not in ("graph-native", "checkpoint-index")]
)
def test_seeds_are_read(name: str, tmp_path: Path) -> None:
    for file, content in READERS[name].seeds().items():
        path = tmp_path / file
        path.write_bytes(content)
        if file not in NOT_READ:
            READERS[name].read(path)


def test_a_run_is_the_same_whenever_it_is_made() -> None:
    for name in READERS:
        assert mutated(name, 7) == mutated(name, 7)
        assert len({mutated(name, number)[1] for number in range(5)}) > 1


def test_the_script_counts_and_keeps_a_record(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.fuzz_readers", "--json", str(tmp_path / "a.json")]
    names = ["--only", "label-map", "--only", "run-lengths"]
    done = subprocess.run([*command, *names, "--runs", "12"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "a.json").read_text())["readers"]
    assert [(one["reader"], one["runs"]) for one in found] == [
        ("label-map", 2),
        ("run-lengths", 10),
    ]
    assert all(one["read"] + one["refused"] == one["runs"] for one in found)


def test_all_readers_make_twenty_thousand_runs() -> None:
    assert sum(reader.runs for reader in READERS.values()) >= 20_000


def test_an_error_that_is_not_the_projects_own_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> None:
        raise KeyError(path.name)

    monkeypatch.setitem(READERS, "config", replace(READERS["config"], read=read))
    end = run_once("config", 3, tmp_path)
    assert end["how"] == "failed"
    assert "KeyError" in end["detail"]


def test_a_child_that_falls_silent_is_noticed() -> None:
    code = "import time; print('{}', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert list(said(process, 0.2)) == [b"{}", None]
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_child_that_dies_ends_one_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a reader that crashes Python itself in runs 1 and 3."""
    code = (
        "import os, sys, json\n"
        "first, count = int(sys.argv[1]), int(sys.argv[2])\n"
        "for n in range(first, first + count):\n"
        "    print(json.dumps({'begins': n}), flush=True)\n"
        "    if n in (1, 3): os.abort()\n"
        "    print(json.dumps({'number': n, 'how': 'read'}), flush=True)\n"
    )

    def command(_: str, batch: list[int], __: Namespace) -> list[str]:
        return [sys.executable, "-c", code, str(batch[0]), str(len(batch))]

    monkeypatch.setattr(fuzz_readers, "child_command", command)
    ends = list(fuzz_readers.runs_of("config", range(6), Namespace(seconds=60)))
    assert [(end["number"], end["how"]) for end in ends] == [
        (n, "failed" if n in (1, 3) else "read") for n in range(6)
    ]
