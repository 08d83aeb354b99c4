"""A session answers by the bundle that it opened, whatever becomes of the folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime import Bundle, open_session
from tests.runtime import toy


def copy_over(bundle: Path, other: Path) -> None:
    """As ``cp other/* bundle`` and ``rsync --inplace``: the same files, other bytes."""
    for file in other.iterdir():
        (bundle / file.name).write_bytes(file.read_bytes())


def truncate(bundle: Path, other: Path) -> None:
    for file in bundle.iterdir():
        file.write_bytes(b"")


def exchange(bundle: Path, other: Path) -> None:
    bundle.rename(bundle.with_name("before"))
    shutil.copytree(other, bundle)


def delete(bundle: Path, other: Path) -> None:
    shutil.rmtree(bundle)


REPLACEMENTS = [copy_over, truncate, exchange, delete]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A bundle as the one that is opened, of other weights."""
    return toy.make_bundle(tmp_path / "other", seed=1).path


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 32, 48)).astype(np.float32)


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize("when", ["opened", "run", "warm"])
def test_a_session_keeps_to_what_it_opened(
    bundle_copy: Path, other: Path, replace: Callable[[Path, Path], None], when: str
) -> None:
    with open_session(bundle_copy, threads=2) as session:
        if when == "run":
            session.run(images(1))
        elif when == "warm":
            session.warm_up()
        replace(bundle_copy, other)
        for count in (1, 4, 6):
            expected = toy.reference_logits(images(count))
            np.testing.assert_allclose(session.run(images(count)), expected, atol=1e-5)


def test_an_opened_bundle_is_not_mixed_with_another(bundle_copy: Path, other: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    copy_over(bundle_copy, other)
    with open_session(bundle) as session, pytest.raises(BundleError, match="being copied over"):
        session.run(images(1))


def test_bytes_are_let_go_of_once_every_graph_is_loaded(toy_bundle: Path) -> None:
    with open_session(toy_bundle, threads=1) as session:
        session.run(images(1))
        assert session.bundle.contents  # batch 4 is not loaded yet
        session.run(images(4))
        assert not session.bundle.contents


def test_a_file_cut_off_under_a_run_does_not_end_the_process(tmp_path: Path) -> None:
    """ONNX Runtime reads a large constant that it does not pack where it lies, at every run."""
    code = """
    import sys
    from pathlib import Path

    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    from fdconv_deploy.runtime import open_session
    from tests.runtime import toy
    from tests.runtime.test_bundle import relist

    path = Path(sys.argv[1])
    toy.make_bundle(path, batches=(1,))
    model = toy.segmentor_model(1, 32, 48, 5)
    weight = toy.weight(5).tobytes()
    large = numpy_helper.from_array(np.ones((1, 5, 2000, 12), np.float32), "large")
    (path / "weights.bin").write_bytes(weight + large.raw_data)
    toy.external(large, "weights.bin")
    large.external_data[1].value = str(len(weight))
    last = numpy_helper.from_array(np.array([2]), "rows")
    model.graph.initializer.extend([large, last])
    model.graph.node[-1].output[0] = "small"
    model.graph.node.extend([
        helper.make_node("ReduceMax", ["small", "rows"], ["row"], keepdims=1),
        helper.make_node("Add", ["row", "large"], ["sums"]),
        helper.make_node("ReduceMax", ["sums", "rows"], ["most"], keepdims=1),
        helper.make_node("Add", ["small", "most"], ["logits"]),
    ])
    onnx.save(model, str(path / "model.b1.onnx"))
    relist(path, "model.b1.onnx")
    relist(path, "weights.bin")
    with open_session(path, threads=1) as session:
        x = np.ones((1, 3, 32, 48), np.float32)
        before = session.run(x)
        (path / "weights.bin").write_bytes(b"")
        assert np.array_equal(session.run(x), before)
    print("answered")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("answered\n")
