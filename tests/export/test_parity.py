"""The check that decides whether a bundle is kept."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.parity import compare, measure
from export.rules import Rule
from fdconv_deploy.errors import ExportError
from tests.export.graphs import run_file

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def test_errors_are_the_largest_and_relative_to_the_largest():
    expected = array(2, 3, 4, 5)
    expected[0, 0, 0, 0] = -8
    actual = expected.copy()
    actual[1, 2, 3, 4] += 0.5
    found = compare("logits", actual, expected, classes=False)
    assert found.max_abs == pytest.approx(0.5)
    assert found.max_rel == pytest.approx(0.5 / 8)
    assert found.argmax_agreement is None


def test_share_of_equal_classes():
    expected = np.zeros((1, 3, 2, 5), np.float32)
    expected[0, 1] = 1
    actual = expected.copy()
    actual[0, 2, 0, :3] = 2
    assert compare("logits", actual, expected, classes=True).argmax_agreement == 0.7
    single = compare("logits", actual[:, :1], expected[:, :1], classes=True)
    assert single.argmax_agreement is None  # of one class there is nothing to choose


def test_answers_of_zeros():
    zero = np.zeros((1, 2), np.float32)
    assert compare("y", zero, zero, classes=False).max_rel == 0
    assert compare("y", zero + 2, zero, classes=False).max_rel == 2


@pytest.mark.parametrize(
    ("actual", "hint"),
    [
        (array(1, 4), r"'y'.*\(1, 4\).*network's is float32 \(1, 3\)"),
        (np.zeros((1, 3)), "float64"),
        (np.full((1, 3), np.nan, np.float32), "not finite"),
        (np.full((1, 3), np.inf, np.float32), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(actual, hint):
    with pytest.raises(ExportError, match=hint):
        compare("y", actual, np.zeros((1, 3), np.float32), classes=False)


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    """The segmentor's bundle, to be damaged."""
    return Path(shutil.copytree(bundle.path, tmp_path / "copy"))


def question(bundle) -> tuple[dict, dict]:
    x = array(2, 3, 65, 97)
    return {"images": x}, {"logits": run_file(bundle.model_path(2), x)[0]}


def test_a_true_copy_passes(bundle, copied, tmp_path):
    inputs, expected = question(bundle)
    (found,) = measure(copied / "model.b2.onnx", inputs, expected, tmp_path, rule=Rule("classes"))
    assert found.name == "logits"
    assert found.max_rel == 0
    assert found.argmax_agreement == 1


@pytest.mark.parametrize("kind", ["spectrum", "group.patterns", "heads.bias"])
def test_a_planted_wrong_weight_is_seen(bundle, copied, tmp_path, kind):
    """A few wrong numbers of one tensor among hundreds."""
    path = copied / "model.b2.onnx"
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name.endswith(f".{kind}"))
    values = onnx.numpy_helper.to_array(tensor).copy()
    if kind == "group.patterns":
        values.reshape(-1)[:20] = (values.reshape(-1)[:20] + 1) % 4
    else:
        values.reshape(-1)[:20] += 0.5 * np.abs(values).max()
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    inputs, expected = question(bundle)
    (found,) = measure(path, inputs, expected, tmp_path, rule=Rule("classes"))
    assert found.max_rel > 1e-4


@pytest.mark.parametrize(
    ("rename", "hint"),
    [
        (lambda i, o: (i, {"scores": o["logits"]}), r"outputs are \['logits'\].*\['scores'\]"),
        (lambda i, o: ({"pixels": i["images"]}, o), "did not pass its check"),
        (lambda i, o: ({"images": i["images"][:1]}, o), "did not pass its check"),
        (lambda i, o: (i, {"logits": o["logits"][:1]}), r"logits.*\(1, 7,"),
    ],
)
def test_other_names_and_shapes_are_sentences(bundle, tmp_path, rename, hint):
    inputs, expected = rename(*question(bundle))
    with pytest.raises(ExportError, match=hint):
        measure(bundle.model_path(2), inputs, expected, tmp_path, rule=Rule("classes"))


def test_a_file_that_does_not_load_is_a_sentence(bundle, copied, tmp_path):
    (copied / "weights.bin").write_bytes(b"short")
    inputs, expected = question(bundle)
    with pytest.raises(ExportError, match=r"did not pass its check: .+"):
        measure(copied / "model.b2.onnx", inputs, expected, tmp_path, rule=Rule("classes"))


def test_the_checking_process_knows_no_torch():
    """So nothing of the exporter's memory can help the graph to its answer."""
    script = "import export.parity, sys; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"
