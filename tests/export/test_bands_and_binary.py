"""Networks of other bands and of one output, exported: every precision, verify, evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from examples.streets.scenes import draw_scene
from fdconv_deploy.config import Preprocessing, SegmentorConfig, UPerHeadConfig
from fdconv_deploy.export.api import export_network
from fdconv_deploy.export.validation.comparison import compare_output
from fdconv_deploy.export.validation.sample_inputs import sample_tensor
from fdconv_deploy.export.validation.verify import verify_bundle
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.runtime import Bundle, open_session
from fdconv_deploy.runtime.preprocessing import scene_bands
from tests.reference.lively import enliven_network
from tests.reference.networks import small_segmentor
from tests.reference.segmentor import predict

SIZE = (48, 64)
FOUR = Preprocessing(
    mean=(1353.0, 1117.2, 1042.0, 2301.5),
    std=(245.7, 333.0, 395.1, 1083.0),
    loading="bands",
    to_float32=True,
)


def binary(preprocessing: Preprocessing, seed: int = 0, **head: object) -> Segmentor:
    """A narrow network of one output whose threshold lies amid what it answers."""
    usual = small_segmentor(18, 18, stages=2).architecture
    fields = usual.decode_head.model_dump() | {"num_classes": 2, "out_channels": 1, **head}
    architecture = SegmentorConfig(
        backbone=usual.backbone.model_copy(update={"in_channels": preprocessing.channels}),
        decode_head=UPerHeadConfig.model_validate(fields),
        preprocessing=preprocessing,
    )
    torch.manual_seed(seed)
    network = Segmentor(architecture)
    seen = [sample_tensor(4, (64, 64), preprocessing, seed=seed + step) for step in range(2)]
    enliven_network(network, seed, seen)
    with torch.no_grad():
        logits = network(sample_tensor(1, SIZE, preprocessing)).flatten().sort().values
        # In the widest gap near the median: no answer may lie where rounding decides its class.
        middle = logits[len(logits) * 2 // 5 : len(logits) * 3 // 5]
        gap = int(middle.diff().argmax())
        network.decode_head.conv_seg.bias -= middle[gap : gap + 2].mean()  # type: ignore[operator,union-attr]
    return network.eval()


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Scenes of four bands, (70, 90, 4) uint16."""
    scenes = (draw_scene(50 + seed + number, 70, 90)[0] for number in range(count))
    return [scene_bands(scene, FOUR).clip(0).astype(np.uint16) for scene in scenes]


@pytest.fixture(scope="module")
def network() -> Segmentor:
    return binary(FOUR, threshold=0.5)


@pytest.fixture(scope="module")
def bundle(network: Segmentor, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("bands")
    return export_network(network, folder / "four", size=SIZE, batches=(1, 2))


def test_bands_and_one_output_export_exactly(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.inputs[2][0].shape == (2, 4, *SIZE)
    assert manifest.outputs[2][0].shape[:2] == (2, 1)
    assert manifest.parity is not None
    for outputs in manifest.parity.batches.values():
        assert outputs[0].max_rel <= 1e-4
        assert outputs[0].argmax_agreement is not None
        assert outputs[0].argmax_agreement >= 0.999


def test_bands_and_one_output_verify_and_segment(network: Segmentor, bundle: Bundle) -> None:
    with open_session(bundle, threads=1) as session:
        image = pictures(1)[0]
        for given in ((), [("a picture", image)]):
            for verdict in verify_bundle(session, network, given):
                assert verdict.equal
                (finding,) = verdict.whole
                assert finding.parity is not None
                assert finding.parity.max_rel <= 1e-4
                assert finding.parity.argmax_agreement is not None
        answer = session.segment(image)
        prepared = session.segmentation.prepare(image).inputs["images"]
        logits = predict(network, torch.from_numpy(prepared[None]))
        resized = torch.nn.functional.interpolate(logits, image.shape[:2], mode="bilinear")
        expected = (resized.sigmoid() > 0.5)[0, 0].numpy()
        assert (answer.labels == expected).mean() >= 0.999
        assert 0.02 < answer.labels.mean() < 0.98
        assert answer.areas().sum() == answer.labels.size
        assert answer.overlay(image).shape == (*image.shape[:2], 3)
        assert session.preprocessing.channels == 4


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_bands_and_one_output_export_in_lower_precision(
    precision: str, network: Segmentor, tmp_path: Path
) -> None:
    made = export_network(
        network,
        tmp_path / precision,
        size=SIZE,
        pictures=pictures(1),
        precision=precision,  # type: ignore[arg-type]
        calibration=pictures(3, seed=1) if precision == "int8" else (),
    )
    assert made.manifest.parity is not None
    (output,) = made.manifest.parity.batches[1]
    assert output.argmax_agreement is not None
    assert output.argmax_agreement >= 0.9
    assert made.manifest.graph["precision"]["worst"]


def test_one_class_exports(tmp_path: Path) -> None:
    gray = Preprocessing(mean=(110.0,), std=(60.0,), loading="grayscale")
    network = binary(gray, num_classes=1, out_channels=None)
    made = export_network(network, tmp_path / "one", size=SIZE)
    with open_session(made, threads=1) as session:
        assert session.classes == ("class 0", "class 1")
        image = np.random.default_rng(0).integers(0, 256, (30, 40), np.uint8)
        assert set(np.unique(session.segment(image).labels)) <= {0, 1}


def test_one_logit_agrees_where_it_is_on_the_same_side() -> None:
    expected = np.array([[[[-2.0, -0.9, 0.0, 2.0]]]], np.float32)
    actual = expected + np.float32([0, 0.1, 0, 0])
    found = compare_output("logits", actual, expected, classes=True, threshold=0.3)
    assert found.argmax_agreement == 0.75  # a sigmoid of 0.3 is a logit of -0.847
    assert compare_output("logits", actual, expected, classes=True).argmax_agreement is None
