"""`fdconv build` on a machine with a GPU and TensorRT, played by `fake_tensorrt`."""

from __future__ import annotations

import json
import shutil
import sys
from types import ModuleType

import numpy as np
import pytest
from typer.testing import CliRunner

from fdconv_deploy.cli.app import app
from fdconv_deploy.errors import BackendError, ExportError, FDConvError
from fdconv_deploy.export.tensorrt.builder import BuildOptions
from fdconv_deploy.export.tensorrt.engine import build_engines
from fdconv_deploy.ops import tensorrt_plugins as plugins
from fdconv_deploy.runtime import open_session
from fdconv_deploy.runtime.backends.tensorrt import Cuda
from fdconv_deploy.runtime.backends.tensorrt_engines import read_index
from fdconv_deploy.runtime.bundle import Bundle
from tests.runtime import toy
from tests.runtime.fake_tensorrt import FakeCuda, FakeTensorRT


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def trt(cuda, monkeypatch) -> FakeTensorRT:
    made = FakeTensorRT(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = cuda
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    return made


@pytest.fixture
def small(tmp_path) -> Bundle:
    return toy.make_bundle(tmp_path / "bundle")


def files(bundle: Bundle) -> list[str]:
    return sorted(p.name for p in (bundle.path / "engines").iterdir())


class TestBuilding:
    def test_one_engine_per_batch_size(self, small, trt):
        steps: list[str] = []
        built = build_engines(small, progress=steps.append)
        assert [b.record.batch for b in built] == [1, 4]
        assert all(b.new for b in built)
        stem = "nvidia-h200-trt11.4.0.106-fp32"
        ends = ["-b1.layers.json", "-b1.plan", "-b4.layers.json", "-b4.plan", ".timing"]
        assert files(small) == sorted(["index.json", *(stem + end for end in ends)])
        assert any("step 20 of 40" in step for step in steps)
        assert any("TensorRT's own operators, since" in step for step in steps)
        Bundle.open(small.path)
        for record in read_index(small).engines:
            assert record.fingerprint.machine.gpu == "NVIDIA H200"
            assert record.fingerprint.machine.driver
            assert max(o.max_rel for o in record.parity) < 1e-5
            layers = small.path / "engines" / f"{record.name}.layers.json"
            assert json.loads(layers.read_text())["Layers"]
        x = np.random.default_rng(0).normal(size=(4, 3, 32, 48)).astype(np.float32)
        with open_session(small) as session:
            assert session.backend == "tensorrt"
            assert np.abs(session.run(x) - toy.reference_logits(x)).max() < 1e-4

    def test_what_fits_is_not_built_again(self, small, trt):
        build_engines(small)
        assert not any(b.new for b in build_engines(small))
        assert len(trt.built) == 2
        assert all(b.new for b in build_engines(small, force=True))
        assert not trt.caches[0]
        assert trt.caches[-1].startswith(b"timing"), "what was measured is used again"

    @pytest.mark.parametrize("change", ["gpu", "tensorrt", "graph", "options"])
    def test_what_does_not_fit_is_built_again(self, small, trt, cuda, change):
        build_engines(small, batches=[1])
        options = BuildOptions()
        if change == "gpu":
            cuda.gpu, cuda.capability = "NVIDIA L4", (8, 9)
        elif change == "tensorrt":
            trt.__version__ = "11.5.0"
        elif change == "graph":
            kept = small.path.with_name("kept")
            (small.path / "engines").rename(kept)
            small = toy.make_bundle(small.path, seed=3, overwrite=True)
            kept.rename(small.path / "engines")
        else:
            options = BuildOptions(tf32=True)
        (again,) = build_engines(small, batches=[1], options=options)
        assert again.new
        words = {
            "gpu": "another GPU", "tensorrt": "TensorRT 11.4", "graph": "another graph",
            "options": "other options",
        }  # fmt: skip
        assert words[change] in again.reason
        with open_session(small, tf32=options.tf32) as session:
            assert session.backend == "onnxruntime-cpu", "batch 4 has no engine"
            assert "batch 4" in session.choice
        with open_session(small, "tensorrt", tf32=options.tf32) as session:
            session.run_raw({"images": np.zeros((1, 3, 32, 48), np.float32)})

    @pytest.mark.parametrize("activations", ["unsigned", "signed"])
    def test_int8_is_refused_before_tensorrt_is_asked_where_it_is_unsigned(
        self, small, trt, activations
    ):
        path = small.path / "manifest.json"
        int8 = {"precision": "int8", "graph": {"precision": {"activations": activations}}}
        path.write_text(json.dumps(json.loads(path.read_text()) | int8))
        bundle = Bundle.open(small.path)
        if activations == "signed":
            assert build_engines(bundle, batches=[1])[0].new
            return
        with pytest.raises(BackendError, match=r"--precision int8 --activations signed"):
            build_engines(bundle, batches=[1])
        assert not trt.built
        assert not (small.path / "engines").exists()

    def test_engines_of_several_gpus_lie_side_by_side(self, small, trt, cuda):
        build_engines(small, batches=[1])
        cuda.gpu, cuda.capability = "NVIDIA L4", (8, 9)
        build_engines(small, batches=[1])
        assert len(read_index(small).engines) == 2
        cuda.gpu, cuda.capability = "NVIDIA H200", (9, 0)
        assert not build_engines(small, batches=[1])[0].new

    def test_options_reach_tensorrt(self, small, trt):
        build_engines(small, batches=[1])
        assert trt.flags == set(), "float32 stays float32"
        options = BuildOptions("ampere_plus", True, tf32=True, workspace_mb=64, effort=2)
        (built,) = build_engines(small, batches=[1], options=options)
        assert trt.flags == {"TF32", "VERSION_COMPATIBLE"}
        assert trt.config.workspace == 64 << 20
        assert trt.config.builder_optimization_level == 2
        assert trt.config.hardware_compatibility_level.name == "AMPERE_PLUS"
        assert built.record.fingerprint.hardware == "ampere_plus"


class TestPlugins:
    """The plugin layer only takes note; `tests/ops/test_tensorrt_plugins.py` has NVIDIA's own."""

    @pytest.fixture
    def layer(self, trt, monkeypatch) -> dict[str, list[str]]:
        noted: dict[str, list[str]] = {"register": [], "autotune": [], "aot_impl": []}
        module = ModuleType("fake_tensorrt.plugin")
        for kind, names in noted.items():

            def decorator(identity: str, names: list[str] = names):
                names.append(identity)
                return lambda function: function

            setattr(module, kind, decorator)
        for name in ("TensorDesc", "AutoTuneCombination", "KernelLaunchParams", "SymExprs"):
            setattr(module, name, type(name, (), {}))
        monkeypatch.setitem(sys.modules, "fake_tensorrt.plugin", module)
        monkeypatch.setattr(plugins, "_registered", set())
        return noted

    @pytest.fixture
    def compiled(self, monkeypatch) -> list[tuple[int, int]]:
        asked: list[tuple[int, int]] = []

        def precompile(launches, capability, done, ptx_version):
            asked.append((len(list(launches)), capability))
            done(1, 2)

        monkeypatch.setattr("fdconv_deploy.export.tensorrt.engine.precompile", precompile)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        return asked

    def test_layers_run_in_plugins(self, bundle, tmp_path, trt, layer, compiled):
        copy = shutil.copytree(bundle.path, tmp_path / "bundle")
        opened = Bundle.open(copy)
        steps: list[str] = []
        built = build_engines(opened, batches=[1, 2], progress=steps.append)
        assert all(b.record.fingerprint.plugins for b in built)
        assert [p.endswith("plugins.onnx") for p in trt.built] == [True, True]
        counts = built[0].record.kernels
        assert {name.partition("_")[0] for name in counts} == {
            "FrequencyAssemblyRows", "FrequencyAssemblyColumns", "FrequencyBandCombination"
        }  # fmt: skip
        assert layer["register"] == layer["autotune"] == layer["aot_impl"]
        assert sorted(layer["register"]) == sorted({f"fdconv::{name}" for name in counts})
        assert compiled == [(sum(counts.values()), 90)] * 2
        assert any("compiling kernels: 1 of 2" in step for step in steps)
        assert max(o.max_rel for o in built[0].record.parity) < 1e-4
        # Saying off is another engine.
        (plain,) = build_engines(opened, batches=[1], plugins="off")
        assert plain.new
        assert not plain.record.kernels

    def test_for_later_gpus_code_is_for_the_oldest(self, bundle, tmp_path, trt, layer, compiled):
        opened = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
        build_engines(opened, batches=[1], options=BuildOptions("ampere_plus"))
        assert compiled[0][1] == 80

    def test_a_gpu_that_tritons_compiler_does_not_know(
        self, bundle, tmp_path, trt, cuda, layer, compiled
    ):
        cuda.gpu, cuda.capability = "NVIDIA Thor", (11, 0)
        opened = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
        steps: list[str] = []
        build_engines(opened, batches=[1], progress=steps.append)
        assert compiled[0][1] == 80
        assert any("does not know sm_110 (NVIDIA Thor)" in step for step in steps)

    def test_without_triton(self, small, trt, layer, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        steps: list[str] = []
        (built,) = build_engines(small, batches=[1], progress=steps.append)
        assert not built.record.fingerprint.plugins
        assert any("since Triton is not installed" in step for step in steps)

    def test_an_older_bundle_runs_in_tensorrts_own_operators(self, small, trt, layer, compiled):
        path = small.path / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
        older = Bundle.open(small.path)
        steps: list[str] = []
        (built,) = build_engines(older, batches=[1], progress=steps.append)
        assert not built.record.fingerprint.plugins
        assert any("since this bundle is of format 2" in step for step in steps)
        with pytest.raises(BackendError, match=r"format 2.*export it again"):
            build_engines(older, batches=[1], plugins="on")


class TestRefusals:
    def test_an_engine_that_differs_is_not_kept(self, small, trt):
        trt.noise = 0.01
        with pytest.raises(ExportError, match=r"differs from ONNX Runtime by .* It was not kept"):
            build_engines(small)
        assert not any(name.endswith(".plan") for name in files(small))
        assert not read_index(small).engines
        build_engines(small, tolerance=0.1)

    def test_no_answer_at_all(self, small, trt):
        trt.noise = float("nan")
        with pytest.raises(ExportError, match="not finite"):
            build_engines(small)

    def test_out_of_memory(self, small, trt):
        trt.error = "[defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)"
        options = BuildOptions(workspace_mb=512)
        with pytest.raises(BackendError, match=r"memory ran out.*512 MB.*--workspace") as caught:
            build_engines(small, options=options)
        assert "onnxruntime-cpu" in str(caught.value)

    def test_not_built(self, small, trt):
        trt.error = "no implementation for node"
        with pytest.raises(BackendError, match="could not build the engine: no implementation"):
            build_engines(small)

    def test_not_parsed(self, small, trt):
        trt.parse_error = "unsupported operator Foo"
        with pytest.raises(BackendError, match=r"unsupported operator Foo \(node conv1\)"):
            build_engines(small)

    def test_old_gpu(self, small, trt, cuda):
        cuda.gpu, cuda.capability = "Tesla V100", (7, 0)
        with pytest.raises(BackendError, match=r"Tesla V100 is of compute capability 7\.0.*7\.5"):
            build_engines(small)

    def test_batch_size_that_is_not_there(self, small, trt):
        with pytest.raises(ExportError, match=r"graphs of batch 1, 4, not of 3.*--batch 3"):
            build_engines(small, batches=[3])

    def test_plugins_that_cannot_be_had(self, small, trt):
        with pytest.raises(BackendError, match="plugins cannot be built"):
            build_engines(small, plugins="on")

    def test_a_damaged_timing_cache_is_begun_anew(self, small, trt):
        build_engines(small, batches=[1])
        (cache,) = (small.path / "engines").glob("*.timing")
        cache.write_bytes(b"nonsense")
        build_engines(small, batches=[1], force=True)
        assert cache.read_bytes().startswith(b"timing")


class TestCommand:
    def run(self, *arguments: str):
        return CliRunner().invoke(app, ["build", *arguments])

    def test_json(self, small, trt):
        result = self.run(str(small.path), "--json")
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert [(b["batch"], b["new"]) for b in told] == [(1, True), (4, True)]

    def test_table(self, small, trt):
        result = self.run(str(small.path), "--batch", "1")
        assert result.exit_code == 0
        assert "built" in result.stdout

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--plugins", "maybe"], "'maybe' is not one of 'auto', 'on', 'off'"),
            (["--hardware", "all"], "'all' is not one of 'none', 'same', 'ampere-plus'"),
            (["--workspace", "0"], "greater than or equal to 1"),
        ],
    )
    def test_unknown_choices(self, small, trt, arguments, said):
        result = self.run(str(small.path), *arguments)
        assert result.exit_code == 2
        assert said in " ".join(result.output.replace("│", " ").split())

    def test_negative_tolerance(self, small, trt):
        result = self.run(str(small.path), "--tolerance", "-1")
        assert isinstance(result.exception, FDConvError)
        assert "--tolerance is a share" in str(result.exception)

    def test_without_tensorrt(self, small, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        result = self.run(str(small.path))
        assert isinstance(result.exception, BackendError)
        assert "TensorRT is not installed" in str(result.exception)
        assert "onnxruntime-cpu" in str(result.exception)

    def test_without_a_gpu(self, small, trt, cuda):
        cuda.devices = 0
        result = self.run(str(small.path))
        assert "sees none" in str(result.exception)
        assert Cuda(FakeCuda()).device() == ("NVIDIA H200", 90)
