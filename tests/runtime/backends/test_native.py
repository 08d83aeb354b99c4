"""Native operators in a session: chosen, asked for, switched off, absent and broken."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from fdconv_deploy.environment import installed_version
from fdconv_deploy.errors import BackendError
from fdconv_deploy.export import export_module
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.ops import native
from fdconv_deploy.ops.native import BuildError, build, compiler, library_name
from fdconv_deploy.runtime import open_session
from tests.reference.lively import enliven, lively_input

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library."""
    if compiler() is None:
        pytest.skip("no C compiler for the native operators (cc, gcc, clang or $CC)")
    return build(tmp_path_factory.mktemp("native")).parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of two FDConv layers."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    layers = [FDConv2d(18, 20, 3, padding=1, kernel_num=5), FDConv2d(20, 18, 1, kernel_num=3)]
    network = torch.nn.Sequential(*(enliven(layer) for layer in layers)).eval()
    export_module(network, lively_input((2, 18, 8, 8)), folder)
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the package looks for the library: an empty folder."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.delenv(native.SWITCH, raising=False)
    return tmp_path


def answer(bundle: Path, **options) -> np.ndarray:
    with open_session(bundle, **options) as session:
        (name,) = (spec.name for spec in session.bundle.manifest.inputs[2])
        (output,) = session.run_raw({name: lively_input((2, 18, 8, 8)).numpy()}).values()
        return output


def test_used_where_they_are_built(here: Path, built: Path, bundle: Path) -> None:
    shutil.copy(built / library_name(), here)
    with open_session(bundle, "onnxruntime-cpu") as session:
        assert session.operators == "native operators, since they are built here"
    chosen, portable = answer(bundle), answer(bundle, native=False)
    assert not np.array_equal(chosen, portable)
    assert np.abs(chosen - portable).max() <= 2e-6 * np.abs(portable).max()


def test_a_session_outlives_the_one_before(here: Path, built: Path, bundle: Path) -> None:
    shutil.copy(built / library_name(), here)
    first = answer(bundle)
    with open_session(bundle, native=True):
        assert np.array_equal(answer(bundle), first)
    assert np.array_equal(answer(bundle, threads=3), first)


def test_switched_off(
    here: Path, built: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(built / library_name(), here)
    monkeypatch.setenv("FDCONV_NATIVE", "0")
    with open_session(bundle) as session:
        assert (
            session.operators
            == "portable operators, since FDCONV_NATIVE=0 switches native ones off"
        )
    with open_session(bundle, native=True) as session:  # closer to the caller than the switch
        assert session.operators.startswith("native")
    with open_session(bundle, native=False) as session:
        assert "open_session(native=False) switches native ones off" in session.operators


def test_absent(here: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(bundle) as session:
        assert session.operators.startswith("portable operators")
        assert "python -m fdconv_deploy.ops.native" in session.operators
    answer(bundle)
    with pytest.raises(BackendError, match="Native operators are required"):
        open_session(bundle, native=True)
    monkeypatch.setenv("FDCONV_NATIVE", "1")
    with pytest.raises(BackendError, match=r"python -m fdconv_deploy\.ops\.native builds them"):
        open_session(bundle)
    monkeypatch.setenv("FDCONV_NATIVE", "yes")
    with pytest.raises(BackendError, match="FDCONV_NATIVE is 0, 1 or nchw, not 'yes'"):
        open_session(bundle)


def test_built_of_an_older_source(here: Path, built: Path, bundle: Path, caplog) -> None:
    """Else an update would halve the speed, and say nothing."""
    shutil.copy(built / library_name(), here / "fdconv_native_0123456789ab_linux_x86_64.so")
    with open_session(bundle) as session:
        assert "are built of another version of their source" in session.operators
    assert "python -m fdconv_deploy.ops.native builds them anew" in caplog.text


def test_a_bundle_of_an_older_format_runs_portably(
    here: Path, built: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its nodes lack what the C reads: stock ONNX Runtime runs it as it always did."""
    shutil.copy(built / library_name(), here)
    older = tmp_path_factory.mktemp("older") / "bundle"
    shutil.copytree(bundle, older)
    for path in older.glob("*.onnx"):
        model = onnx.load(str(path), load_external_data=False)
        for node in model.graph.node:
            names = {"layer", "kernel_size", "row_frequencies", "feature_size", "complex_rows"}
            kept = [a for a in node.attribute if a.name not in names]
            del node.attribute[:]
            node.attribute.extend(kept)
        for function in model.functions:
            declared = [name for name in function.attribute if name not in names]
            del function.attribute[:]
            function.attribute.extend(declared)
        onnx.save(model, str(path))
    manifest = json.loads((older / "manifest.json").read_text())
    manifest["format_version"] = 2
    for name, info in manifest["files"].items():
        content = (older / name).read_bytes()
        info.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    (older / "manifest.json").write_text(json.dumps(manifest))
    assert np.array_equal(answer(older), answer(bundle, native=False))
    with open_session(older) as session:
        session.warm_up()
        assert session.operators.startswith("portable operators, since this bundle is of format 2")
        assert "export it again" in session.operators
    with pytest.raises(BackendError, match="required, but this bundle is of format 2"):
        answer(older, native=True)


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF" + bytes(100)])
def test_broken(here: Path, bundle: Path, content: bytes) -> None:
    (here / library_name()).write_bytes(content)
    with (
        pytest.raises(BackendError, match="cannot load the native operators") as raised,
        open_session(bundle) as session,
    ):
        session.warm_up()
    assert "FDCONV_NATIVE=0" in str(raised.value)


def test_only_on_the_cpu(here: Path, bundle: Path) -> None:
    with pytest.raises(
        BackendError, match=r"run in the backends onnxruntime-cpu, .*not in 'tensorrt'"
    ):
        open_session(bundle, "tensorrt", native=True)
    providers = ["AzureExecutionProvider", "CPUExecutionProvider"]
    with pytest.raises(BackendError, match="run on CPUExecutionProvider alone"):
        open_session(bundle, providers=providers, native=True)


class TestBuilding:
    def test_the_command(self, tmp_path: Path) -> None:
        if compiler() is None:
            pytest.skip("no C compiler for the native operators (cc, gcc, clang or $CC)")
        (tmp_path / "fdconv_native_000000000000_old.so").touch()
        command = [sys.executable, "-m", "fdconv_deploy.ops.native", "--folder", str(tmp_path)]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        versions = [None, *filter(None, [installed_version("openvino")])]
        names = [library_name(version) for version in versions]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
        assert said == "".join(f"Built {tmp_path / name}\n" for name in names)

    def test_without_a_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "no-such-compiler")
        with pytest.raises(BuildError, match="need a C compiler"):
            build(tmp_path)
        command = [sys.executable, "-m", "fdconv_deploy.ops.native", "--folder", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("The native operators need a C compiler")
        assert "Traceback" not in done.stderr
        optional = subprocess.run([*command, "--optional"], cwd=ROOT, capture_output=True)
        assert optional.returncode == 0
        assert not list(tmp_path.iterdir())

    def test_a_compiler_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        failing = tmp_path / "failing"
        failing.write_text("#!/bin/sh\necho 'error: nothing works' >&2\nexit 1\n")
        failing.chmod(0o755)
        monkeypatch.setenv("CC", str(failing))
        with pytest.raises(BuildError, match="nothing works"):
            build(tmp_path / "folder")
        assert not list((tmp_path / "folder").iterdir())

    def test_with_the_package(self, tmp_path: Path) -> None:
        """What installing runs, from a copy of this tree's tracked files."""
        if compiler() is None:
            pytest.skip("no C compiler for the native operators (cc, gcc, clang or $CC)")
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tmp_path)
        source = "fdconv_deploy/ops/native"
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / source, tmp_path / source, ignore=ignored)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
        assert (tmp_path / source / library_name()).is_file()
        (tmp_path / source / library_name()).unlink()
        # Without a compiler it goes on and says so.
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env={"CC": "no-such-compiler"}
        )
        assert done.returncode == 0
        assert "need a C compiler" in done.stdout + done.stderr
