"""`benchmarks/gpu.sh` runs from end to end without a GPU, and its page is up to date."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from benchmarks.gpu.run import Record
from fdconv_deploy.errors import BackendError

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


# Lets nothing be imported but the standard library, the repository, and torch, Triton and numpy
# with what they ask for: what the GPU machine has.
BARE = """
import importlib.util, re, sys
from importlib.metadata import distribution, packages_distributions, PackageNotFoundError

def closure(name, seen):
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return seen
    key = found.metadata["Name"].lower().replace("_", "-")
    if key not in seen:
        seen.add(key)
        for text in found.requires or ():
            if "extra ==" not in text:
                closure(re.match(r"[A-Za-z0-9._-]+", text).group(), seen)
    return seen

there = {"fdconv-deploy"}
for name in ("torch", "triton", "numpy"):
    closure(name, there)
HIDDEN = {
    module for module, owners in packages_distributions().items()
    if not any(o.lower().replace("_", "-") in there for o in owners)
}

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in HIDDEN else find_spec(name, package)
)

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""


def run(*options: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT")}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    if path is not None:
        (path / "sitecustomize.py").write_text(BARE)
        environment["PYTHONPATH"] = str(path)
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_triton
def test_a_dry_run_needs_torch_triton_and_numpy_alone(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    done = run("--dry-run", "--output", str(tmp_path / "out"), path=bare)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").iterdir()
    record = json.loads(path.read_text())
    assert record["dry_run"]
    assert record["environment"]["torch"] == torch.__version__
    imports = record["imports"]
    assert "stand-in" in imports["pydantic"]
    for name in ("onnx", "onnxruntime", "onnx_graphsurgeon"):
        assert imports[name].startswith("ModuleNotFoundError")
    # What these would be needed for is named, and nothing else is left out.
    assert record["imports"]["C compiler"]
    assert record["summary"][0].keys() >= {"ms", "baseline_ms", "vs_baseline", "eager_vs_this"}
    assert [part["what"] for part in record["not_run"]] == [
        "FDConv, ONNX Runtime, batch 1", "baseline, ONNX Runtime, batch 1",
    ]  # fmt: skip
    assert all("No module named" in part["reason"] for part in record["not_run"])
    assert record["environment"]["compiled"] >= 3  # plugins' PTX, in processes that interpret not
    assert {row["layer"] for row in record["kernels"]} == {"32→32 1×1", "32→20 1×1"}
    for row in record["kernels"]:
        assert row["error"] <= (2e-6 if row["dtype"] == "float32" else 1.5e-3)
        assert row["us"].keys() == {"rows", "columns", "pair"}
    errors = {(r["network"], r["backend"], r["dtype"]): r["error"] for r in record["networks"]}
    assert len(errors) == 6
    for (_, _, dtype), error in errors.items():
        assert error <= (4e-6 if dtype == "float32" else 5e-3)
    # Each network's baseline on the same backend.
    assert {key[1:] for key in errors if key[0] == "FDConv"} == {
        key[1:] for key in errors if key[0] == "baseline"
    }
    assert str(path) in done.stdout
    assert "ms compute" in done.stdout


@needs_triton
def test_onnxruntime_runs_both_networks(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from benchmarks.gpu import networks

    row = networks.onnxruntime(networks.Networks(dry=True), "baseline", 1)
    assert row["backend"] == "onnxruntime-cpu"
    assert row["error"] <= 4e-6


@needs_triton
def test_what_there_is_no_time_for_is_recorded(tmp_path):
    done = run("--dry-run", "--seconds", "0", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads(next(tmp_path.iterdir()).read_text())
    assert record["kernels"] == record["networks"] == []
    assert all(r["reason"] == "no time left of 0 s" for r in record["not_run"])
    assert len(record["not_run"]) > 3


def a_record(folder: Path) -> Record:
    return Record(argparse.Namespace(seconds=60.0, output=folder, dry_run=True, resume=None))


def test_a_wrong_answer_is_recorded_with_its_time(tmp_path):
    record = a_record(tmp_path)
    row = {"network": "FDConv", "backend": "fused", "dtype": "float16", "batch": 1, "ms": 1.5}
    for error in (1e-3, 0.5, float("nan")):
        record.add(
            "networks", lambda e=error: {**row, "timed": "compute", "error": e, "limit": 2e-2}
        )
    written = json.loads(record.write().read_text())["networks"]
    assert [r["within"] for r in written] == [True, False, False]
    assert all(r["ms"] == 1.5 for r in written)
    assert len(record.wrong()) == 2


def test_a_part_that_fails_leaves_the_record_whole(tmp_path):
    record = a_record(tmp_path)

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    assert not record.attempt("a part", fail)
    (part,) = json.loads(next(tmp_path.iterdir()).read_text())["not_run"]  # written meanwhile
    assert part == {
        "what": "a part",
        "reason": "RuntimeError: CUDA error: an illegal memory access",
    }
    assert record.content["failed"] == ["a part"]  # so that the exit code is not 0


def test_a_package_that_is_missing_is_no_failure(tmp_path):
    record = a_record(tmp_path)
    for error in (ModuleNotFoundError("No module named 'onnx'"), BackendError("no CUDA provider")):
        assert not record.attempt("a part", Mock(side_effect=error))
    assert not record.content["failed"]


def test_what_runs_is_named_before_it_ends(tmp_path):
    record, seen = a_record(tmp_path), []
    record.attempt(
        "a part", lambda: seen.extend(json.loads(p.read_text()) for p in tmp_path.iterdir())
    )
    assert [one["running"] for one in seen] == ["a part"]
    assert json.loads(record.write().read_text())["running"] is None


def test_a_second_run_on_the_same_day_has_a_record_of_its_own(tmp_path):
    paths = set()
    for clock in ("10:00:00", "10:00:01"):
        record = a_record(tmp_path)
        record.content["date"] = f"2026-11-29T{clock}"
        record.write()
        record.content["dry_run"], record.content["environment"]["gpu"] = False, "NVIDIA H200"
        paths.add(record.write().name)  # not the one of before the GPU was known
    assert paths == {p.name for p in tmp_path.iterdir()}
    assert paths == {f"2026-11-29-gpu-nvidia-h200-10000{n}.json" for n in (0, 1)}


def test_after_an_illegal_access_a_fresh_process_goes_on_with_the_next_part(tmp_path, monkeypatch):
    from benchmarks.gpu import run as script

    started: list[list[str]] = []
    monkeypatch.setattr(script, "poisoned", lambda: True)
    monkeypatch.setattr(script.os, "execv", lambda _python, command: started.append(command))
    monkeypatch.setattr(sys, "argv", ["run.py", "--seconds", "60"])
    record = a_record(tmp_path)
    record.attempt("imports", lambda: None, 0)
    record.attempt("a part", Mock(side_effect=RuntimeError("CUDA error: an illegal memory access")))
    ((*_, option, path),) = started
    assert (started[0][1:5], option) == (
        ["-m", "benchmarks.gpu.run", "--seconds", "60"],
        "--resume",
    )
    again = Record(
        argparse.Namespace(seconds=60.0, output=tmp_path, dry_run=True, resume=Path(path))
    )
    parts = {name: Mock() for name in ("imports", "a part", "another")}
    again.attempt("imports", parts["imports"], 0)
    again.attempt("a part", parts["a part"])
    again.attempt("another", parts["another"])
    assert [part.called for part in parts.values()] == [True, False, True]
    (left,) = json.loads(again.write().read_text())["not_run"]
    assert left["what"] == "a part"
    assert again.write() == record.path
    assert again.content["failed"] == ["a part"]


def test_fdconv_is_set_beside_its_baseline_and_eager():
    from benchmarks.gpu.run import summarise, table

    rows = [
        {"backend": backend, "dtype": "float16", "batch": 1, "network": network, "ms": ms}
        for backend, network, ms in (
            ("fused", "FDConv", 0.9), ("fused", "baseline", 0.5), ("eager", "FDConv", 9.0),
        )
    ]  # fmt: skip
    fused, eager = summarise(rows)
    assert (fused["vs_baseline"], fused["eager_vs_this"]) == pytest.approx((1.8, 10))
    assert (eager["baseline_ms"], eager["eager_vs_this"]) == (None, 1)
    assert table([fused, eager]).splitlines()[1].split()[-4:] == [
        "0.900",
        "0.500",
        "1.800×",
        "10.000×",
    ]


def test_an_interrupted_part_is_recorded(tmp_path, capsys):
    record = a_record(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        record.attempt("a part", Mock(side_effect=KeyboardInterrupt))
    assert stopped.value.code == 130
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["not_run"][0]["reason"].startswith("KeyboardInterrupt")
    assert str(path) in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_said_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="the record cannot be written to"):
        a_record(tmp_path / "file")


SMI = """#!{python}
import sys, time
for mhz, active in ((1980, "0x1"), (1755, "0x4"), (1980, "0x0")):
    print(f"{{mhz}}, 3201, 512.34, 61, {{active}}", flush=True)
print("[Unknown Error]", flush=True)
time.sleep(60)
"""


def test_clocks_are_sampled_and_one_that_moved_is_marked(tmp_path, monkeypatch):
    from benchmarks.gpu.timing import Clocks

    (tmp_path / "nvidia-smi").write_text(SMI.format(python=sys.executable))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    start = time.monotonic()
    clocks = Clocks("GPU-1234")
    while clocks.problem is None:
        assert time.monotonic() - start < 60
        time.sleep(0.01)
    seen = clocks.between(start, time.monotonic())
    clocks.close()
    assert seen == {
        "samples": 3, "sm_mhz": [1755.0, 1980.0, 1980.0], "steady": False, "memory_mhz": 3201.0,
        "watts": 512.34, "celsius": 61.0, "throttled": ["power cap"],
    }  # fmt: skip
    assert clocks.between(0, 1) is None
    assert "Unknown Error" in clocks.problem


def test_the_driver_is_described(tmp_path, monkeypatch):
    from benchmarks.gpu.timing import driver_state

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '580.159, 96.0, 700 W, 1980 MHz, 3201 MHz, Enabled, Enabled'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = driver_state("GPU-1234")
    assert (found["driver_version"], found["power.limit"]) == ("580.159", "700 W")
    smi.write_text("#!/bin/sh\necho 'Field \"x\" is not valid'; exit 2\n")
    assert "is not valid" in driver_state("GPU-1234")
    smi.unlink()


def test_without_nvidia_smi_the_reason_is_kept(monkeypatch, tmp_path):
    from benchmarks.gpu.timing import Clocks

    monkeypatch.setenv("PATH", str(tmp_path))
    assert "does not run" in Clocks("0").problem


class FakeDriver:
    """Notes what it is asked for, as ``cuda.bindings.driver`` is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append((name, *arguments))
            return (0, f"a {name}")

        return call


def test_own_ptx_is_launched_as_tensorrt_would():
    from benchmarks.gpu.own_ptx import Driver
    from fdconv_deploy.ops.compile_kernels import CompiledKernel

    kernel = CompiledKernel("rows", 90, ".version 8.0\n", ("u64",) * 3, 128, 4096)
    driver = FakeDriver()
    Driver(driver).launch(kernel, (2, 40, 1), [16, 32, 48])
    names = [call[0] for call in driver.calls]
    assert names == [
        "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuCtxSynchronize",
        "cuModuleUnload",
    ]  # fmt: skip
    assert driver.calls[1][1:] == ("a cuModuleLoadData", b"rows")
    _, function, *given = driver.calls[2]
    assert function == "a cuModuleGetFunction"
    values, kinds = given[8]
    assert given[:8] == [2, 40, 1, 128, 1, 1, 4096, 0]
    assert values == (16, 32, 48)
    assert kinds == (ctypes.c_void_p,) * 3


@needs_triton
@pytest.mark.parametrize("shape", [(64, 64, 3), (256, 64, 1)], ids=str)
def test_own_ptx_is_that_of_the_plugins(shape):
    from benchmarks.gpu.kernels import Assembly
    from benchmarks.gpu.own_ptx import assembly_steps
    from fdconv_deploy.folding.layer import fold_layer
    from fdconv_deploy.nn import FDConv2d
    from fdconv_deploy.ops.frequency_assembly.plugin import COLUMN_INPUTS, ROW_INPUTS
    from fdconv_deploy.ops.tensorrt_plugins import launch_of

    ins, outs, side = shape
    layer = FDConv2d(ins, outs, side, padding=side // 2, kernel_num=64).eval()
    assembly = Assembly(layer, fold_layer(layer, (8, 8), name="layer"), 1, "cpu")
    weight = assembly.weight(torch.float16)
    rows, columns = assembly_steps(assembly, torch.float16, weight)
    sizes = [*assembly.sizes.numbers(), 1]
    assert rows.launch == launch_of("FrequencyAssemblyRows", sizes)
    assert columns.launch == launch_of("FrequencyAssemblyColumns_Half", sizes)
    assert len(rows.tensors) == len(ROW_INPUTS) + 1
    assert len(columns.tensors) == len(COLUMN_INPUTS) + 1


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do():
    done = run()
    assert done.returncode == 1
    assert "need an NVIDIA GPU" in done.stderr
    assert "--dry-run" in done.stderr
    assert "Traceback" not in done.stderr
