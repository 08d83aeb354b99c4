"""README's Python runs as it stands, beside a user's own files of our folders' names."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.sample_images import sample_image

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
HEADINGS = [
    "Install",
    "Quick start",
    "Your checkpoint",
    "Your own network",
    "Serve",
    "GPU",
    "How exact",
    "How fast",
    "Limits",
    "Repository layout",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder, with modules that have our folders' names and must never be imported."""
    for name in ("export", "serve", "tests", "fdconv"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the user`s {name}.py was run')\n")
    shutil.copy(packaged_checkpoint(), tmp_path / "upernet_r50_fdconv.pth")
    cv2.imwrite(str(tmp_path / "street.jpg"), sample_image(0, (256, 512)))
    return tmp_path


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippets_run_beside_a_users_files(folder: Path, snippet: str) -> None:
    small = snippet.replace("(512, 512)", "(96, 128)")
    done = subprocess.run([sys.executable, "-c", small], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any((folder / name / "manifest.json").is_file() for name in ("bundle", "module"))


def test_readme_has_its_headings_and_is_short() -> None:
    assert re.findall(r"^## (.*)$", README, re.M) == HEADINGS
    assert len(README.splitlines()) <= 130
