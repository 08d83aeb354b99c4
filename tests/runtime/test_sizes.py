"""A bundle of several input sizes: which graphs an image, a batch and a view of one size take."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fdconv_deploy.errors import BundleError, ImageError
from fdconv_deploy.runtime import Bundle, Session, open_session
from fdconv_deploy.runtime.preprocessing import best_size
from fdconv_deploy.runtime.segmentation import MultiScale, SegmentationPipeline
from tests.runtime import toy
from tests.runtime.test_bundle import edit

SIZES = ((32, 48), (48, 32), (64, 96))


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32×48, 48×32 and 64×96, batches 1 and 4."""
    path = tmp_path_factory.mktemp("sizes") / "bundle"
    return toy.make_bundle(path, other_sizes=SIZES[1:]).path


@pytest.fixture(scope="module")
def session(sized: Path):
    with open_session(sized, threads=2) as opened:
        yield opened


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_manifest_lists_every_size(sized: Path) -> None:
    manifest = Bundle.open(sized).manifest
    assert manifest.sizes == SIZES
    assert len(manifest.graphs) == 6
    assert set(manifest.files) == {*manifest.graphs, "weights.bin"}
    view = manifest.at((48, 32))
    assert view.sizes == ((48, 32),)
    assert view.models == {1: "model.48x32.b1.onnx", 4: "model.48x32.b4.onnx"}
    with pytest.raises(ValueError, match="10x10"):
        manifest.at((10, 10))


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((50, 75), (32, 48)),
        ((75, 50), (48, 32)),
        ((500, 100), (48, 32)),
        ((48, 48), (32, 48)),  # both as badly: the first
        ((64, 96), (32, 48)),  # of equal proportions the first, which is the bundle's own
    ],
)
def test_an_image_takes_the_nearest_proportions(session: Session, image, size) -> None:
    assert best_size(image, SIZES) == size
    pixels = picture(*image)
    prepared = session.segmentation.prepare(pixels)
    assert prepared.network == size
    assert prepared.inputs["images"].shape == (3, *size)
    whole = session.segment(pixels)
    alone = session.at(size).segment(pixels)
    assert whole.labels.shape == image
    assert np.array_equal(whole.labels, alone.labels)


def test_rounded_proportions_are_the_same(session: Session) -> None:
    assert best_size((620, 1000), ((800, 1344), (416, 672), (672, 416))) == (800, 1344)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 4, 6])
def test_a_batch_runs_at_its_own_size(session: Session, size, count: int) -> None:
    images = np.random.default_rng(count).normal(size=(count, 3, *size)).astype(np.float32)
    expected = toy.reference_logits(images)
    for found in (session, session.at(size)):
        np.testing.assert_allclose(found.run(images), expected, atol=1e-5)
    if count in (1, 4):
        raw = session.run_raw({"images": images})["logits"]
        np.testing.assert_allclose(raw, expected, atol=1e-5)


def test_images_of_several_sizes_are_finished_in_their_order(session: Session) -> None:
    pictures = [picture(50, 75), picture(75, 50), picture(40, 60)]
    prepared = [session.segmentation.prepare(one) for one in pictures]
    answers = session.finish_all(prepared)
    for one, answer in zip(pictures, answers, strict=True):
        assert np.array_equal(answer.labels, session.segment(one).labels)


def test_several_scales_take_the_graphs_of_their_sizes(session: Session) -> None:
    pixels, how = picture(50, 75), MultiScale((1, 2), flip=True)
    architecture = session.bundle.manifest.architecture
    assert architecture is not None
    found = session.segment(pixels, scales=how)
    pipeline = SegmentationPipeline(architecture, SIZES)
    expected = pipeline.at_scales(pixels, how, toy.reference_logits, SIZES[0])
    assert (found.labels == expected.labels).mean() > 0.999
    with pytest.raises(BundleError, match=r"of 32x48, 48x32, 64x96 .* need 16x24 too"):
        session.segment(pixels, scales=MultiScale((0.5, 1)))


def test_a_size_that_is_not_there(session: Session) -> None:
    with pytest.raises(BundleError, match=r"has 32x48, 48x32, 64x96. Export it with --size 8x8"):
        session.at((8, 8))
    zeros = np.zeros((1, 3, 8, 8), np.float32)
    with pytest.raises(ImageError, match="or of 48x32 or 64x96 pixels"):
        session.run(zeros)
    with pytest.raises(ImageError, match="or of 48x32 or 64x96 pixels"):
        session.run_batches({"images": zeros})


def test_weights_are_read_once_and_let_go_of(tmp_path: Path) -> None:
    path = toy.make_bundle(tmp_path / "bundle", other_sizes=SIZES[1:]).path
    with open_session(path, threads=1) as session:
        views = [session.at(size).runner._bundle for size in SIZES]
        assert len({id(view.contents["weights.bin"]) for view in views}) == 1
        shutil.rmtree(path)
        session.warm_up()
        assert not any(view.contents for view in (*views, session.bundle))
        for size in SIZES:
            assert session.run(np.zeros((4, 3, *size), np.float32)).shape[0] == 4


class TestRefused:
    @pytest.fixture
    def damaged(self, sized: Path, tmp_path: Path) -> Path:
        return shutil.copytree(sized, tmp_path / "bundle")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda m: m["other_sizes"][0]["input"].update(width=48, height=32), "given once"),
            (lambda m: m["other_sizes"][0]["models"].pop("4"), "same batch sizes"),
            (lambda m: m["other_sizes"][0]["input"].update(width=40), "must take images"),
            (lambda m: m["other_sizes"][0]["models"].update({"1": "none.onnx"}), "none.onnx"),
            (lambda m: m["files"].pop("model.48x32.b4.onnx"), "does not list"),
        ],
    )
    def test_inconsistent(self, damaged: Path, change, says: str) -> None:
        edit(damaged, change)
        with pytest.raises(BundleError, match=says):
            Bundle.open(damaged)

    def test_changed(self, damaged: Path) -> None:
        graph = damaged / "model.64x96.b4.onnx"
        data = bytearray(graph.read_bytes())
        data[-1] ^= 1
        graph.write_bytes(data)
        with pytest.raises(BundleError, match=r"model\.64x96\.b4\.onnx"):
            Bundle.open(damaged)
