"""What a report says of a GPU: phases, clocks, throttling, TF32 and streams, trtexec's command.

The GPU is made up (`gpu_target`), and so is NVIDIA's management library (`nvml`): none is here.
"""

from __future__ import annotations

import io
import os
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fdconv_deploy.cli.bench import show
from fdconv_deploy.latency.html import page
from fdconv_deploy.latency.measure import Schedule, measure
from fdconv_deploy.latency.networks import (
    RunOptions,
    Target,
    expand_targets,
    open_target,
    torch_phases,
)
from fdconv_deploy.latency.report import Report, Span, csv, markdown
from tests.latency.nvml import Nvml
from tests.runtime import toy
from tests.runtime.backends.test_tensorrt import add_engine, here, install
from tests.runtime.fake_onnxruntime_gpu import FakeOnnxRuntimeGpu
from tests.runtime.fake_tensorrt import FakeCuda, FakeTensorRT

PYNVML = """
import sys
from tests.latency.nvml import Nvml
sys.modules[__name__] = Nvml()
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of two GPUs, the second one visible: here, and in the workers' processes."""
    (tmp_path / "pynvml.py").write_text(PYNVML)
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(tmp_path), str(root), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")

    def install(*clocks: int) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", Nvml(clocks=clocks))

    return install


def report() -> Report:
    options = RunOptions(threads=1)
    target = Target(kind="call", source="tests.latency.gpu_target:opened", options=options)
    return measure([target], Schedule(seconds=0.5, warm_up=0.0, turn=0.1))


def texts(found: Report) -> list[str]:
    shown = io.StringIO()
    show(found, Console(file=shown, width=240, force_terminal=True, color_system=None))
    return [shown.getvalue(), markdown(found), page(found)]


def test_phases_clocks_and_what_is_inside_a_latency(machine):
    machine(1980)
    found = report()
    (row,) = found.rows
    assert row.phases_ms == {"h2d": 1.0, "compute": 5.0, "d2h": 2.0, "no_copies": 5.5}
    state = row.gpu
    assert state is not None
    assert state.readings > 3
    assert state.sm_mhz == Span(min=1980, median=1980, max=1980)
    assert state.watts == Span(min=650, median=650, max=650)
    assert state.celsius == Span(min=61, median=61, max=61)
    assert state.throttled == {"power cap": 1.0}
    command = (
        "trtexec --loadEngine='/bundle/engines/an engine.plan' --useCudaGraph --exposeDMA "
        "--infStreams=1 --warmUp=500 --duration=10"
    )
    for text in texts(found):
        assert "from inputs in host memory to outputs in host memory" in text
        assert "H2D, compute, D2H: the GPU" in text
        for figure in ("1.000", "5.000", "2.000", "5.500", "1980", "650", "61"):
            assert figure in text
        flat = " ".join(text.split()).replace("&#x27;", "'")
        assert "throttled (power cap 100% of the time)" in flat
        assert "TF32 off; one CUDA graph a run" in flat
        assert command in flat
        assert "clock moved" not in text
    assert "phases_ms.compute" in csv(found).splitlines()[0]


def test_a_clock_that_moved_is_marked(machine):
    machine(1980, 1900)
    found = report()
    for text in texts(found):
        assert "the GPU's clock moved by 4%" in text.replace("&#x27;", "'")
        assert "1900–1980" in text
        assert "nvidia-smi --lock-gpu-clocks" in text
    assert " ! |" in markdown(found) or "! |" in markdown(found)


def test_a_clock_that_hardly_moved_is_not(machine):
    machine(1980, 1950)
    assert "clock moved" not in markdown(report())


def test_the_plain_networks_engine_beside_fdconvs(machine):
    machine(1980)
    options = RunOptions(threads=1)
    targets = [
        Target(kind="call", source=f"tests.latency.gpu_target:{name}", options=options)
        for name in ("plain", "opened")
    ]
    found = measure(targets, Schedule(seconds=0.5, warm_up=0.0, turn=0.1))
    plain, fdconv = found.rows
    assert plain.over_first is None
    assert fdconv.over_first is not None
    for text in texts(found):
        flat = " ".join(text.split()).replace("&#x27;", "'")
        for engine in ("plain", "an"):
            assert f"trtexec --loadEngine='/bundle/engines/{engine} engine.plan'" in flat


def only(bundle: Path, backend: str) -> Target:
    options = RunOptions(threads=1)
    (target,), _ = expand_targets([bundle], options, backends=[backend], batches=[1])
    return target


def test_a_bundle_in_the_cuda_provider(toy_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", FakeOnnxRuntimeGpu())
    work = open_target(only(toy_bundle, "onnxruntime-cuda"))
    assert work.run().keys() == {"logits"}
    assert work.phases is not None
    assert min(astuple(work.phases())) > 0
    assert work.opened.manner == (
        "portable operators, without TF32, in one CUDA graph, on one stream; waited for after "
        "every run; copies from and to pageable memory, which wait"
    )
    work.close()


def test_a_bundle_in_tensorrt(tmp_path, monkeypatch):
    cuda = FakeCuda()
    trt = FakeTensorRT(cuda)
    install(monkeypatch, trt, cuda)
    bundle = toy.make_bundle(tmp_path / "bundle")
    record = add_engine(bundle, 1, here(cuda, trt))
    work = open_target(only(bundle.path, "tensorrt"))
    assert work.phases is not None
    assert astuple(work.phases())[:3] == (0.001, 0.005, 0.002)
    assert work.opened.engine == str(bundle.path / "engines" / record.name)
    assert "TF32 off; one CUDA graph a run" in work.opened.manner
    work.close()


class Cuda:
    """The module ``torch.cuda`` on a clock of its own: every wait for it takes a second more."""

    def __init__(self) -> None:
        self.now = 0.0

    def Event(self, enable_timing: bool) -> CudaEvent:
        assert enable_timing
        return CudaEvent(self)

    def current_device(self) -> str:
        return "cpu"

    def synchronize(self) -> None:
        self.now += 1


class CudaEvent:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.at = self.cuda.now

    def elapsed_time(self, end: CudaEvent) -> float:
        return 1e3 * (end.at - self.at)


def test_phases_of_a_network_in_pytorch():
    cuda, runs = Cuda(), []

    def network(x: torch.Tensor) -> torch.Tensor:
        runs.append(x)
        cuda.now += 5
        return x

    def on_host(answer: torch.Tensor) -> torch.Tensor:
        cuda.now += 2
        return answer

    found = torch_phases(network, (torch.zeros(2),), on_host, cuda)
    assert (found.h2d, found.compute, found.d2h) == (0, 5, 2)
    assert len(runs) == 2  # the second one without copies
    assert found.no_copies > 0
