"""Models of a Triton model repository: the files, and the real server on them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks.serving.triton.server import REQUIREMENTS, tritonserver
from fdconv_deploy.config import TestMode
from fdconv_deploy.errors import BundleError, ExportError
from fdconv_deploy.export import export_triton
from fdconv_deploy.runtime import Bundle, open_session
from fdconv_deploy.sample_images import sample_feeds
from tests.runtime import toy, toy_detector, toy_panoptic

http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Bundle]:
    """A segmentor, one that slides, one with 300 classes, a panoptic one, a detector."""
    folder = tmp_path_factory.mktemp("triton")
    test = TestMode(mode="slide", crop_size=(32, 48), stride=(20, 30))
    return {
        "street": toy.make_bundle(folder / "street"),
        "sliding": toy.make_bundle(folder / "sliding", arch=toy.architecture(test=test)),
        "many": toy.make_bundle(folder / "many", arch=toy.architecture(300)),
        "parts": toy_panoptic.make_bundle(folder / "parts"),
        "things": toy_detector.make_bundle(folder / "things"),
    }


def config_of(folder: Path):
    """config.pbtxt as Triton's own schema reads it, which knows every field's name and type."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def tensors(described) -> list[tuple[str, int, list[int]]]:
    return [(t.name, t.data_type, list(t.dims)) for t in described]


def test_python_model_is_the_whole_bundle(bundles, tmp_path):
    (folder,) = export_triton(bundles["street"], tmp_path / "models")
    assert folder == tmp_path / "models" / "street"
    assert Bundle.open(folder / "1" / "bundle").digest == bundles["street"].digest
    config = config_of(folder)
    assert (config.name, config.backend, config.max_batch_size) == ("street", "python", 16)
    assert list(config.dynamic_batching.preferred_batch_size) == [1, 4]
    uint8 = config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name["TYPE_UINT8"]
    assert tensors(config.input) == [("images", uint8.number, [-1, -1, 3])]
    assert tensors(config.output) == [("labels", uint8.number, [-1, -1])]
    assert (folder / "1" / "model.py").is_file()


def test_python_model_of_a_detector_answers_as_its_graph(bundles, tmp_path):
    (folder,) = export_triton(bundles["things"], tmp_path)
    specs = bundles["things"].manifest.outputs[1]
    found = [(tensor.name, tuple(tensor.dims)) for tensor in config_of(folder).output]
    # Triton knows no single number per image: it is a row of one.
    assert found == [(spec.name, spec.shape[1:] or (1,)) for spec in specs]


def test_onnxruntime_models_are_the_graphs(tmp_path):
    arch = toy.architecture(19)
    bundle = toy.make_bundle(tmp_path / "sizes", arch=arch, other_sizes=((48, 32),))
    folders = export_triton(bundle, tmp_path / "models", name="net", backend="onnxruntime")
    manifest = bundle.manifest
    assert [folder.name for folder in folders] == [
        f"net_{height}x{width}_b{batch}"
        for height, width in manifest.sizes
        for batch in bundle.batch_sizes
    ]
    for folder, size in zip(folders, np.repeat(manifest.sizes, 2, axis=0).tolist(), strict=True):
        config = config_of(folder)
        assert (config.name, config.backend, config.max_batch_size) == (
            folder.name,
            "onnxruntime",
            0,
        )
        model = onnx.load(folder / "1" / "model.onnx", load_external_data=False)
        assert not model.functions
        assert {node.domain for node in model.graph.node} == {""}
        kept = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert {
            entry.value for t in kept for entry in t.external_data if entry.key == "location"
        } == {"weights.bin"}
        for name in ("model.onnx", "weights.bin"):
            assert (folder / "1" / name).stat().st_mode & 0o444 == 0o444
        session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
        (given,), (answer,) = session.get_inputs(), session.get_outputs()
        assert given.shape == list(config.input[0].dims)
        assert given.shape[2:] == size
        assert answer.shape == list(config.output[0].dims)
        view = bundle.at(tuple(size))
        feeds = sample_feeds(view.manifest.inputs[given.shape[0]])
        with open_session(view, native=False, threads=1) as ours:
            expected = ours.run_raw(feeds)["logits"]
        found = session.run(None, feeds)[0]
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_chosen_graphs_and_modules(bundles, exported_module, tmp_path):
    fields = {"name": "net", "backend": "onnxruntime"}
    (folder,) = export_triton(bundles["street"], tmp_path, batches=[4], **fields)
    assert folder.name == "net"
    with pytest.raises(ExportError, match="no graph of batch size 3; it has 1, 4"):
        export_triton(bundles["street"], tmp_path, batches=[3], **fields)
    with pytest.raises(ExportError, match="takes images, and the bundle is of a module"):
        export_triton(exported_module.bundle, tmp_path, name="module")
    fields["name"] = "module"
    assert export_triton(exported_module.bundle, tmp_path, **fields)


@pytest.mark.parametrize("name", ["streets/night", "..", "", "a b", "ü", "a" * 101, "a\n"])
def test_name_that_no_model_can_have_is_refused(bundles, name, tmp_path):
    with pytest.raises(ExportError, match="A Triton model's name is that of its folder"):
        export_triton(bundles["street"], tmp_path / "models", name=name)
    assert not (tmp_path / "models").exists()


def test_repository_keeps_other_models_and_files(bundles, tmp_path):
    models = tmp_path / "models"
    export_triton(bundles["street"], models, name="a")
    export_triton(bundles["many"], models, name="b")
    with pytest.raises(ExportError, match="exists already"):
        export_triton(bundles["many"], models, name="a")
    export_triton(bundles["many"], models, name="a", overwrite=True)
    assert Bundle.open(models / "a/1/bundle").digest == bundles["many"].digest
    (models / "notes").mkdir()
    (models / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="no Triton model, so it is left alone"):
        export_triton(bundles["many"], models, name="notes", overwrite=True)
    with pytest.raises(ExportError, match="a bundle or one model"):
        export_triton(bundles["many"], models / "a")
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "notes"]


def test_changed_bundle_is_not_copied(bundles, tmp_path):
    shutil.copytree(bundles["street"].path, tmp_path / "street")
    bundle = Bundle.open(tmp_path / "street", hold=True)
    (tmp_path / "street" / "weights.bin").write_bytes(
        bytes((tmp_path / "street" / "weights.bin").stat().st_size)
    )
    with pytest.raises(BundleError):
        export_triton(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.fixture(scope="module")
def environment() -> Path:
    found = Path(os.environ.get("FDCONV_TRITON", "environment-of-triton"))
    done = found / "installed"
    if not done.is_file() or done.read_text() != REQUIREMENTS.read_text():
        pytest.skip(
            "no Triton server: python -m benchmarks.serving.triton install --environment FOLDER, "
            "and set FDCONV_TRITON to that folder"
        )
    return found.resolve()


@pytest.fixture(scope="module")
def served(environment, bundles, tmp_path_factory):
    """The real tritonserver on the Python backend's models of all bundles."""
    folder = tmp_path_factory.mktemp("served")
    for bundle in bundles.values():
        export_triton(bundle, folder / "models")
    with tritonserver(environment, folder / "models", folder / "log") as found:
        yield found


@pytest.fixture(params=["http", "grpc"])
def client(request, served):
    server, address = served
    module: ModuleType = http if request.param == "http" else grpc
    client = module.InferenceServerClient(
        server.url.removeprefix("http://") if request.param == "http" else address
    )
    client.module = module
    yield client
    client.close()


def given(client, array: np.ndarray):
    tensor = client.module.InferInput("images", array.shape, "UINT8")
    tensor.set_data_from_numpy(array)
    return [tensor]


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, shape, np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["street", "sliding", "many"])
@pytest.mark.parametrize("shape", [(1, 32, 48, 3), (1, 50, 70, 3), (3, 40, 33, 3), (16, 8, 9, 3)])
def test_real_triton_gives_the_sessions_masks(client, bundles, name, shape):
    images = pictures(*shape)
    found = client.infer(name, given(client, images)).as_numpy("labels")
    with open_session(bundles[name], threads=1) as session:
        expected = np.stack([session.segment(image).labels for image in images])
    assert found.dtype == expected.dtype == (np.uint16 if name == "many" else np.uint8)
    assert np.array_equal(found, expected)


@pytest.mark.slow
def test_real_triton_gives_the_sessions_segments(client, bundles):
    images = pictures(2, 50, 70, 3)
    answer = client.infer("parts", given(client, images))
    with open_session(bundles["parts"], threads=1) as session:
        expected = [session.segment(image) for image in images]
    for name in ("labels", "ids"):
        assert np.array_equal(answer.as_numpy(name), [getattr(one, name) for one in expected])


@pytest.mark.slow
def test_real_triton_gives_the_sessions_objects(client, bundles):
    images = pictures(3, 50, 70, 3)
    answer = client.infer("things", given(client, images))
    with open_session(bundles["things"], threads=1) as session:
        expected = [session.detect(image) for image in images]
    assert answer.as_numpy("count").tolist() == [[len(one)] for one in expected]
    for number, one in enumerate(expected):
        row = {name: answer.as_numpy(name)[number] for name in ("boxes", "scores", "labels")}
        row["mask_probabilities"] = answer.as_numpy("masks")[number]
        for name, values in row.items():
            assert np.array_equal(values[: len(one)], getattr(one, name))
            assert not values[len(one) :].any()


@pytest.mark.slow
def test_real_triton_batches_images_of_different_sizes(served, bundles):
    """Requests in flight together are run together, and each answered with its own."""
    server, _ = served
    client = http.InferenceServerClient(server.url.removeprefix("http://"), concurrency=8)
    client.module = http
    images = [pictures(1, 20 + number, 30 + number, 3) for number in range(40)]
    answers = [client.async_infer("street", given(client, image)) for image in images]
    found = [answer.get_result().as_numpy("labels") for answer in answers]
    statistics = client.get_inference_statistics("street")["model_stats"][0]
    client.close()
    with open_session(bundles["street"], threads=1) as session:
        for image, labels in zip(images, found, strict=True):
            assert np.array_equal(labels[0], session.segment(image[0]).labels)
    assert max(batch["batch_size"] for batch in statistics["batch_stats"]) > 1
    assert statistics["inference_stats"]["fail"]["count"] == 0


@pytest.mark.slow
def test_real_triton_answers_a_bad_image_with_a_sentence(client):
    """Beside good ones, which are answered: an image of no pixels."""
    with pytest.raises(Exception, match="image"):
        client.infer("street", given(client, pictures(1, 0, 5, 3)))
    assert client.is_model_ready("street")
    assert client.infer("street", given(client, pictures(1, 4, 5, 3))).as_numpy("labels").any()


@pytest.mark.slow
def test_real_triton_does_not_load_a_model_that_numpy_2_garbles(environment, bundles, tmp_path):
    if int(np.__version__.split(".")[0]) < 2:
        pytest.skip("needs NumPy 2 in this environment")
    import sys

    export_triton(bundles["street"], tmp_path / "models")
    with (
        pytest.raises(SystemExit),
        tritonserver(environment, tmp_path / "models", tmp_path / "log", python=Path(sys.prefix)),
    ):
        pass
    assert "tensors arrive garbled. Install" in (tmp_path / "log").read_text()
