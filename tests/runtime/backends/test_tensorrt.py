"""The TensorRT backend on a machine played by `fake_tensorrt`."""

from __future__ import annotations

import gc
import hashlib
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fdconv_deploy.errors import BackendError, BundleError
from fdconv_deploy.runtime import open_session
from fdconv_deploy.runtime.backends import BACKENDS, BackendOptions
from fdconv_deploy.runtime.backends.tensorrt import (
    CONTEXTS,
    Cuda,
    TensorRTBackend,
    import_tensorrt,
)
from fdconv_deploy.runtime.backends.tensorrt_engines import (
    EngineRecord,
    Fingerprint,
    Machine,
    engine_name,
    graph_hash,
    keep_engine,
    read_index,
)
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import FileInfo
from tests.runtime import toy
from tests.runtime.fake_tensorrt import FakeCuda, FakeTensorRT

DAMAGED = "", "[]", '{"format_version": 9}', '{"format_version": 1, "x": 1}'


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def machine(cuda, monkeypatch) -> FakeTensorRT:
    """A machine with a GPU, TensorRT and the CUDA bindings, as imports find them."""
    trt = FakeTensorRT(cuda)
    install(monkeypatch, trt, cuda)
    return trt


def install(monkeypatch, trt: ModuleType | None, cuda: ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = cuda
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)


def add_engine(bundle: Bundle, batch: int, of: Machine, **changes) -> EngineRecord:
    """An engine of the bundle's own graph, as `fdconv build` would leave it."""
    from fdconv_deploy.export.tensorrt.builder import BuildOptions, build_plan

    trt = FakeTensorRT(FakeCuda(), of.tensorrt)
    plan = build_plan(trt, bundle.model_path(batch), BuildOptions())
    mark = {"machine": of, "graph": graph_hash(bundle, batch), "plugins": False} | changes
    record = EngineRecord(
        name=engine_name(bundle, batch, of),
        batch=batch,
        precision="fp32",
        file=FileInfo(sha256=hashlib.sha256(plan).hexdigest(), bytes=len(plan)),
        fingerprint=Fingerprint(**mark),
        built_at=datetime.now(timezone.utc),
        build_seconds=1,
    )
    keep_engine(bundle, record, plan, '{"Layers": []}')
    return record


def here(cuda: FakeCuda, trt: FakeTensorRT) -> Machine:
    return TensorRTBackend(BackendOptions(), trt, Cuda(cuda)).machine


@pytest.fixture
def bundle(tmp_path, machine, cuda) -> Bundle:
    opened = toy.make_bundle(tmp_path / "bundle")
    for batch in opened.batch_sizes:
        add_engine(opened, batch, here(cuda, machine))
    return opened


def images(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, 3, 32, 48)).astype(np.float32)


def test_an_engine_with_tf32_serves_who_asks_for_it(tmp_path, machine, cuda, monkeypatch):
    opened = toy.make_bundle(tmp_path / "bundle")
    for batch in opened.batch_sizes:
        add_engine(opened, batch, here(cuda, machine), tf32=True)
    with (
        open_session(opened, "tensorrt") as session,
        pytest.raises(BackendError, match=r"built with --tf32, which is not asked for now"),
    ):
        session.warm_up([1])
    with open_session(opened) as session:
        assert "its TensorRT engines cannot be used" in session.choice
    with open_session(opened, tf32=True) as session:
        assert session.backend == "tensorrt"
    monkeypatch.setenv("FDCONV_TF32", "1")
    with open_session(opened) as session:
        assert session.backend == "tensorrt"


@pytest.mark.parametrize("compatible", [True, False])
def test_tensorrt_lean_runs_engines_built_version_compatible(
    tmp_path, cuda, monkeypatch, compatible
):
    """The wheel tensorrt-lean-cu13-libs has 44 MB; tensorrt's libraries, gigabytes."""
    lean = FakeTensorRT(cuda)
    lean.__name__ = "tensorrt_lean"
    for name in ("Builder", "OnnxParser", "IProgressMonitor", "BuilderFlag"):
        delattr(lean, name)
    install(monkeypatch, None, cuda)
    monkeypatch.setitem(sys.modules, "tensorrt_lean", lean)
    opened = toy.make_bundle(tmp_path / "bundle")
    for batch in opened.batch_sizes:
        add_engine(opened, batch, here(cuda, lean), version_compatible=compatible)
    with open_session(opened) as session:
        if compatible:
            assert session.backend == "tensorrt"
            x = images(1)
            assert np.abs(session.run(x) - toy.reference_logits(x)).max() < 1e-4
        else:
            assert session.backend == "onnxruntime-cpu"
            assert "tensorrt_lean runs no others" in session.choice
    with pytest.raises(BackendError, match="not installed"):
        import_tensorrt()  # what builds


class TestRuns:
    def test_answers_are_the_graphs(self, bundle, cuda):
        with open_session(bundle, "tensorrt") as session:
            for batch in (1, 4, 8):
                x = images(batch, batch)
                error = np.abs(session.run(x) - toy.reference_logits(x)).max()
                assert error < 1e-4
        assert session.backend == "tensorrt"
        assert cuda.launches == 1 + 1 + 2, "each run is one launch of a CUDA graph"

    @pytest.mark.parametrize("capture", [True, False])
    def test_phases_of_a_run(self, bundle, cuda, machine, capture):
        cuda.capture = capture
        backend = TensorRTBackend(BackendOptions(), machine, Cuda(cuda))
        graph = backend.load(bundle, 1)
        name = bundle.manifest.inputs[1][0].name
        before = cuda.launches
        for _ in range(2):
            found = graph.phases({name: images(1)})
            assert (found.h2d, found.compute, found.d2h) == (0.001, 0.005, 0.002)
            assert found.no_copies > 0
        assert cuda.launches - before == (4 if capture else 0), "the engine alone is a graph too"
        assert ("one CUDA graph" if capture else "no CUDA graph") in graph.manner
        assert "TF32 off" in graph.manner
        del graph
        gc.collect()
        assert cuda.events == {}

    def test_auto_takes_the_engines_and_says_so(self, bundle):
        with open_session(bundle) as session:
            assert session.backend == "tensorrt"
            assert "has engines for this machine" in session.choice

    def test_answers_are_the_callers_own(self, bundle):
        with open_session(bundle, "tensorrt") as session:
            first = session.run(images(1, 1))
            kept = first.copy()
            session.run(images(1, 2))
            assert np.array_equal(first, kept)

    def test_memory_is_given_back(self, bundle, cuda):
        with open_session(bundle, "tensorrt") as session:
            session.warm_up()
            assert cuda.buffers
        gc.collect()
        assert not cuda.buffers
        assert not cuda.streams
        assert not cuda.graphs

    def test_an_engine_that_cannot_be_captured_runs_all_the_same(self, bundle, cuda):
        cuda.capture = False
        x = images(1)
        with open_session(bundle, "tensorrt") as session:
            assert np.abs(session.run(x) - toy.reference_logits(x)).max() < 1e-4
        assert cuda.launches == 0

    def test_many_threads_share_a_few_contexts(self, bundle, machine):
        errors: list[float] = []
        with open_session(bundle, "tensorrt") as session:
            session.warm_up([1])

            def ask(seed: int) -> None:
                for step in range(5):
                    x = images(1, 10 * seed + step)
                    errors.append(float(np.abs(session.run(x) - toy.reference_logits(x)).max()))

            threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(errors) == 30
        assert max(errors) < 1e-4
        assert machine.contexts <= CONTEXTS

    def test_wrong_inputs(self, bundle, machine, cuda):
        graph = TensorRTBackend(BackendOptions(), machine, Cuda(cuda)).load(bundle, 1)
        with pytest.raises(BackendError, match="does not take these inputs: images must be"):
            graph.run({"images": np.zeros((2, 3, 32, 48), np.float32)})


class TestOtherEngines:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"gpu": "NVIDIA L4", "capability": 89}, "another GPU, NVIDIA L4, and NVIDIA H200 is"),
            ({"tensorrt": "10.16.1.11"}, "TensorRT 10.16.1.11, and 11.4.0.106 is here"),
            ({"driver": "500.1"}, "driver 500.1"),
        ],
    )
    def test_of_another_machine(self, tmp_path, machine, cuda, changes, said):
        bundle = toy.make_bundle(tmp_path / "b", batches=(1,))
        add_engine(bundle, 1, here(cuda, machine).model_copy(update=changes))
        with pytest.raises(BackendError, match="fdconv build") as caught:
            open_session(bundle, "tensorrt").warm_up()
        assert said in str(caught.value)
        assert "onnxruntime-cpu" in str(caught.value)
        with open_session(bundle) as session:  # auto takes another backend and says why
            assert session.backend == "onnxruntime-cpu"
            assert said in session.choice

    @pytest.mark.parametrize(
        ("hardware", "fits", "not_"),
        [
            ("same_compute_capability", {"gpu": "NVIDIA H100"}, {"capability": 100}),
            ("ampere_plus", {"gpu": "NVIDIA L4", "capability": 89}, {"capability": 75}),
        ],
    )
    def test_levels_of_compatibility(self, hardware, fits, not_):
        mine = Machine(gpu="NVIDIA H200", capability=90, driver="580.1", tensorrt="11.4.0")
        mark = Fingerprint(machine=mine, graph="0" * 64, plugins=True, hardware=hardware)
        assert mark.problem(mine.model_copy(update=fits), "0" * 64) is None
        assert mark.problem(mine.model_copy(update=fits | not_), "0" * 64) is not None
        assert "another graph" in str(mark.problem(mine, "1" * 64))

    @pytest.mark.parametrize(
        ("version", "fits"), [("11.6.1", True), ("11.3.0", False), ("12.0.0", False)]
    )
    def test_later_versions_where_built_for_them(self, version, fits):
        mine = Machine(gpu="NVIDIA H200", capability=90, driver="580.1", tensorrt="11.4.0")
        mark = Fingerprint(machine=mine, graph="0" * 64, plugins=True, version_compatible=True)
        later = mine.model_copy(update={"tensorrt": version})
        assert (mark.problem(later, "0" * 64) is None) == fits

    def test_of_another_graph(self, tmp_path, machine, cuda):
        add_engine(toy.make_bundle(tmp_path / "b", batches=(1,)), 1, here(cuda, machine))
        kept = tmp_path / "engines"
        (tmp_path / "b" / "engines").rename(kept)
        other = toy.make_bundle(tmp_path / "b", batches=(1,), seed=9, overwrite=True)
        kept.rename(tmp_path / "b" / "engines")
        with pytest.raises(BackendError, match="another graph than this bundle holds now"):
            open_session(other, "tensorrt").warm_up()

    def test_none_yet(self, tmp_path, machine):
        bundle = toy.make_bundle(tmp_path / "b", batches=(1,))
        with pytest.raises(BackendError, match=r"none was built yet.*fdconv build"):
            open_session(bundle, "tensorrt").warm_up()


class TestDamage:
    def test_changed_bytes_are_not_loaded(self, bundle):
        (plan,) = (bundle.path / "engines").glob("*-b1.plan")
        data = bytearray(plan.read_bytes())
        data[-1] ^= 1
        plan.write_bytes(data)
        with pytest.raises(BundleError, match=r"sha256 differs.*an engine is code.*fdconv build"):
            open_session(bundle, "tensorrt").warm_up([1])

    def test_an_engine_elsewhere_is_not_loaded(self, bundle, tmp_path):
        (plan,) = (bundle.path / "engines").glob("*-b1.plan")
        plan.rename(tmp_path / "elsewhere")
        plan.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(BundleError, match="leads outside"):
            open_session(bundle, "tensorrt").warm_up([1])

    @pytest.mark.parametrize(
        "text", ["", "[]", '{"format_version": 9}', '{"format_version": 1, "x": 1}']
    )
    def test_a_damaged_index(self, bundle, text):
        (bundle.path / "engines/index.json").write_text(text)
        with pytest.raises(BundleError, match="fdconv build"):
            read_index(bundle)

    def test_a_bundle_with_engines_is_still_whole(self, bundle):
        Bundle.open(bundle.path)


class TestMachinesWithout:
    def test_tensorrt(self, toy_bundle, monkeypatch, cuda):
        install(monkeypatch, None, cuda)
        with pytest.raises(BackendError, match=r"TensorRT is not installed.*onnxruntime-cpu"):
            open_session(toy_bundle, "tensorrt")

    def test_a_recent_tensorrt(self, toy_bundle, monkeypatch, cuda):
        install(monkeypatch, FakeTensorRT(cuda, "8.6.1"), cuda)
        with pytest.raises(BackendError, match=r"8\.6\.1 is installed, and 11 is needed"):
            open_session(toy_bundle, "tensorrt")

    def test_a_gpu(self, toy_bundle, monkeypatch):
        none = FakeCuda(devices=0)
        install(monkeypatch, FakeTensorRT(none), none)
        with pytest.raises(BackendError, match=r"sees none \(cudaErrorNoDevice\).*nvidia-smi"):
            open_session(toy_bundle, "tensorrt")

    def test_cuda_bindings(self, toy_bundle, monkeypatch, cuda):
        install(monkeypatch, FakeTensorRT(cuda), None)
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(BackendError, match=r"cuda-bindings, which is not installed"):
            open_session(toy_bundle, "tensorrt")

    def test_memory(self, bundle, cuda):
        cuda.memory = 100
        with pytest.raises(BackendError, match=r"no memory left.*another backend") as caught:
            open_session(bundle, "tensorrt").warm_up([1])
        assert "\n" not in str(caught.value)
        assert not cuda.buffers, "what was taken before is given back"

    def test_stays_importable(self):
        assert "tensorrt" in BACKENDS
        with pytest.raises(BackendError, match="not installed"):
            import_tensorrt()


def test_the_drivers_version(tmp_path, cuda):
    assert Cuda(cuda).driver(tmp_path) == "CUDA 13.0"
    folder = tmp_path / "proc/driver/nvidia"
    folder.mkdir(parents=True)
    (folder / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
    )
    assert Cuda(cuda).driver(Path(tmp_path)) == "580.95.05"
