from __future__ import annotations

import gc
import json
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from PIL import Image
from safetensors.numpy import load_file

from fdconv_deploy.config import Preprocessing, TestMode
from fdconv_deploy.errors import BackendError, BundleError, ImageError
from fdconv_deploy.runtime import Bundle, Session, open_session, read_image
from fdconv_deploy.runtime import backends as backends_module
from fdconv_deploy.runtime.backends import onnxruntime as ort_module
from fdconv_deploy.runtime.bundle import sha256_of
from fdconv_deploy.runtime.postprocessing import logits_of, view_of
from fdconv_deploy.runtime.preprocessing import normalise
from tests.runtime import toy
from tests.runtime.test_bundle import edit, relist


@pytest.fixture
def session(toy_bundle: Path):
    with open_session(toy_bundle, threads=1) as opened:
        yield opened


def inputs(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 32, 48)).astype(np.float32)


class FakeBackend:
    """A backend made of a function; counts its loads and remembers batch sizes run."""

    name = device = "fake"
    operators = ""
    threads = 1

    def __init__(self, answer) -> None:
        self.answer, self.loads, self.runs = answer, [], []

    def load(self, bundle: Bundle, batch: int) -> FakeBackend:
        self.loads.append(batch)
        return self

    def run(self, feeds):
        self.runs.append(len(feeds["images"]))
        return {"logits": self.answer(feeds["images"])}


class TestRun:
    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
    def test_any_number_of_images(self, session: Session, count: int) -> None:
        x = inputs(count)
        found = session.run(x)
        assert found.shape == (count, 5, 8, 12)
        assert np.abs(found - toy.reference_logits(x)).max() < 2e-5

    def test_uint8_is_normalised(self, session: Session) -> None:
        images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
        tensors = np.stack([normalise(image, Preprocessing()) for image in images])
        assert np.array_equal(session.run(images), session.run(tensors))

    @pytest.mark.parametrize("batches", [(4,), (2, 3), (1,)])
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_slots_left_over_do_not_show(self, tmp_path, batches, count) -> None:
        toy.make_bundle(tmp_path / "b", batches=batches)
        with open_session(tmp_path / "b", threads=1) as session:
            found = session.run(inputs(count))
        assert found.shape[0] == count
        assert np.abs(found - toy.reference_logits(inputs(count))).max() < 2e-5

    def test_answers_are_the_callers_own(self, session: Session) -> None:
        first = session.run(inputs(1))
        kept = first.copy()
        session.run(inputs(1, seed=1))
        assert np.array_equal(first, kept)

    def test_strided_input(self, session: Session) -> None:
        x = inputs(2)[:, :, ::-1][:, :, ::-1]
        transposed = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        assert np.array_equal(session.run(transposed), session.run(np.ascontiguousarray(x)))

    @pytest.mark.parametrize(
        "bad",
        [
            np.zeros((1, 3, 32, 47), np.float32),
            np.zeros((1, 3, 32, 48), np.float64),
            np.zeros((1, 32, 48, 3), np.float32),
            np.zeros((1, 3, 32, 48), np.uint8),
            np.zeros((3, 32, 48), np.float32),
            np.zeros((0, 3, 32, 48), np.float32),
            [[1.0]],
            [np.zeros((32, 48, 3), np.uint8), np.zeros((32, 47, 3), np.uint8)],
        ],
    )
    def test_refuses_other_shapes(self, session: Session, bad) -> None:
        with pytest.raises(ImageError, match=r"\(N, 3, 32, 48\) float32"):
            session.run(bad)

    def test_says_what_it_was_given(self, session: Session) -> None:
        with pytest.raises(ImageError, match=r"found images \(0, 32, 48, 3\) uint8"):
            session.run(np.zeros((0, 32, 48, 3), np.uint8))

    def test_graphs_load_when_needed_and_once(self, toy_bundle: Path) -> None:
        backend = FakeBackend(toy.reference_logits)
        session = toy.session(Bundle.open(toy_bundle), backend)
        assert backend.loads == []
        session.run(inputs(2))
        session.run(inputs(1))
        assert backend.loads == [1]
        session.run(inputs(5))
        assert sorted(backend.loads) == [1, 4]
        assert backend.runs == [1, 1, 1, 4, 1]

    def test_threads_load_a_graph_once(self, toy_bundle: Path) -> None:
        backend = FakeBackend(toy.reference_logits)
        session = toy.session(Bundle.open(toy_bundle), backend)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: session.run(inputs(1, n)), range(40)))
        assert backend.loads == [1]

    def test_threads_get_their_own_answers(self, session: Session) -> None:
        def wrong(seed: int) -> bool:
            x = inputs(seed % 5 + 1, seed)
            return bool(np.abs(session.run(x) - toy.reference_logits(x)).max() > 2e-5)

        with ThreadPoolExecutor(8) as pool:
            assert not any(pool.map(wrong, range(60)))


class TestSegment:
    def test_a_path_is_read(self, session: Session, image: np.ndarray, tmp_path: Path) -> None:
        Image.fromarray(image).save(tmp_path / "street.png")
        for path in (tmp_path / "street.png", str(tmp_path / "street.png")):
            assert np.array_equal(session.segment(path).labels, session.segment(image).labels)
        with pytest.raises(ImageError, match="does not exist"):
            session.segment(tmp_path / "none.png")

    def test_a_size_other_than_the_bundles(self, session: Session, image: np.ndarray) -> None:
        found = session.segment(image)
        assert found.labels.shape == (50, 70)
        assert found.labels.dtype == np.uint8
        assert (found.fit, found.mode) == ("stretched", "whole")
        assert found.classes == tuple(f"class {i}" for i in range(5))
        assert len(found.palette) == 5
        assert found.areas().sum() == 50 * 70
        assert set(found.timings) == {"preprocess", "inference", "postprocess"}
        assert all(seconds >= 0 for seconds in found.timings.values())

    @pytest.mark.parametrize(
        ("size", "fit", "done"),
        [
            ((32, 48), "stretch", "resized"),
            ((64, 96), "pad", "resized"),
            ((50, 70), "pad", "letterboxed"),
            ((50, 70), "stretch", "stretched"),
            ((1, 1), "pad", "letterboxed"),
            ((1, 300), "stretch", "stretched"),
        ],
    )
    def test_says_how_the_image_was_fitted(self, session, size, fit, done) -> None:
        image = np.full((*size, 3), 90, np.uint8)
        found = session.segment(image, fit=fit)
        assert found.fit == done
        assert found.labels.shape == size

    def test_padding_and_stretching_are_different_answers(self, session, image) -> None:
        stretched, padded = (session.segment(image, fit=fit) for fit in ("stretch", "pad"))
        assert (stretched.labels != padded.labels).any()

    def test_padding_shows_the_network_the_mean_colour(self, toy_bundle, image) -> None:
        seen = []

        def answer(x: np.ndarray) -> np.ndarray:
            seen.append(x.copy())
            return toy.reference_logits(x)

        session = toy.session(Bundle.open(toy_bundle), FakeBackend(answer))
        session.segment(image, fit="pad")
        assert seen[0].shape == (1, 3, 32, 48)
        assert (seen[0][..., 45:] == 0).all()  # 50×70 becomes 32×45
        assert (seen[0][..., :45] != 0).any(axis=(0, 1)).all()

    def test_the_bundles_own_fit(self, tmp_path: Path, image: np.ndarray) -> None:
        toy.make_bundle(tmp_path / "b", fit="pad")
        with open_session(tmp_path / "b") as session:
            assert session.segment(image).fit == "letterboxed"
            assert session.segment(image, fit="stretch").fit == "stretched"

    def test_in_three_steps_is_the_same(self, session: Session, image: np.ndarray) -> None:
        prepare, finish = session.segmentation.prepare, session.segmentation.finish
        prepared = [prepare(i) for i in (image, image[::-1].copy())]
        logits = session.run(np.stack([p.inputs["images"] for p in prepared]))
        for number, flip in ((0, 1), (1, -1)):
            alone = session.segment(image[::flip].copy())
            together = finish(prepared[number], {"logits": logits[number]})
            assert (alone.labels == together.labels).mean() > 0.999

    def test_published_whole_mode(self, oracle: Path, tmp_path: Path) -> None:
        """The stored network answer, between our pre- and postprocessing: the stored labels."""
        reference = load_file(oracle / "segmentor" / "B_reference.safetensors")
        arch = toy.architecture(7)
        size = {"height": 125, "width": 157}
        manifest = toy.manifest(128, 160, (1,), arch).model_dump()
        manifest.update(input=size)
        manifest["inputs"][1][0]["shape"] = (1, 3, 125, 157)
        bundle = Bundle(tmp_path, type(toy.manifest(4, 4, (1,), arch)).model_validate(manifest))

        def answer(x: np.ndarray) -> np.ndarray:
            assert np.array_equal(x, reference["input"])
            return reference["decode_logits_quarter"]

        session = toy.session(bundle, FakeBackend(answer))
        found = session.segment(read_image(oracle / "segmentor" / "B_image.png"))
        assert found.fit == "resized"
        assert np.array_equal(found.labels, reference["argmax"])

    def test_published_resize_is_called_exact(self, oracle: Path, tmp_path: Path) -> None:
        reference = load_file(oracle / "segmentor" / "B_reference.safetensors")
        arch = toy.architecture(7, preprocessing=Preprocessing(scale=(256, 128)))
        manifest = toy.manifest(128, 175, (1,), arch)
        seen = []

        def answer(x: np.ndarray) -> np.ndarray:
            seen.append(x)
            return np.zeros((1, 7, 32, 44), np.float32)

        session = toy.session(Bundle(tmp_path, manifest), FakeBackend(answer))
        image = read_image(oracle / "segmentor" / "B_pipeline_image.png")
        assert session.segment(image).fit == "resized"
        assert np.array_equal(seen[0], reference["pipeline.input"])

    def test_slide_is_the_networks_mode(self, tmp_path: Path, image: np.ndarray) -> None:
        test = TestMode(mode="slide", crop_size=(32, 48), stride=(20, 30))
        toy.make_bundle(tmp_path / "b", arch=toy.architecture(test=test))
        with open_session(tmp_path / "b", threads=1) as session:
            found = session.segment(image)
            assert (found.mode, found.fit) == ("slide", "resized")
            assert found.labels.shape == (50, 70)
            assert session.segment(image[:20]).fit == "letterboxed"
            assert session.segment(image, mode="whole").mode == "whole"
            assert found.timings["inference"] > 0

    def test_slide_without_a_stride(self, session: Session, image: np.ndarray) -> None:
        with pytest.raises(BundleError, match="records no stride"):
            session.segment(image, mode="slide")

    @pytest.mark.parametrize("options", [{"fit": "crop"}, {"mode": "tiles"}])
    def test_unknown_options(self, session: Session, image, options) -> None:
        with pytest.raises(ImageError, match=r"crop|tiles"):
            session.segment(image, **options)

    def test_not_an_image(self, session: Session) -> None:
        with pytest.raises(ImageError, match="read_image"):
            session.segment([[1, 2], [3, 4]])

    @pytest.mark.parametrize("mode", ["whole", "slide"])
    def test_one_output_labels_by_its_threshold(self, tmp_path: Path, image, mode) -> None:
        test = TestMode(crop_size=(32, 48), stride=(20, 30))
        shares = []
        for number, threshold in enumerate((0.01, 0.5, 0.99)):
            arch = toy.architecture(2, threshold=threshold, test=test)
            path = toy.make_bundle(tmp_path / str(number), arch=arch).path
            with open_session(path) as session:
                assert session.run(inputs(1)).shape == (1, 1, 8, 12)
                found = session.segment(image, mode=mode)
            assert set(np.unique(found.labels)) <= {0, 1}
            assert len(found.classes) == len(found.palette) == 2
            shares.append(found.labels.mean())
        assert shares[0] > shares[1] > shares[2]

    def test_one_output_of_an_older_bundle_has_mmsegmentations_threshold(
        self, tmp_path: Path, image
    ) -> None:
        path = toy.make_bundle(tmp_path / "b", arch=toy.architecture(1)).path / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["architecture"]["decode_head"]["threshold"]
        path.write_text(json.dumps(manifest))
        with open_session(path.parent) as session:
            found = session.segment(image)
            prepared = session.segmentation.prepare(image)
            logits = session.run(prepared.inputs["images"][None])[0]
        assert found.classes == ("background", "class 0")
        expected = logits_of(view_of(logits, prepared, align_corners=False))
        assert np.array_equal(found.labels, expected[0] > np.log(0.3 / 0.7))

    def test_names_and_colours_where_there_are_none(self, tmp_path: Path, image) -> None:
        toy.make_bundle(tmp_path / "b", arch=toy.architecture(300, named=False))
        with open_session(tmp_path / "b") as session:
            found = session.segment(image)
        assert found.classes[299] == "class 299"
        assert len(found.palette) == 300
        assert found.labels.dtype == np.uint16
        assert found.overlay(image).shape == image.shape


class TestModule:
    def test_run_raw(self, tmp_path: Path) -> None:
        toy.make_module_bundle(tmp_path / "m")
        a, b = (np.full((2, 3), v, np.float32) for v in (2, 5))
        with open_session(tmp_path / "m") as session:
            session.warm_up()
            found = session.run_raw({"a": a, "b": b})
            assert np.array_equal(found["total"], a + b)
            assert np.array_equal(found["product"], a * b)
            for bad in ({"a": a}, {"a": a, "b": b[:1]}, {"a": a, "b": b.astype(np.float64)}):
                with pytest.raises(BackendError, match="No graph of this bundle"):
                    session.run_raw(bad)

    def test_does_not_segment(self, tmp_path: Path, image: np.ndarray) -> None:
        toy.make_module_bundle(tmp_path / "m")
        with open_session(tmp_path / "m") as session:
            for use in (
                lambda: session.segment(image),
                lambda: session.run(inputs(1)),
                lambda: session.classes,
            ):
                with pytest.raises(BundleError, match="does not segment"):
                    use()

    def test_a_segmentors_batch_is_told_by_its_shape(self, session: Session) -> None:
        for count in (1, 4):
            found = session.run_raw({"images": inputs(count)})["logits"]
            assert np.array_equal(found, session.run(inputs(count)))


class TestLife:
    def test_closed(self, toy_bundle: Path, image: np.ndarray) -> None:
        session = open_session(toy_bundle)
        session.warm_up()
        graph = weakref.ref(session.runner._graphs.get(1))
        assert not session.closed
        session.close()
        session.close()
        assert session.closed
        gc.collect()
        assert graph() is None
        with pytest.raises(BackendError, match="closed"):
            session.segment(image)
        with pytest.raises(BackendError, match="closed"):
            session.run(inputs(1))

    def test_warm_up_loads_everything(self, toy_bundle: Path) -> None:
        backend = FakeBackend(toy.reference_logits)
        session = toy.session(Bundle.open(toy_bundle), backend)
        assert session.warm_up() > 0
        assert backend.loads == backend.runs[:2] == [1, 4]
        with pytest.raises(BackendError, match="no graph of batch 3"):
            session.warm_up([3])

    def test_after_warm_up_nothing_is_left_to_do_once(self, toy_bundle: Path, image) -> None:
        backend = FakeBackend(toy.reference_logits)
        session = toy.session(Bundle.open(toy_bundle), backend)
        assert session.runner.loaded_batch_sizes == ()
        session.warm_up([4])
        assert session.runner.loaded_batch_sizes == (4,)
        session.warm_up()
        assert session.runner.loaded_batch_sizes == (1, 4)
        loads = list(backend.loads)
        session.segment(image)
        session.run(inputs(5))
        assert backend.loads == loads

    def test_no_run_takes_a_second_arena_block(self, toy_bundle: Path) -> None:
        """A memory pattern would, at the second run (benchmarks.session --variants measures it).

        Resident memory tells it too, but only as far as the C library gives back what is free.
        """
        with open_session(toy_bundle) as session:
            session.warm_up([1])
            options = session.runner._graphs.get(1)._session.get_session_options()
        assert not options.enable_mem_pattern

    def test_a_loading_graph_does_not_hold_up_another(self, toy_bundle: Path) -> None:
        backend = FakeBackend(toy.reference_logits)
        session = toy.session(Bundle.open(toy_bundle), backend)
        session.run(inputs(1))
        loading, go_on = threading.Event(), threading.Event()

        def slow_load(bundle: Bundle, batch: int) -> FakeBackend:
            loading.set()
            assert go_on.wait(60)
            return backend

        backend.load = slow_load  # type: ignore[method-assign]
        other = threading.Thread(target=session.run, args=(inputs(4),))
        other.start()
        assert loading.wait(60)
        session.run(inputs(1))  # would wait for ever behind a common lock
        go_on.set()
        other.join(60)
        assert not other.is_alive()

    def test_memory_does_not_grow(self, session: Session, image: np.ndarray) -> None:
        process = psutil.Process()
        for _ in range(50):
            session.segment(image)
        before = process.memory_info().rss
        for _ in range(400):
            session.segment(image)
            session.run(inputs(5))
        assert process.memory_info().rss - before < 8e6


class TestBackends:
    def test_choice_is_said(self, session: Session, toy_bundle: Path) -> None:
        assert session.backend in backends_module.BACKENDS
        assert session.backend in session.choice
        with open_session(toy_bundle, "onnxruntime-cpu") as asked:
            assert asked.choice == "onnxruntime-cpu was asked for."

    def test_unknown(self, toy_bundle: Path) -> None:
        with pytest.raises(
            BackendError, match=r"there are auto, .*onnxruntime-cuda, onnxruntime-cpu"
        ):
            open_session(toy_bundle, "openvino-int4")

    @pytest.mark.parametrize("name", ["auto", "onnxruntime-cpu"])
    def test_not_installed(self, toy_bundle, monkeypatch, name: str) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(BackendError, match=r"pip install 'onnxruntime>="):
            open_session(toy_bundle, name)

    def test_cuda_without_it(self, toy_bundle: Path, monkeypatch) -> None:
        import onnxruntime

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [ort_module.CPU])
        with pytest.raises(BackendError, match=r"pip install 'onnxruntime-gpu(\[cuda,cudnn\])?>="):
            open_session(toy_bundle, "onnxruntime-cuda")

    def test_cuda_listed_but_not_starting(self, toy_bundle: Path, monkeypatch, image) -> None:
        """As onnxruntime-gpu behaves without a GPU: listed, then silently on the CPU."""
        import onnxruntime

        if ort_module.CUDA in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime-gpu is installed")
        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda: [ort_module.CUDA, ort_module.CPU]
        )
        real = onnxruntime.InferenceSession
        monkeypatch.setattr(
            onnxruntime,
            "InferenceSession",
            lambda path, options, providers: real(path, options, providers=[ort_module.CPU]),
        )
        with (
            open_session(toy_bundle, "onnxruntime-cuda") as session,
            pytest.raises(BackendError, match="could not start CUDAExecutionProvider"),
        ):
            session.segment(image)
        with open_session(toy_bundle) as session:
            assert session.backend == "onnxruntime-cpu"
            assert "CUDA did not run" in session.choice
            session.segment(image)

    def test_providers_are_passed_on(self, toy_bundle: Path, image: np.ndarray) -> None:
        with open_session(toy_bundle, providers=["CPUExecutionProvider"]) as session:
            assert session.segment(image).labels.shape == (50, 70)
        for bad, says in ((["NoSuchProvider"], "NoSuchProvider"), ([], "empty list")):
            with pytest.raises(BackendError, match=says):
                open_session(toy_bundle, providers=bad)

    def test_threads(self, toy_bundle: Path) -> None:
        with pytest.raises(BackendError, match="1 thread or more"):
            open_session(toy_bundle, threads=0)

    def test_graph_that_onnxruntime_refuses(self, bundle_copy: Path, image: np.ndarray) -> None:
        file = bundle_copy / "model.b1.onnx"
        model = onnx.load(str(file), load_external_data=False)
        model.graph.node[0].op_type = "NoSuchOperator"
        file.write_bytes(model.SerializeToString())
        relist(bundle_copy, "model.b1.onnx")
        with (
            open_session(bundle_copy) as session,
            pytest.raises(BackendError, match=r"cannot load 'model\.b1\.onnx'") as caught,
        ):
            session.segment(image)
        assert "\n" not in str(caught.value)

    def test_graph_that_is_not_the_manifests(self, bundle_copy: Path, image: np.ndarray) -> None:
        edit(bundle_copy, lambda m: m["outputs"]["1"][0].update(shape=[1, 5, 9, 12]))
        with (
            open_session(bundle_copy) as session,
            pytest.raises(BackendError, match="the bundle's manifest says"),
        ):
            session.segment(image)


def test_changed_bytes_do_not_open(bundle_copy: Path) -> None:
    weights = bundle_copy / "weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(BundleError, match="sha256"):
        open_session(bundle_copy)
    assert sha256_of(weights) not in (bundle_copy / "manifest.json").read_text()
    with open_session(bundle_copy, verify=False) as session:  # asked for, so it is done
        assert session.run(inputs(1)).shape == (1, 5, 8, 12)
