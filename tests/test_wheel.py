"""What installing puts on a machine: one package, and little of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A tenth more than the house's aim of 1 MB: what the transformers and query heads took.
LIMIT_BYTES = 1_100_000
NATIVE_BYTES = 70_000  # of the operators in C, which are not compiled here


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of this tree, without native operators."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fdconv_deploy", "export", "serve"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "out"],
        cwd=source,
        env=os.environ | {"CC": "no-such-compiler"},
        capture_output=True,
        check=True,
    )
    (built,) = (source / "out").glob("*.whl")
    return built


def test_wheel_holds_one_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"fdconv_deploy"}
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("serve/**/*.py")}
    modules |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("export/**/*.py")}
    assert {f"fdconv_deploy/{name}" for name in modules} <= set(names)


def test_wheel_holds_data_and_no_demo(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fdconv_deploy/serve/static/index.html", "fdconv_deploy/py.typed"} <= names
    assert {"fdconv_deploy/sample_images/0.jpg"} <= names
    assert not [name for name in names if name.endswith((".pth", ".png"))]
    assert wheel.stat().st_size + NATIVE_BYTES <= LIMIT_BYTES


def test_wheel_is_used_beside_a_users_files(wheel: Path, tmp_path: Path) -> None:
    installed, folder = tmp_path / "site", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(installed)
    folder.mkdir()
    for name in ("export", "serve", "tests"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('the user`s {name}.py was run')\n")
    code = (
        "import fdconv_deploy, fdconv_deploy.serve, fdconv_deploy.export.api\n"
        "print(fdconv_deploy.export.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == installed / "fdconv_deploy" / "export" / "__init__.py"
