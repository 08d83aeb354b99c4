"""Graphs beside their networks: true ones pass, planted errors fail, on an unstable one too."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.api import export_module
from fdconv_deploy.export.validation.comparison import Comparison
from fdconv_deploy.export.validation.sample_inputs import InputSource, SourceNetwork
from fdconv_deploy.export.validation.subprocess_run import fresh
from fdconv_deploy.export.validation.verdict import Judge, Subject, Verdict
from tests.export.validation.conftest import Exported, chain
from tests.reference.lively import lively_input


class Single(torch.nn.Module):
    """Has a float32 tensor that no conversion reaches."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, torch.full((18, 1, 1, 1), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(self.inner(x), self.scale, groups=18)


def judged(made: Exported, path: Path, folder: Path, batch: int = 2, **options) -> Verdict:
    network = SourceNetwork(made.network, ("input",), ("output",), Comparison(), [])
    judge = Judge(network, folder)
    limit = options.get("tolerance", 1e-4)
    subject = Subject(batch, fresh(path, ["output"], folder), "fp32", limit, path)
    source = options.get("source") or InputSource(
        "the example", lambda b: (made.example.repeat(b, 1, 1, 1),)
    )
    return judge.judge(subject, [source], options.get("spares", ()))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["stable", "unstable"])
def test_a_true_graph_is_the_network(request, kind, batch, tmp_path):
    made = request.getfixturevalue(kind)
    verdict = judged(made, made.bundle.model_path(batch), tmp_path, batch)
    assert verdict.equal
    assert len(verdict.layers) == len(made.network)  # each but the first's input, and the output
    assert max(f.error for f in verdict.layers) < 1e-4
    assert [f.part for f in verdict.layers] == [f"{i}.0" for i in range(len(made.network))]
    assert verdict.conclusive is (kind == "stable")


def test_the_unstable_network_is_unstable(unstable):
    """In PyTorch itself, and more than export allows."""
    double = copy.deepcopy(unstable.network).double()
    with torch.no_grad():
        exact = double(unstable.example.double())
        error = (unstable.network(unstable.example) - exact).abs().max() / exact.abs().max()
    assert error > 1e-3
    found = unstable.bundle.manifest.graph["exactness"]["2"]
    assert found["equal"]
    assert found["whole"][0]["outcome"] == "cannot tell"
    assert found["whole"][0]["rounding"] > 1e-3
    assert "the example, mirrored" in {f["source"] for f in found["whole"]}


def wrong_group(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(-1)
    flat[:20] = (flat[:20] + 1) % 3
    return values


def one_wrong(values: np.ndarray) -> np.ndarray:
    values.reshape(-1)[values.size // 2] += 0.1 * np.abs(values).max()
    return values


PLANTED = {
    "group map": ("group.patterns", wrong_group),
    "scale": ("output_scale", lambda values: values * np.float32(1.001)),
    "band modulation missing": ("bands.conv.weight", np.zeros_like),
    "local modulation missing": ("local.weight", np.zeros_like),
    "weight off by 1e-4": ("spectrum", lambda values: values * np.float32(1 + 1e-4)),
    "bias": ("bias", one_wrong),
}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("kind", ["stable", "unstable"])
def test_a_planted_error_is_found_where_it_is(request, kind, planted, tmp_path):
    made = request.getfixturevalue(kind)
    copied = Path(shutil.copytree(made.bundle.path, tmp_path / "copy"))
    path, (name, change) = copied / "model.b1.onnx", PLANTED[planted]
    model = onnx.load(path)
    # Equal constants are shared, under the name of the first that has one.
    named = {tensor.name: tensor for tensor in model.graph.initializer}
    layer = next(f"{i}.0" for i in (1, 0) if f"{i}.0.{name}" in named)
    tensor = named[f"{layer}.{name}"]
    values = change(onnx.numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    verdict = judged(made, path, tmp_path, 1)
    assert not verdict.equal
    assert verdict.wrong.part == layer
    assert verdict.wrong.error > 1e-5


def test_another_input_is_taken_where_one_cannot_tell(unstable, tmp_path):
    mirrored = InputSource("mirrored", lambda b: (unstable.example.flip(-1).contiguous(),))
    path = unstable.bundle.model_path(1)
    verdict = judged(unstable, path, tmp_path, 1, spares=[mirrored])
    assert verdict.equal
    assert verdict.conclusive
    outcomes = {f.source: f.outcome for f in verdict.whole}
    assert outcomes == {"the example": "cannot tell", "mirrored": "equal"}
    assert "the example: output differs" in verdict.sentences()[0]
    assert "This input cannot tell" in verdict.sentences()[0]


def test_a_network_that_does_not_run_in_float64_is_judged_all_the_same(tmp_path):
    network, x = Single(chain(12, 0.01)).eval(), lively_input((1, 18, 17, 20), seed=5)
    made = export_module(network, x, tmp_path / "bundle")
    assert made.manifest.graph["exactness"]["1"]["equal"]


@pytest.mark.parametrize(
    ("batch", "names", "hint"),
    [(2, ["scores"], r"outputs are \['output'\].*\['scores'\]"), (1, ["output"], "its check: ")],
)
def test_other_names_and_shapes_are_sentences(stable, tmp_path, batch, names, hint):
    run = fresh(stable.bundle.model_path(2), names, tmp_path)
    with pytest.raises(ExportError, match=hint):
        run({"input": stable.example.repeat(batch, 1, 1, 1).numpy()})


def test_a_file_that_does_not_load_is_a_sentence(stable, tmp_path):
    copied = Path(shutil.copytree(stable.bundle.path, tmp_path / "copy"))
    (copied / "weights.bin").write_bytes(b"short")
    with pytest.raises(ExportError, match=r"did not pass its check: .+"):
        fresh(copied / "model.b1.onnx", ["output"], tmp_path)({"input": stable.example.numpy()})


def test_the_checking_process_knows_no_torch():
    """So nothing of the exporter's memory can help the graph to its answer."""
    script = (
        "import fdconv_deploy.export.validation.subprocess_run, sys; print('torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"
