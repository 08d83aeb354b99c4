from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from fdconv_deploy.errors import BackendError
from fdconv_deploy.runtime import Bundle, open_session
from fdconv_deploy.runtime.backends import onnxruntime as backend_module
from fdconv_deploy.runtime.backends.threads import available_cores
from tests.runtime import toy


def settings(bundle: Path, **options):
    """The ONNX Runtime session's own account of its options."""
    with open_session(bundle, "onnxruntime-cpu", **options) as session:
        session.warm_up([1])
        return session.runner._graphs.get(1)._session.get_session_options()


class TestSettings:
    def test_threads(self, toy_bundle: Path) -> None:
        assert settings(toy_bundle, threads=3).intra_op_num_threads == 3
        assert settings(toy_bundle).intra_op_num_threads == available_cores()

    def test_spinning_within_a_run_only(self, toy_bundle: Path) -> None:
        found = settings(toy_bundle, threads=1)
        assert found.get_session_config_entry("session.force_spinning_stop") == "1"


def needing(path: Path, rows: int, columns: int) -> Bundle:
    """A module whose one intermediate tensor has rows × columns float32."""
    shape = numpy_helper.from_array(np.array([rows, columns], np.int64), "shape")
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["y"], keepdims=1),
    ]
    return toy.write_module(path, nodes, {"x": (1, 1)}, {"y": (1, 1)}, [shape])


class TestErrors:
    def test_out_of_memory_while_running(self, tmp_path: Path) -> None:
        bundle = needing(tmp_path / "b", 1 << 22, 1 << 20)  # 16 TiB
        with open_session(bundle, "onnxruntime-cpu", threads=1) as session:
            with pytest.raises(BackendError, match="out of memory while running") as caught:
                session.warm_up()
            assert "17,592,186 MB" in str(caught.value)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc")])
    def test_out_of_memory_while_loading(self, toy_bundle: Path, monkeypatch, error) -> None:
        import onnxruntime

        def refuse(*args, **kwargs):
            raise error

        with open_session(toy_bundle, "onnxruntime-cpu", threads=1) as session:
            monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
            with pytest.raises(BackendError, match="out of memory while loading 'model"):
                session.warm_up([1])
            monkeypatch.undo()
            session.warm_up([1])  # a failed load leaves the session as it was

    def test_failing_run_says_what_onnxruntime_says_without_its_mark(self, tmp_path: Path) -> None:
        bundle = needing(tmp_path / "b", 2, 2)
        with open_session(bundle, "onnxruntime-cpu", threads=1) as session:
            graph = session.runner._graphs.get(1)
            with pytest.raises(BackendError, match="failed while running") as caught:
                graph.run({"x": np.zeros((1, 1), np.int64)})
        assert "[ONNXRuntimeError]" not in str(caught.value)
        assert "Unexpected input data type" in str(caught.value)

    def test_first_line_of_nothing_is_the_errors_name(self) -> None:
        assert backend_module.first_line(ValueError()) == "ValueError"
