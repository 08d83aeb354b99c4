"""What docs/serving.md says to type, typed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdconv_deploy.serve import Settings, running
from tests.serve.conftest import encoded, typed

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
CURLS = re.findall(r"^\$ (curl .+)$", TEXT, re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, picture: np.ndarray) -> Path:
    made = tmp_path_factory.mktemp("documentation")
    for name in ("street.jpg", "other.jpg"):
        (made / name).write_bytes(encoded(picture, "JPEG"))
    return made


@pytest.fixture(scope="module")
def address(bundles: list[Path]) -> Iterator[str]:
    with running(bundles, settings=Settings(threads=1)) as url:
        yield url.removeprefix("http://")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", CURLS)
def test_curl(line: str, folder: Path, address: str) -> None:
    file = typed(line, folder, address)
    if file is None:
        return
    if file.suffix == ".json":
        assert json.loads(file.read_text())
    elif file.suffix in (".png", ".jpg"):
        assert Image.open(file).format == {".png": "PNG", ".jpg": "JPEG"}[file.suffix]
    elif file.suffix == ".npz":
        assert np.load(file)["logits"].ndim == 3
    elif file.suffix == ".zip":
        assert len(zipfile.ZipFile(file).namelist()) == 2
    else:
        assert "fdconv_requests_total" in file.read_text()
    file.unlink()


def test_there_are_lines() -> None:
    assert len(CURLS) > 12


def test_python(folder: Path, address: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    code = code.replace("localhost:8000", address)
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=60,
    )


def test_settings_and_scripts_exist() -> None:
    table = TEXT.partition("| setting (`--settings")[2].partition("\n\n")[0]
    named = set(
        re.findall(r"`([a-z_]+)`", "\n".join(r.split("|")[1] for r in table.splitlines()[2:]))
    )
    assert named <= set(Settings.model_fields)
    assert len(named) > 25
    for module in re.findall(r"python -m (benchmarks\.serving\.\w+)", TEXT):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / "docs" / link.partition("#")[0]).exists(), link


def test_table_of_clients_is_that_of_the_record() -> None:
    pytest.importorskip("psutil", reason="psutil is not installed")
    from benchmarks.serving.clients.__main__ import table

    text = (ROOT / "docs" / "serving-clients.md").read_text(encoding="utf-8")
    record = re.search(r"\]\(\.\./(benchmarks/results/[^)]+)\)", text)
    assert record is not None
    found = json.loads((ROOT / record[1]).read_text(encoding="utf-8"))
    assert table(found["clients"]) in text
    assert all(found["held"].values())
