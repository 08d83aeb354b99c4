"""Commands start without what is heavy, and find mistakes before they import it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fdconv_deploy.demo import packaged_checkpoint
from tests.runtime import toy

CHECKPOINT = str(packaged_checkpoint())
MISTAKES = [
    "export nowhere.pth -o out --size 64",
    f"export {CHECKPOINT} -o out --size axb",
    f"export {CHECKPOINT} -o out --size 64 --precision fp8",
    f"export {CHECKPOINT} -o out --size 64 --set style",
    f"export {CHECKPOINT} -o out --size 64 --image none.jpg",
    "inspect nowhere.pth",
    f"inspect {CHECKPOINT} --config none.py",
    f"inspect {CHECKPOINT} --set style",
    f"verify nowhere {CHECKPOINT}",
    "verify nowhere nowhere.pth",
    "convert nowhere.pth -o x.pth",
    "evaluate nowhere",
    "bench nowhere",
    "segment nowhere x.jpg -o out",
    "build nowhere",
    "serve nowhere",
]
RUN = """
import atexit, json, sys
sys.argv = ["fdconv", *json.loads(sys.argv[1])]
atexit.register(lambda: print("heavy:", [n for n in ("torch", "onnx") if n in sys.modules]))
from fdconv_deploy.cli.app import main
main()
"""


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, json.dumps(arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("line", MISTAKES, ids=lambda line: " ".join(line.split()[:2]))
def test_mistakes_are_found_before_torch_is_imported(line: str, tmp_path: Path) -> None:
    done = run(line.split(), tmp_path)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert not (tmp_path / "out").exists()


def test_verify_misses_an_image_before_torch_is_imported(tmp_path: Path) -> None:
    toy.make_bundle(tmp_path / "bundle")
    done = run(["verify", "bundle", CHECKPOINT, "none.png"], tmp_path)
    assert "none.png does not exist" in done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    done = run(arguments, tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "heavy: []"
