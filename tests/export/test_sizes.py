"""One network exported at several input sizes: graphs of each over the same weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fdconv_deploy.config import TestMode
from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.errors import ExportError
from fdconv_deploy.evaluation.networks import torch_target
from fdconv_deploy.export import export_module
from fdconv_deploy.export.api import export_network
from fdconv_deploy.export.options import ExportOptions
from fdconv_deploy.export.validation.verify import verify_bundle
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.runtime import open_session
from tests.export.graphs import relative
from tests.reference.lively import lively_input
from tests.reference.networks import small_segmentor
from tests.test_cli import fdconv

SIZES = ((65, 97), (97, 65))


@pytest.fixture(scope="module")
def segmentor():
    return small_segmentor()


@pytest.fixture(scope="module")
def bundle(segmentor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes") / "bundle"
    return export_network(segmentor, folder, size=SIZES, batches=(1, 2))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_each_is_the_network(bundle, segmentor, size, batch):
    x = lively_input((batch, 3, *size), 9)
    with open_session(bundle.path, threads=1) as session:
        logits = session.run(x.numpy())
    assert relative(logits, segmentor(x).numpy()) <= 1e-5


def test_what_the_manifest_says(bundle):
    manifest = bundle.manifest
    assert manifest.sizes == SIZES
    assert manifest.at(SIZES[1]).models == {1: "model.97x65.b1.onnx", 2: "model.97x65.b2.onnx"}
    for size in SIZES:
        parity = manifest.at(size).parity
        assert parity is not None
        assert set(parity.batches) == {1, 2}
        assert parity.max_rel < 1e-5
    other = manifest.graph["sizes"]["97x65"]
    assert all(found["equal"] for found in other["exactness"].values())
    assert other["nodes.b1"] > 0


def test_weights_are_stored_once(bundle, segmentor, tmp_path):
    """What a size adds depends on its lengths alone: a turned one, on nothing the first lacks."""
    alone = export_network(segmentor, tmp_path / "one", size=SIZES[0], batches=(1, 2))
    one, two = (made.manifest.files["weights.bin"].bytes for made in (alone, bundle))
    parameters = sum(value.nbytes for value in segmentor.state_dict().values())
    assert two - one < 0.2 * parameters


def test_verify_judges_each(bundle, segmentor):
    with open_session(bundle.path, threads=1) as session:
        verdicts = verify_bundle(session, segmentor)
        assert [verdict.equal for verdict in verdicts] == [True] * 4
        picture = np.random.default_rng(0).integers(0, 256, (150, 100, 3), dtype=np.uint8)
        (verdict,) = verify_bundle(session, segmentor, [("upright.png", picture)])
        assert verdict.equal


def test_pytorch_sees_what_the_bundle_sees(bundle, segmentor):
    random = np.random.default_rng(0)
    target = torch_target(segmentor, bundle.path, sizes=SIZES)
    with open_session(bundle.path, threads=1) as session:
        for size in ((100, 150), (150, 100)):
            image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
            same = target.answer(image).labels == session.segment(image).labels
            assert same.mean() > 0.999


def test_the_commands(tmp_path, monkeypatch, capfd):
    checkpoint, made = packaged_checkpoint(), tmp_path / "made"
    sizes = ["--size", "64x96", "--size", "96x64"]
    code, out, err = fdconv(monkeypatch, capfd, "export", checkpoint, "-o", made, *sizes)
    assert code == 0, err
    assert "96x64, batch 1: The graph is the network." in out
    assert "nearest to their proportions" in out
    weights, graph = (made / name for name in ("weights.bin", "model.96x64.b1.onnx"))
    assert graph.stat().st_size < 0.05 * weights.stat().st_size
    code, out, err = fdconv(monkeypatch, capfd, "verify", made, checkpoint)
    assert code == 0, err
    assert "packaged pictures at 96x64: logits" in out
    bench = ["bench", made, "--seconds", "0.01", "--json", "-", "--size"]
    code, out, err = fdconv(monkeypatch, capfd, *bench, "96x64")
    assert code == 0, err
    assert [row["size"] for row in json.loads(out)["rows"]] == [[96, 64]]
    code, out, err = fdconv(monkeypatch, capfd, *bench, "64x64")
    assert code == 2
    assert "64x96, 96x64" in err


def test_refused(segmentor, tmp_path):
    with pytest.raises(ExportError, match="each once, got 64x64, 64x64"):
        ExportOptions(size=[(64, 64), (64, 64)])
    with pytest.raises(ExportError, match="one or more"):
        ExportOptions(size=[])
    with pytest.raises(ExportError, match="got 0x64"):
        ExportOptions(size=[(64, 64), (0, 64)])
    module = torch.nn.Sequential(FDConv2d(16, 16, 3, padding=1)).eval()
    with pytest.raises(ExportError, match="a module is exported at its example's shape"):
        export_module(module, torch.zeros(1, 16, 8, 8), tmp_path / "m", size=[(8, 8), (16, 16)])
    sliding = small_segmentor(test=TestMode(mode="slide", crop_size=(64, 96), stride=(32, 48)))
    with pytest.raises(ExportError, match="sliding a 64x96 crop"):
        export_network(sliding, tmp_path / "s", size=[(64, 96), (96, 64)])
    assert not list(tmp_path.iterdir())
