"""What docs/bench.md says to type, typed."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.serve import Settings, running
from tests.latency.test_command import BRIEF
from tests.test_cli import fdconv

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\$ fdconv (bench .+)$", TEXT, re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_bundle, other_bundle) -> Path:
    made = tmp_path_factory.mktemp("documentation")
    shutil.copytree(toy_bundle, made / "bundle")
    shutil.copytree(other_bundle, made / "bundle-fp16")
    shutil.copytree(other_bundle, made / "plain")
    shutil.copy(packaged_checkpoint(), made / "upernet.pth")
    return made


@pytest.fixture(scope="module")
def url(folder) -> Iterator[str]:
    with running([folder / "bundle"], settings=Settings(threads=1)) as address:
        yield address


@pytest.mark.parametrize("line", LINES)
def test_lines(line, folder, monkeypatch, capfd, request):
    monkeypatch.chdir(folder)
    if "http://localhost:8000" in line:
        line = line.replace("http://localhost:8000", request.getfixturevalue("url"))
    code, _, err = fdconv(monkeypatch, capfd, *shlex.split(line), *BRIEF)
    assert code == 0, err
    for file in re.findall(r"\S+\.(?:html|md|json|csv)\b", line):
        assert (folder / file).stat().st_size > 300


def test_options_and_files_exist(monkeypatch, capfd):
    _, out, _ = fdconv(monkeypatch, capfd, "bench", "--help")
    for option in set(re.findall(r"`(--[a-z-]+)", TEXT)):
        assert option in out, option
    assert len(LINES) > 6
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link
