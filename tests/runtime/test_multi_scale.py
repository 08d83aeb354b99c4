"""Several scales and mirror images, beside mmsegmentation's own test-time augmentation.

tests/real_packages/mmsegmentation/tta wrote its answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from fdconv_deploy.checkpoints import load_segmentor
from fdconv_deploy.checkpoints.loading import LoadedSegmentor
from fdconv_deploy.config import Preprocessing, TestMode
from fdconv_deploy.errors import BundleError, FDConvError
from fdconv_deploy.evaluation.networks import bundle_target, torch_target
from fdconv_deploy.export import export_network
from fdconv_deploy.runtime import Session, open_session
from fdconv_deploy.runtime.postprocessing import ArrayRows, View, bilinear, labels_of
from fdconv_deploy.runtime.preprocessing import prepare_image
from fdconv_deploy.runtime.segmentation import MultiScale, SegmentationPipeline
from tests.runtime import toy, toy_panoptic

PACKAGES = Path(__file__).parents[1] / "real_packages"
REAL = PACKAGES / "mmsegmentation"
FILES = {
    **{name: REAL / f"{name}.pth" for name in ("psp", "aspp", "psp_aligned")},
    "gray": PACKAGES / "mmsegmentation_pixels" / "gray.pth",
}
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def real(name: str) -> tuple[LoadedSegmentor, np.ndarray, dict[str, Any]]:
    """A network, an image as a session reads it, and mmsegmentation's answers."""
    with np.load(REAL / "tta" / f"{name}.npz") as found:
        answers = dict(found)
    image = np.ascontiguousarray(answers.pop("image")[..., ::-1])  # BGR, as mmcv loads it
    return load_segmentor(FILES[name]), image, answers


def check_near(labels: np.ndarray, expected: np.ndarray, mean: np.ndarray) -> None:
    """The same labels, but for pixels whose two best classes are the same in float32."""
    second, first = np.sort(mean, axis=0)[-2:]
    assert (first - second)[labels != expected].max(initial=0) <= 1e-5


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", ["psp", "aspp", "psp_aligned"])
def test_a_checkpoints_labels_are_mmsegmentations(name: str, flip: bool) -> None:
    network, image, answers = real(name)
    end = "_flip" if flip else ""
    labels, mean = answers[f"labels{end}"], answers[f"mean{end}"]
    scales = MultiScale(FACTORS, flip)
    found = torch_target(network, FILES[name], scales=scales).answer(image).labels
    check_near(found, labels, mean)
    # It is not what any part of it gives.
    for fewer in (None, MultiScale(FACTORS, not flip), MultiScale(FACTORS[1:], flip)):
        other = torch_target(network, FILES[name], scales=fewer).answer(image).labels
        assert (other != labels).mean() > 0.01


@pytest.mark.parametrize("end", ["", "_flip"])
def test_a_sigmoid_is_taken_once(end: str) -> None:
    """mmsegmentation takes it twice: no probability is below a half then, and all is class 1."""
    network, image, answers = real("gray")
    assert answers[f"labels{end}"].min() == 1
    scales = MultiScale(FACTORS, bool(end))
    found = torch_target(network, FILES["gray"], scales=scales).answer(image).labels
    (mean,) = answers[f"mean{end}"]
    assert set(np.unique(found)) == {0, 1}
    assert np.abs(mean - 0.5)[found != (mean > 0.5)].max(initial=0) <= 1e-5


def test_a_sliding_bundle_takes_any_factor(tmp_path: Path) -> None:
    """Its checkpoint beside it pads what is smaller than the crop, as the bundle must."""
    network, image, _ = real("psp_aligned")
    crop = network.architecture.test.crop_size
    assert crop is not None
    bundle = export_network(network, tmp_path / "bundle", size=crop, batches=(1, 2))
    with open_session(bundle, threads=1) as session:
        for factors in (FACTORS, FACTORS[1:]):
            scales = MultiScale(factors, flip=True)
            ours = bundle_target(session, scales=scales).answer(image).labels
            theirs = torch_target(network, FILES["psp_aligned"], sizes=[crop], scales=scales)
            assert (ours != theirs.answer(image).labels).mean() < 0.002
        # From 0.75 on nothing is padded: as published.
        alone = torch_target(network, FILES["psp_aligned"], scales=scales).answer(image).labels
        assert (ours != alone).mean() < 0.002
        found = session.segment(image, scales=scales)
        assert (found.mode, found.fit) == ("slide", "resized")
        assert session.segment(image, scales=MultiScale((0.5,))).fit == "letterboxed"
        assert set(found.timings) == {"preprocess", "inference", "postprocess"}
        assert min(found.timings.values()) >= 0


def merged(session: Session, image: np.ndarray, covered: int) -> np.ndarray:
    """What the toy answers to an image and its mirror image, by torch, (classes, H, W)."""
    total = torch.zeros(())
    pipeline = session.segmentation
    for mirrored in (False, True):
        sizes, fit = pipeline.sizes, pipeline.fit
        prepared = prepare_image(image, session.preprocessing, sizes, fit, mirrored=mirrored)
        logits = torch.from_numpy(session.run(prepared.inputs["images"][None]))
        logits = interpolate(logits, session.input_size, mode="bilinear")[..., :covered]
        logits = logits.flip(3) if mirrored else logits
        total = total + interpolate(logits, image.shape[:2], mode="bilinear").softmax(1)[0]
    return total.numpy()


@pytest.mark.parametrize(("fit", "size", "covered"), [("stretch", (32, 48), 48),
                                                      ("stretch", (50, 31), 48),
                                                      ("pad", (64, 48), 24)])  # fmt: skip
def test_a_mirror_image_needs_no_other_graph(
    tmp_path: Path, fit: Any, size: tuple[int, int], covered: int
) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    toy.make_bundle(tmp_path / "bundle", fit=fit)
    with open_session(tmp_path / "bundle", threads=1) as session:
        found = session.segment(image, scales=MultiScale(flip=True))
        expected = merged(session, image, covered)
        assert (found.labels != expected.argmax(0)).mean() < 0.001
        assert (found.labels != session.segment(image).labels).mean() > 0.05
        assert found.mode == "whole"
        alone = session.segment(image, scales=MultiScale())
        assert np.array_equal(alone.labels, session.segment(image).labels)


def test_padding_is_of_each_scaled_image() -> None:
    """A graph's size is a multiple of ``size_divisor``, and the padding is cut off again."""
    preprocessing = Preprocessing(size_divisor=32)
    arch = toy.architecture(preprocessing=preprocessing)
    image = np.random.default_rng(3).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    seen = []

    def run(images: np.ndarray) -> np.ndarray:
        covered = np.abs(images[0]).sum(0) > 0
        seen.append((images.shape[2:], (int(covered.any(1).sum()), int(covered.any(0).sum()))))
        return toy.reference_logits(images)

    pipeline = SegmentationPipeline(arch, [])
    found = pipeline.at_scales(image, MultiScale((0.5, 1.0, 1.5)), run)
    assert seen == [((32, 64), (20, 35)), ((64, 96), (40, 70)), ((64, 128), (60, 105))]
    assert (found.fit, found.labels.shape) == ("resized", (40, 70))


def test_scores_are_averaged_as_they_are() -> None:
    """As Mask2Former's own augmentation does. By softmax the two weak views would outvote one."""
    same = bilinear(1, 1, align_corners=False)
    views = [
        View(ArrayRows(np.array(scores, np.float32)[:, None, None]), same, same, mirrored=False)
        for scores in ([9.0, 0.0], [0.0, 4.0], [0.0, 4.0])
    ]
    assert labels_of(*views, scores=True) == 0
    assert labels_of(*views) == 1


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    toy.make_bundle(tmp_path / "bundle")
    image = np.zeros((32, 48, 3), np.uint8)
    with open_session(tmp_path / "bundle", threads=1) as session:
        with pytest.raises(BundleError, match=r"32x48 .* need 16x24, 56x84 too"):
            session.segment(image, scales=MultiScale((0.5, 1, 1.75)))
        with pytest.raises(BundleError, match="no stride to slide by"):
            session.segment(image, scales=MultiScale((0.5, 1)), mode="slide")


def test_many_classes_are_merged_in_blocks_of_rows(tmp_path: Path) -> None:
    test = TestMode(mode="slide", crop_size=(32, 48), stride=(16, 30))
    arch = toy.architecture(300, test=test)
    toy.make_bundle(tmp_path / "bundle", arch=arch)
    image = np.random.default_rng(2).integers(0, 256, (150, 211, 3), dtype=np.uint8)
    with open_session(tmp_path / "bundle", threads=1) as session:
        found = session.segment(image, scales=MultiScale((1.0,)))
        assert np.array_equal(found.labels, session.segment(image).labels)
        both = session.segment(image, scales=MultiScale((1.0,), flip=True)).labels
        turned = session.segment(image[:, ::-1], scales=MultiScale((1.0,), flip=True)).labels
        assert both.dtype == np.uint16
        assert (both != turned[:, ::-1]).mean() < 0.001


@pytest.mark.parametrize("factors", [(), (0.0,), (-1.0, 1.0), (float("nan"),), (1e9,)])
def test_factors_that_are_none(factors: tuple[float, ...]) -> None:
    with pytest.raises(FDConvError, match="numbers above 0"):
        MultiScale(factors)


def test_panoptic_answers_are_not_merged(tmp_path: Path) -> None:
    bundle = toy_panoptic.make_bundle(tmp_path / "bundle")
    image = np.zeros((32, 48, 3), np.uint8)
    with (
        open_session(bundle.path) as session,
        pytest.raises(BundleError, match="panoptic segments, which are not merged"),
    ):
        session.segment(image, scales=MultiScale(flip=True))
