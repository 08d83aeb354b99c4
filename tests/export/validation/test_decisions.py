"""Networks that decide: a step that rounds another way is no error, and hides none."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from fdconv_deploy.export.api import export_module
from fdconv_deploy.nn.heads.query_head import Below
from tests.export.validation.conftest import Exported
from tests.export.validation.test_judge import judged
from tests.reference.lively import lively_input
from tests.reference.networks import dynamic

# Between the threshold and a value, and what is added to the value: shares of the largest.
GAP, ADDED = 1e-6, 3e-6


class Deciding(nn.Module):
    """Hides what lies below a threshold; one value lies just below it."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = dynamic(0), dynamic(1)
        with torch.no_grad():
            y = self.first.eval()(example)
        values = y[0, 0].flatten().sort().values
        self.below = Below(float(values[len(values) // 4 * 3] + GAP * y.abs().max()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y * (1 - self.below(y[:, :1])))


@pytest.fixture(scope="module")
def deciding(tmp_path_factory) -> Exported:
    example = lively_input((1, 18, 17, 20), seed=5)
    network = Deciding(example).eval()
    bundle = export_module(network, example, tmp_path_factory.mktemp("deciding") / "bundle")
    return Exported(network, example, bundle)


def changed(made: Exported, folder: Path, added: float) -> Path:
    """The graph with ``added``, a share of the largest value, added to the first channel."""
    path = Path(shutil.copytree(made.bundle.path, folder / "copy")) / "model.b1.onnx"
    model = onnx.load(path)
    (bias,) = (t for t in model.graph.initializer if t.name == "first.bias")
    values = onnx.numpy_helper.to_array(bias).copy()
    with torch.no_grad():
        largest = made.network.first(made.example).abs().max()
    values[0] += added * float(largest)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, path)
    return path


def test_a_true_graph_is_judged_between_its_decisions(deciding, tmp_path):
    verdict = judged(deciding, deciding.bundle.model_path(1), tmp_path, 1)
    assert verdict.equal
    # Before the decision, before the last layer, and the output.
    assert len(verdict.layers) == 3


def test_a_decision_that_rounds_another_way_is_no_error(deciding, tmp_path):
    verdict = judged(deciding, changed(deciding, tmp_path, ADDED), tmp_path, 1)
    (whole,) = verdict.whole
    assert whole.error > 1e-4  # one value is there that was not, and all kernels changed
    assert (whole.outcome, whole.otherwise) == ("cannot tell", 1)
    assert {finding.outcome for finding in verdict.layers} == {"equal"}
    assert verdict.equal
    assert "1 of the network's decisions fall another way" in verdict.sentences()[0]
    assert verdict.as_dict()["whole"][0]["decided_otherwise"] == 1


def test_a_decision_that_rounds_another_way_is_said_within_the_tolerance(deciding, tmp_path):
    path = changed(deciding, tmp_path, ADDED)
    verdict = judged(deciding, path, tmp_path, 1, tolerance=10.0)
    (whole,) = verdict.whole
    assert (whole.outcome, whole.otherwise) == ("equal", 1)
    assert "; 1 of the network's decisions fall another way in it." in verdict.sentences()[0]


def test_an_error_is_found_though_it_changes_decisions(deciding, tmp_path):
    verdict = judged(deciding, changed(deciding, tmp_path, 1e-3), tmp_path, 1)
    assert not verdict.equal
    assert verdict.wrong.part == "first"


def test_another_threshold_is_an_error(deciding, tmp_path):
    path = changed(deciding, tmp_path, 0)
    model = onnx.load(path)
    (less,) = (node for node in model.graph.node if node.op_type == "Less")
    (constant,) = (t for t in model.graph.initializer if t.name == less.input[1])
    value = onnx.numpy_helper.to_array(constant) * np.float32(1.1)
    constant.CopyFrom(onnx.numpy_helper.from_array(value, constant.name))
    onnx.save(model, path)
    assert not judged(deciding, path, tmp_path, 1).equal
