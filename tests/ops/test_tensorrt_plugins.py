"""TensorRT's plugin layer, as NVIDIA ships it, takes every plugin of every layer of a ResNet-50."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.shapes import RESNET50, layer_sizes
from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops import tensorrt_plugins as plugins
from fdconv_deploy.ops.frequency_assembly.launch import (
    AssemblySizes,
    column_transform,
    half_shape,
    root_table,
    transform_of,
)

BINDINGS = "tensorrt_bindings"
LIBRARIES = "nvinfer", "nvinfer_plugin", "nvonnxparser"
FLOAT, HALF, INT = 1, 10, 6
ROOT = Path(__file__).resolve().parents[2]


def node(op: str, sizes: list[int], shapes: list[tuple[int, ...]], kinds: list[int]) -> dict:
    return {"op": op, "sizes": sizes, "shapes": shapes, "kinds": kinds}


def assembly_nodes(sizes: AssemblySizes, batch: int, half: bool) -> list[dict]:
    numbers = [*sizes.numbers(), batch]
    gates = batch, sizes.heads
    tiles = sizes.tiles, sizes.planes, 2, sizes.rows, sizes.width
    packed = (sizes.tiles * sizes.planes * sizes.rows * sizes.width + 3) // 4
    rows = root_table(sizes.rows, transform_of(sizes.rows)).shape
    columns = root_table(sizes.columns, column_transform(sizes.columns, sizes.kernel_size[1])).shape
    local = sizes.rows, sizes.kernel_size[1] * sizes.taps
    name = f"FrequencyAssemblyColumns_Local{sizes.taps}_Filter" + ("_Half" if half else "")
    return [
        node(
            "FrequencyAssemblyRows", numbers, [gates, tiles, (packed,), rows],
            [FLOAT, FLOAT, INT, FLOAT],
        ),
        node(
            name, numbers,
            [(batch, *half_shape(sizes)), gates, columns, (batch, sizes.in_channels), local, gates],
            [FLOAT] * 6,
        ),
    ]  # fmt: skip


def band_nodes(channels: int, size: int, batch: int, half: bool) -> list[dict]:
    kind = HALF if half else FLOAT
    x, logits = (batch, channels, size, size), (batch, 3, size, size)
    name = "FrequencyBandCombination" + ("_Half" if half else "")
    sizes = [channels, size, size, 1, 3, 4, batch]
    return [node(name, sizes, [x, logits, (4, 3), (4,), (3, *x)], [kind, kind, FLOAT, FLOAT, kind])]


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of libraries that NVIDIA's bindings can be imported on."""
    if importlib.util.find_spec(BINDINGS) is None:
        pytest.skip(
            "TensorRT's bindings are not installed (pip install --no-deps tensorrt-cu13-bindings)"
        )
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc) to make the stub of libnvinfer with")
    folder = tmp_path_factory.mktemp("nvinfer")
    source = Path(__file__).with_name("tensorrt_stub.c")
    major = importlib.metadata.version("tensorrt-cu13-bindings").partition(".")[0]
    for library in LIBRARIES:
        target = folder / f"lib{library}.so.{major}"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", target, source], check=True)
    return folder


def through_bindings(stub: Path, requests: list[dict], real: int = 0, cache: str = "") -> Any:
    path = stub / "requests.json"
    path.write_text(json.dumps(requests))
    command = [sys.executable, "-m", "tests.ops.tensorrt_stub", str(path), "--real", str(real)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stub)}
    environment.pop("TRITON_INTERPRET", None)
    if cache:
        environment.setdefault("TRITON_CACHE_DIR", cache)
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def check(found: dict, request: dict) -> None:
    launch = plugins.launch_of(request["op"], request["sizes"])
    grid = launch.grid(request["sizes"][-1])
    assert [found["launch"][f"grid_{axis}"] for axis in "xyz"] == list(grid)
    assert found["launch"]["block_x"] >= launch.threads
    assert (found["launch"]["block_y"], found["launch"]["block_z"]) == (1, 1)
    # What a kernel gets without opting in to more, which a plugin cannot.
    assert found["launch"]["shared_mem"] <= 48 * 1024
    assert found["formats"], "types of inputs and outputs"
    assert found["kernel"] == launch.kernel
    half = request["op"].endswith("_Half")
    assert found["type"] == ("DataType.HALF" if half else "DataType.FLOAT")


def test_every_layer_of_a_resnet50(stub, proved):
    requests = []
    for shape in RESNET50:
        sizes = layer_sizes(shape.out_channels, shape.in_channels, shape.kernel)
        for batch, half in ((1, False), (4, True)):
            requests += assembly_nodes(sizes, batch, half)
            if shape.kernel == 3:
                requests += band_nodes(shape.in_channels, shape.feature, batch, half)
    answer = through_bindings(stub, requests)
    assert sorted(answer["registered"]) == sorted({r["op"] for r in requests})
    assert answer["again"] == answer["registered"], "a second build registers nothing twice"
    for found, request in zip(answer["nodes"], requests, strict=True):
        check(found, request)
    for found, request in zip(answer["nodes"], requests, strict=True):
        if request["op"].startswith("FrequencyAssemblyRows"):
            sizes = AssemblySizes.of(request["sizes"][:-1])
            assert tuple(found["shape"]) == (request["sizes"][-1], *half_shape(sizes))
        elif request["op"].startswith("FrequencyAssemblyColumns"):
            sizes = AssemblySizes.of(request["sizes"][:-1])
            expected = request["sizes"][-1] * sizes.out_channels, sizes.in_channels
            assert tuple(found["shape"]) == (*expected, *sizes.kernel_size)
        else:
            assert tuple(found["shape"]) == tuple(request["shapes"][0])
    counts = Counter(found["kernel"] for found in answer["nodes"])
    threes = sum(shape.kernel == 3 for shape in RESNET50)
    layers = 2 * len(RESNET50)
    assert counts == {
        "row_kernel": layers, "column_kernel": layers, "combination_kernel": 2 * threes
    }  # fmt: skip
    proved(
        f"TensorRT {answer['version']} bindings: {len(answer['registered'])} plugins "
        f"registered, launch parameters of {len(requests)} nodes evaluated "
        f"({', '.join(f'{n} {k}' for k, n in sorted(counts.items()))}), "
        f"{len(RESNET50)} layer shapes"
    )


@pytest.mark.parametrize(
    ("channels", "half", "layout"),
    [(64, False, "HWC"), (64, True, "HWC8"), (40, True, "HWC8"), (36, False, "HWC")],
)
def test_a_convolution_gets_its_kernels_with_channels_last(stub, channels, half, layout):
    """So TensorRT need not copy what it convolves with channels last."""
    for node in assembly_nodes(layer_sizes(64, channels, 3), 2, half)[1:]:
        linear, last = through_bindings(stub, [node, node | {"last": True}])["nodes"]
        names = [[f"TensorFormat.{name}" for name in ("LINEAR",) * 6 + (f,)] for f in
                 ("LINEAR", layout)]  # fmt: skip
        assert linear["layouts"] == last["layouts"] == names
        assert not linear["last"]
        assert last["last"]
        assert last["launch"]["grid_x"] == 2


def test_half_kernels_of_a_broken_number_of_channels_stay_linear(stub):
    """HWC8 would have to be filled up to eight channels."""
    (_, node) = assembly_nodes(layer_sizes(64, 36, 1), 1, half=True)
    (found,) = through_bindings(stub, [node])["nodes"]
    assert found["layouts"] == [["TensorFormat.LINEAR"] * 7]


def test_real_code_reaches_tensorrt(stub, request):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed, and compiles the kernels (pip install triton)")
    sizes = layer_sizes(64, 64, 1)
    requests = assembly_nodes(sizes, 2, True) + band_nodes(64, 16, 2, True)
    cache = str(request.config.cache.mkdir("triton"))
    answer = through_bindings(stub, requests, real=len(requests), cache=cache)
    assert answer["compiled"] == {"real": 3, "stood in for": 0}
    for found, asked in zip(answer["nodes"], requests, strict=True):
        check(found, asked)
        assert found["ptx"] > 4000
        assert ".target sm_90" in found["head"]
        # Inputs, then the output, nothing else: TensorRT passes no more.
        assert found["parameters"] == len(asked["shapes"]) + 1


KERNEL_CASES = [
    "pointwise, more out, batch 3", "3x3", "3x3|half", "planes", "second slots",
    "more than 256 attentions", "odd channels out", "odd channels in",
    "GroupNorm", "dense both", "normed",
    "complex rows, batch 2", "softmax over groups", "symmetric rows, last, batch 2|half",
]  # fmt: skip


def test_kernels_compute_what_the_functions_do():
    """From a plugin node's own inputs, in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed, and interprets the kernels (pip install triton)")
    command = [sys.executable, "-m", "tests.ops.plugin_kernels", *KERNEL_CASES]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert list(found) == KERNEL_CASES
    kinds = set()
    for name, errors in found.items():
        assert len(errors) == 3 if "rows" in name or "softmax over" in name else 2
        for op, error in errors.items():
            kinds.add(op.partition("_")[0])
            # Rounded to float16, neighbours may fall to two sides.
            assert error < (1e-3 if op.endswith("_Half") else 3e-6), (name, op, error)
    assert len(kinds) == 3


def test_an_older_tensorrt_is_told_apart(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # of Triton
    monkeypatch.setitem(sys.modules, "old_tensorrt.plugin", ModuleType("old_tensorrt.plugin"))
    old = SimpleNamespace(__name__="old_tensorrt", __version__="10.8.0.43")
    trtp, problem = plugins.plugin_module(old)
    assert trtp is None
    assert re.search(r"10\.8.*10\.9.*update TensorRT", problem)


def test_code_needs_a_target(monkeypatch):
    monkeypatch.setattr(plugins, "_capability", None)
    launch = plugins.launch_of("FrequencyBandCombination", [8, 4, 4, 1, 3, 4, 1])
    with pytest.raises(BackendError, match="set_target"):
        plugins.kernel_ptx(launch)
