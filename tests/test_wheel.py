"""What installing puts on a machine: one package, and little of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
# The house aims at 1 MB. The paper's other networks took a tenth more, other runtimes and the
# browser's page as much, and the operators in C have grown by their forms in blocks.
LIMIT_BYTES = 1_350_000
NATIVE_BYTES = 175_000  # of the operators in C, which are not compiled here


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


def test_no_two_extras_bring_packages_that_overwrite_each_other(wheel: Path) -> None:
    """onnxruntime and onnxruntime-gpu unpack into one folder; only [cpu] and [gpu] name them."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("/METADATA")]
        metadata = message_from_bytes(archive.read(name))
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]

    def brought(extra: str) -> set[str]:
        found: set[str] = set()
        for one in requirements:
            if "extra" not in str(one.marker) or not one.marker.evaluate({"extra": extra}):
                continue
            found.add(str(one).partition(">")[0])
            if one.name == "fdconv-deploy":
                found |= set().union(*map(brought, one.extras))
        return {package for package in found if package.startswith("onnxruntime")}

    # Developers' extras are for machines without a GPU.
    users = set(metadata.get_all("Provides-Extra")) - {"dev", "load"}
    assert {extra: brought(extra) for extra in users if brought(extra)} == {
        "cpu": {"onnxruntime"},
        "gpu": {"onnxruntime-gpu[cuda,cudnn]"},
    }
