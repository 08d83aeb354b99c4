"""The CUDA provider's backend, on a machine played by `fake_onnxruntime_gpu`."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fdconv_deploy.errors import BackendError
from fdconv_deploy.runtime import open_session
from tests.runtime import toy
from tests.runtime.fake_onnxruntime_gpu import NO_CUDNN, FakeOnnxRuntimeGpu


@pytest.fixture
def gpu(monkeypatch) -> FakeOnnxRuntimeGpu:
    fake = FakeOnnxRuntimeGpu()
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    return fake


def images(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, 3, 32, 48)).astype(np.float32)


def test_float32_stays_float32_unless_tf32_is_asked_for(toy_bundle, gpu, monkeypatch):
    def used(**options: bool) -> str:
        with open_session(toy_bundle, "onnxruntime-cuda", **options) as session:
            session.warm_up([1])
            said = "with TF32" if gpu.sessions[-1].options["use_tf32"] == "1" else "without TF32"
            assert said in session.operators
            return gpu.sessions[-1].options["use_tf32"]

    assert used() == "0"
    assert used(tf32=True) == "1"
    monkeypatch.setenv("FDCONV_TF32", "1")
    assert used() == "1"
    assert used(tf32=False) == "0"
    monkeypatch.setenv("FDCONV_TF32", "")
    assert used() == "0"


@pytest.mark.parametrize("backend", ["auto", "onnxruntime-cuda", "onnxruntime-cpu"])
@pytest.mark.parametrize("word", ["true", "on", "2", " 1"])
def test_a_switch_for_tf32_of_another_word_is_refused(toy_bundle, gpu, monkeypatch, backend, word):
    """Taken for 0 it would be found out by nothing but the time."""
    monkeypatch.setenv("FDCONV_TF32", word)
    with pytest.raises(BackendError, match=f"FDCONV_TF32 is 0 or 1, not '{word}'"):
        open_session(toy_bundle, backend)


def test_a_run_replays_a_cuda_graph_between_buffers_that_stay(toy_bundle, gpu):
    with open_session(toy_bundle, "onnxruntime-cuda") as session:
        session.warm_up([1])
        (loaded,) = gpu.sessions
        assert loaded.options["enable_cuda_graph"] == "1"
        assert "in one CUDA graph" in session.operators
        answers = [session.run(images(seed)) for seed in range(3)]
    assert len(loaded.bindings) == 1
    for seed, answer in enumerate(answers):  # none is overwritten by the next run
        assert np.abs(answer - toy.reference_logits(images(seed))).max() < 1e-4


def test_no_bias_gets_a_node_that_the_provider_has_no_kernel_for(toy_bundle, gpu):
    """tests/real_packages/onnxruntime_gpu/placement.json: what the real provider makes of int8."""
    with open_session(toy_bundle, "onnxruntime-cuda") as session:
        session.warm_up([1])
    options = gpu.sessions[0].session_options
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"


def test_all_runs_are_of_one_thread(toy_bundle, gpu):
    with (
        open_session(toy_bundle, "onnxruntime-cuda") as session,
        ThreadPoolExecutor(4) as callers,
    ):
        found = list(callers.map(lambda seed: session.run(images(seed)), range(16)))
    for seed, answer in enumerate(found):
        assert np.abs(answer - toy.reference_logits(images(seed))).max() < 1e-4
    assert len(gpu.sessions[0].threads) == 1


def test_a_graph_that_cannot_be_captured_runs_all_the_same(toy_bundle, gpu):
    gpu.captures = False
    with open_session(toy_bundle, "onnxruntime-cuda") as session:
        answer = session.run(images(0))
        assert "without a CUDA graph, since ONNX Runtime cannot load" in session.operators
    assert np.abs(answer - toy.reference_logits(images(0))).max() < 1e-4
    assert gpu.sessions[-1].options["enable_cuda_graph"] == "0"


def test_auto_takes_a_provider_that_has_run(toy_bundle, gpu):
    with open_session(toy_bundle) as session:
        assert session.backend == "onnxruntime-cuda"
        assert session.choice.endswith("since its CUDA provider runs.")
    assert gpu.sessions[0].threads


def test_auto_falls_back_from_a_provider_that_starts_and_does_not_run(toy_bundle, gpu):
    gpu.fails = NO_CUDNN
    with open_session(toy_bundle) as session:
        assert session.backend == "onnxruntime-cpu"
        assert "since CUDA did not run (" in session.choice
        assert "found no cuDNN" in session.choice
        assert "onnxruntime-gpu" in session.choice
        sys.modules["onnxruntime"].fails = ""


def test_a_provider_that_was_asked_for_says_what_it_lacks_at_loading(toy_bundle, gpu):
    gpu.fails = NO_CUDNN
    with (
        open_session(toy_bundle, "onnxruntime-cuda") as session,
        pytest.raises(BackendError, match=r"found no cuDNN.*onnxruntime-gpu") as error,
    ):
        session.warm_up([1])
    assert "\n" not in str(error.value)


def test_inputs_of_another_shape_are_refused(toy_bundle, gpu):
    with open_session(toy_bundle, "onnxruntime-cuda") as session:
        session.warm_up([1])
        graph = session.runner._graphs.get(1)
        with pytest.raises(BackendError, match="does not take these inputs"):
            graph.run({"image": np.zeros((2, 3, 32, 48), np.float32)})
