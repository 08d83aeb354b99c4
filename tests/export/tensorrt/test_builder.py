"""NVIDIA's own parser and builder take the graphs, on a CPU.

TensorRT-RTX builds without a GPU and cannot run what it built. It has no plugins: of a plugin
variant it imports the functions, as TensorRT does where a plugin is missing.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from fdconv_deploy.errors import BackendError
from fdconv_deploy.export.tensorrt.plugin_pass import ask_for_plugins

if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
    pytest.skip(
        "TensorRT-RTX is not installed (pip install tensorrt-rtx-cu13-libs==1.7.1.116 "
        "tensorrt-rtx-cu13-bindings==1.7.1.116, 96 MB)",
        allow_module_level=True,
    )

# In a process of its own: libraries of NVIDIA's stay loaded.
BUILD = """
import ctypes, glob, os, sys
from pathlib import Path
import tensorrt_rtx_libs
for library in sorted(glob.glob(os.path.join(tensorrt_rtx_libs.__path__[0], "*.so*"))):
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
import tensorrt_rtx_bindings as trt
from fdconv_deploy.export.tensorrt.builder import BuildOptions, build_plan
from fdconv_deploy.errors import BackendError
steps = []
for graph in sys.argv[1:]:
    try:
        plan = build_plan(trt, Path(graph), BuildOptions(), progress=steps.append)
    except BackendError as error:
        print("refused", error)
    else:
        print("built", len(plan))
print(len(steps), trt.__version__)
"""
ROOT = Path(__file__).resolve().parents[3]


def build(*graphs: Path) -> list[str]:
    finished = subprocess.run(
        [sys.executable, "-c", BUILD, *map(str, graphs)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout.splitlines()


def test_exported_graphs_and_a_plugin_variant(bundle, exported_module, tmp_path, proved):
    variant = tmp_path / "plugins.onnx"
    onnx.save(ask_for_plugins(onnx.load(str(exported_module.bundle.model_path(1)))).model, variant)
    graphs = bundle.model_path(1), bundle.model_path(5), exported_module.bundle.model_path(5)
    *lines, last = build(*graphs, variant)
    assert [line.split()[0] for line in lines] == ["built"] * 4, lines
    assert all(int(line.split()[1]) > 100_000 for line in lines)
    steps, version = last.split()
    assert int(steps) > 0
    proved(f"TensorRT-RTX {version} built {len(graphs)} exported graphs and a plugin variant")


def test_what_is_no_graph_is_refused(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    line, _ = build(path)
    assert line.startswith("refused TensorRT")
    assert "does not take the graph" in line
    assert issubclass(BackendError, Exception)


@pytest.mark.slow
def test_int8_is_taken_with_signed_activations_only(tmp_path):
    """What `build_engines` tells from the manifest."""
    from fdconv_deploy.export import export_checkpoint
    from fdconv_deploy.sample_images import sample_image

    graphs = [
        export_checkpoint(
            ROOT / "examples/assets/streets.pth", tmp_path / activations, size=(96, 128),
            precision="int8", activations=activations, tolerance=0.5,
            calibration=[sample_image(number, (96, 128)) for number in range(2)],
        ).model_path(1)
        for activations in ("signed", "unsigned")
    ]  # fmt: skip
    signed, unsigned, _ = build(*graphs)
    assert signed.startswith("built")
    assert unsigned.startswith("refused TensorRT")


@pytest.mark.slow
def test_the_packaged_network(tmp_path):
    from fdconv_deploy.export import export_checkpoint

    checkpoint = ROOT / "examples/assets/streets.pth"
    exported = export_checkpoint(checkpoint, tmp_path / "bundle", size=(192, 256), batches=(1, 4))
    variant = tmp_path / "plugins.onnx"
    onnx.save(ask_for_plugins(onnx.load(str(exported.model_path(1)))).model, variant)
    *lines, _ = build(exported.model_path(1), exported.model_path(4), variant)
    assert [line.split()[0] for line in lines] == ["built"] * 3, lines
