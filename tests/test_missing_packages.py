"""Every command without the packages that not everybody installs: a sentence, not a traceback.

Each runs in a process of its own, and so do those that it starts: there a module is missing as
if it had never been installed.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fdconv_deploy import environment as installing
from fdconv_deploy.demo import held_out, packaged_checkpoint
from fdconv_deploy.environment import install
from tests.runtime import toy

# Python runs a module of this name before anything else.
HIDING = """
import os, sys

class Hidden:
    names = os.environ["HIDDEN"].split(",")

    def find_spec(self, name, path=None, target=None):
        if any(name == hidden or name.startswith(hidden + ".") for hidden in self.names):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
EXPORT = "export CHECKPOINT -o OUT --size 64"
CASES = [
    *((command, "torch", "torch") for command in (
        "inspect CHECKPOINT",
        "convert CHECKPOINT -o OUT",
        EXPORT,
        "verify BUNDLE CHECKPOINT",
        "evaluate CHECKPOINT --images IMAGES --masks IMAGES",
        "bench CHECKPOINT --size 64 --quiet",
        "bench BUNDLE CHECKPOINT --quiet --seconds 0.2 --warm-up 0",
        "demo --output OUT",
    )),
    *((command, "safetensors", "safetensors") for command in ("inspect CHECKPOINT", EXPORT)),
    (EXPORT, "onnx", "onnx"),
    (EXPORT, "onnxscript", "onnxscript"),
    (EXPORT, "onnx_graphsurgeon", "onnx-graphsurgeon"),
    ("bench BUNDLE --profile --quiet --seconds 0.2 --warm-up 0", "onnx", "onnx"),
    ("bench CHECKPOINT --backend fused --size 64 --quiet", "triton", "triton"),
    *((command, "onnxruntime", "onnxruntime") for command in (
        EXPORT,
        "verify BUNDLE CHECKPOINT",
        "segment BUNDLE IMAGE -o OUT",
        "evaluate BUNDLE --images IMAGES --masks IMAGES",
        "bench BUNDLE --quiet",
        "serve BUNDLE --port 0",
    )),
    *((
        "serve BUNDLE --port 0",
        module,
        module.replace("_", "-"),
    ) for module in (
        "fastapi", "starlette", "uvicorn", "prometheus_client", "python_multipart",
    )),
    ("serve BUNDLE --port 0 --settings TRACING", "opentelemetry.sdk", "opentelemetry-sdk"),
    ("serve BUNDLE --port 0 --settings TRACING", "opentelemetry.exporter",
     "opentelemetry-exporter-otlp-proto-http"),
    ("serve BUNDLE --port 0 --grpc-port 0", "grpc", "grpcio"),
    ("serve BUNDLE --port 0 --grpc-port 0", "google.protobuf", "protobuf"),
    ("serve BUNDLE --port 0 --ray local", "ray", "ray"),
    ("build BUNDLE", "tensorrt", "tensorrt"),
    ("segment BUNDLE IMAGE -o OUT --backend openvino", "openvino", "openvino"),
]  # fmt: skip


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the words in capitals stand for."""
    folder = tmp_path_factory.mktemp("missing")
    (folder / "sitecustomize.py").write_text(HIDING)
    (folder / "tracing.json").write_text(json.dumps({"tracing": True}))
    image = held_out()[0][0]
    (folder / "scenes").mkdir()
    for path in (image, image.with_name(f"{image.stem}_labels.png")):
        (folder / "scenes" / path.name).write_bytes(path.read_bytes())
    return {
        "BUNDLE": toy.make_bundle(folder / "bundle", batches=(1,)).path,
        "CHECKPOINT": packaged_checkpoint(),
        "IMAGE": image,
        "IMAGES": folder / "scenes",
        "TRACING": folder / "tracing.json",
        "OUT": folder / "out.pth",
        "HIDING": folder,
    }


def run(command: str, names: dict[str, Path], *hidden: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(names.get(word, word)) for word in command.split()]
    paths = [str(names["HIDING"]), *sys.path]
    return subprocess.run(
        [sys.executable, "-m", "fdconv_deploy", *arguments],
        env={**os.environ, "HIDDEN": ",".join(hidden), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(("command", "module", "package"), CASES)
def test_without(command: str, module: str, package: str, names: dict[str, Path]) -> None:
    finished = run(command, names, module)
    said = " ".join(finished.stderr.split())
    assert finished.returncode == 1, said
    assert "Traceback" not in said
    assert "listening" not in said
    assert "not installed" in said
    assert "pip install " in said
    assert package in said.partition("pip install ")[2]
    assert not names["OUT"].exists()


def test_all_that_a_command_lacks_is_named_at_once(names: dict[str, Path]) -> None:
    hidden = ["torch", "onnx", "onnxscript", "onnx_graphsurgeon", "safetensors"]
    said = run("inspect CHECKPOINT", names, *hidden).stderr.partition("pip install ")[2]
    assert all(f"{name.replace('_', '-')}>=" in said for name in hidden)
    assert "onnxruntime" not in said  # is there


def test_commands_name_what_exporting_needs_not_a_backend(names: dict[str, Path]) -> None:
    said = run("export BUNDLE -o OUT --format onnx", names, "onnx", "torch", "openvino").stderr
    assert "onnx, which is not installed" in said
    assert "torch>=" in said
    assert "openvino" not in said


@pytest.mark.parametrize("driver", [False, True])
def test_torch_is_installed_first_and_by_itself(monkeypatch, driver: bool) -> None:
    """From PyTorch's CPU index, or PyPI's CUDA build where there is an NVIDIA driver."""
    monkeypatch.setattr(installing, "nvidia_driver", lambda: driver)
    monkeypatch.setattr(sys, "platform", "linux")
    first, rest = (shlex.split(part) for part in install("torch", "onnx").split(" && "))
    assert first[:2] == rest[:2] == ["pip", "install"]
    assert first[2].startswith("torch>=")
    assert ("--index-url" in first) != driver
    assert [word.partition(">")[0] for word in rest[2:]] == ["onnx"]
    assert "&&" not in install("torch")
    assert "&&" not in install("onnx")


@pytest.mark.parametrize(
    ("here", "name", "expected"),
    [
        (["onnxruntime"], "onnxruntime-gpu", "pip uninstall -y onnxruntime && pip install "),
        (["onnxruntime-gpu"], "onnxruntime", "pip uninstall -y onnxruntime-gpu && pip install "),
        (["onnxruntime-gpu"], "onnxruntime-gpu", "pip install "),
        (["onnxruntime"], "onnx", "pip install "),
        ([], "onnxruntime-gpu", "pip install "),
    ],
)
def test_no_second_onnxruntime_is_installed_over_the_first(monkeypatch, here, name, expected):
    """They unpack into one folder: the command that doctor printed broke what was there."""
    monkeypatch.setattr(installing, "installed_version", dict.fromkeys(here, "1.31.1").get)
    command = install(name)
    assert command.startswith(expected)
    assert shlex.split(command)[expected.count(" ")].startswith(name)


def test_without_metadata(names: dict[str, Path]) -> None:
    """Run from its source, where nothing tells versions."""
    program = (
        "from importlib import metadata\n"
        "def absent(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.metadata = absent\n"
        "from fdconv_deploy.environment import install\n"
        "print(install('onnx_graphsurgeon', 'grpc', extra='export'))"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert found.strip() == "pip install onnx-graphsurgeon grpcio"


@pytest.mark.parametrize("command", ["segment BUNDLE IMAGE -o OUT", "bench BUNDLE --seconds 0.2"])
def test_what_needs_none_of_them_runs_without(command: str, names: dict[str, Path]) -> None:
    hidden = ["torch", "onnx", "onnxscript", "safetensors", "fastapi", "grpc", "psutil"]
    finished = run(command, names, *hidden, "matplotlib", "triton", "pynvml", "pycocotools")
    assert finished.returncode == 0, finished.stderr
