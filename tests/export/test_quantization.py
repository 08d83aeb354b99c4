"""Eight-bit exports: where the Q/DQ pairs are, what they cost, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from examples.streets.scenes import draw_scene
from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.demo import held_out, packaged_checkpoint
from fdconv_deploy.errors import ExportError
from fdconv_deploy.evaluation.datasets import read_mask
from fdconv_deploy.evaluation.metrics import confusion_matrix, scores
from fdconv_deploy.export.api import export_module, export_network
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.runtime import open_session
from fdconv_deploy.runtime.bundle import Bundle
from tests.export.graphs import relative, run_file
from tests.reference.networks import small_segmentor

SIZE = (96, 128)


@pytest.fixture(scope="module")
def streets() -> Segmentor:
    return load_checkpoint(packaged_checkpoint())


@pytest.fixture(scope="module")
def quantized(streets, tmp_path_factory) -> Bundle:
    return export_network(
        streets,
        tmp_path_factory.mktemp("int8") / "bundle",
        size=SIZE,
        batches=(1, 2),
        precision="int8",
        calibration=[draw_scene(seed)[0] for seed in range(6)],
    )


def graph_of(bundle: Bundle, batch: int = 1) -> onnx.GraphProto:
    return onnx.load(bundle.model_path(batch)).graph


def dequantized_convolutions(graph: onnx.GraphProto) -> list[str]:
    """Weights of convolutions both of whose inputs come from eight bits."""
    made = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type == "Conv":
            sources = [made[n].op_type if n in made else "" for n in node.input[:2]]
            if sources == ["DequantizeLinear"] * 2:
                found.append(made[node.input[1]].input[0])
            else:
                assert made.get(node.input[1]) is None or sources[1] != "DequantizeLinear"
    return found


def test_plain_convolutions_but_the_first_and_the_last(quantized):
    names = dequantized_convolutions(graph_of(quantized))
    modules = quantized.manifest.graph["precision"]["quantized"]
    assert sorted(names) == sorted(f"{module}.weight_quantized" for module in modules)
    assert {"decode_head.fpn_bottleneck.conv", "backbone.layer1.0.conv2"} < set(modules)
    # The image's, the answer's, FDConv's, and one too small to save anything.
    kept = ("backbone.conv1", "decode_head.conv_seg", "backbone.layer3.0.conv2")
    assert not {*kept, "decode_head.psp_modules.0.1.conv"} & set(modules)


def test_weights_are_within_half_a_step(quantized, streets):
    tensors = {t.name: numpy_helper.to_array(t) for t in graph_of(quantized).initializer}
    name = "decode_head.fpn_bottleneck.conv"
    conv = streets.get_submodule(name)
    norm = streets.get_submodule("decode_head.fpn_bottleneck.bn")
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    exact = (conv.weight.detach() * gain[:, None, None, None]).numpy()
    scale = tensors[f"{name}.weight_scale"]
    steps = tensors[f"{name}.weight_quantized"]
    assert steps.dtype == np.int8
    assert scale.shape == (len(exact),)
    assert np.abs(steps).reshape(len(exact), -1).max(1).tolist() == [127] * len(exact)
    error = np.abs(steps * scale[:, None, None, None] - exact)
    assert (error <= 0.501 * scale[:, None, None, None]).all()


def test_onnxruntime_computes_them_in_integers(quantized, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(quantized.model_path(1)), options)
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    ran = [node.op_type for node in optimized.graph.node]
    assert ran.count("QLinearConv") == len(quantized.manifest.graph["precision"]["quantized"])


def test_report(quantized):
    manifest = quantized.manifest
    assert manifest.precision == "int8"
    report = manifest.graph["precision"]
    assert report["calibration_images"] == 6
    assert manifest.parity.batches[1][0].argmax_agreement > 0.9


@torch.no_grad()
def test_int8_answers_agree_with_float32_on_held_out_scenes(streets, quantized):
    confusions = np.zeros((2, 11, 11), np.int64)
    same = []
    with open_session(quantized.path) as session:
        for image, mask in held_out()[:4]:
            prepared = session.segmentation.prepare(session.read_image(image))
            x = prepared.inputs["images"][None]
            labels = [
                session.segmentation.finish(prepared, {"logits": logits}).labels
                for logits in (streets(torch.from_numpy(x)).numpy()[0], session.run(x)[0])
            ]
            same.append((labels[0] == labels[1]).mean())
            for confusion, answer in zip(confusions, labels, strict=True):
                confusion += confusion_matrix(read_mask(mask), answer, 11)
    assert np.mean(same) > 0.93
    single, reduced = (scores(confusion).mean_iou for confusion in confusions)
    assert single > 0.4
    assert reduced > single - 0.05


def test_all_batch_sizes_have_the_same_ranges(quantized):
    def steps(batch: int) -> dict[str, float]:
        tensors = graph_of(quantized, batch).initializer
        return {
            t.name: float(numpy_helper.to_array(t))
            for t in tensors
            if t.name.endswith("_scale") and not t.dims
        }

    assert len(steps(1)) > 20
    assert steps(1) == steps(2)


def small(folder: Path, **options) -> Bundle:
    scenes = [draw_scene(seed, 64, 96)[0] for seed in range(2)]
    chosen = {"calibration": scenes, "tolerance": 1.0, "precision": "int8"} | options
    network = small_segmentor(50, 20, stages=1, seed=3)
    return export_network(network, folder / "bundle", size=(64, 96), **chosen)


def test_signed_activations_are_as_tensorrt_takes_them(tmp_path):
    graph = graph_of(small(tmp_path, activations="signed"))
    tensors = {t.name: t for t in graph.initializer}
    zeros = {n.input[2] for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for name in zeros:
        assert tensors[name].data_type == TensorProto.INT8
        assert not numpy_helper.to_array(tensors[name]).any()


def test_a_kept_module_stays_float32(tmp_path):
    made = small(tmp_path, keep_fp32=["decode_head.psp_modules", "decode_head.bottleneck"])
    modules = made.manifest.graph["precision"]["quantized"]
    assert "decode_head.fpn_bottleneck.conv" in modules
    assert not [m for m in modules if m.startswith(("decode_head.psp", "decode_head.bott"))]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"calibration": []}, "int8 needs images"),
        ({"keep_fp32": ["*"]}, "no plain convolution"),
        ({"keep_fp32": ["nick"]}, "'nick' names no module"),
        ({"precision": "fp16"}, "calibration images are for int8"),
        ({"precision": "fp8"}, "fp32, fp16 or int8, not 'fp8'"),
        ({"activations": "both"}, "unsigned or signed, not 'both'"),
        (
            {"tolerance": 0.0},
            r"network, 0.0% is allowed. Calibrate on.*Nothing was kept",
        ),
    ],
)
def test_refusals(tmp_path, options, hint):
    with pytest.raises(ExportError, match=hint):
        small(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_modules(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
    ).eval()
    inputs = [torch.randn(3, 3, 16, 16), torch.randn(1, 3, 16, 16)]
    example = torch.randn(1, 3, 16, 16)
    made = export_module(module, example, tmp_path / "bundle", precision="int8", calibration=inputs)
    assert made.manifest.graph["precision"]["calibration_images"] == 4
    assert made.manifest.graph["precision"]["quantized"] == ["2"]
    (found,) = run_file(made.model_path(1), example.numpy())
    assert 1e-4 < relative(found, module(example).detach().numpy()) < 0.05
    with pytest.raises(ExportError, match=r"float32 of the example's shape.*\(2, 3, 9, 9\)"):
        export_module(
            module, example, tmp_path / "x", precision="int8", calibration=[torch.zeros(2, 3, 9, 9)]
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_calibration_refuses_what_is_not_finite(tmp_path, value):
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1)).eval()
    for conv in module:
        nn.init.constant_(conv.weight, 9.0)
    images = torch.ones(2, 1, 4, 4)
    images[1, 0, 0, 0] = value
    with pytest.raises(ExportError, match=r"cannot be learned from the calibration images.*finite"):
        export_module(
            module, images[:1], tmp_path / "bundle", precision="int8", calibration=[images]
        )
    assert list(tmp_path.iterdir()) == []


def test_calibration_leaves_far_values_out(tmp_path):
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)).eval()
    for conv in module:
        nn.init.ones_(conv.weight)
        nn.init.zeros_(conv.bias)
    images = torch.linspace(-1, 1, 200_000).reshape(2, 1, 1000, 100)
    images[0, 0, 0, :3] = 50.0
    for name, calibration in (("far", images), ("zero", torch.zeros(1, 1, 1000, 100))):
        made = export_module(
            module, images[:1], tmp_path / name, precision="int8", calibration=[calibration],
            activations="signed", tolerance=1e9,
        )  # fmt: skip
        tensors = {t.name: numpy_helper.to_array(t) for t in graph_of(made).initializer}
        scales = [float(v) for n, v in tensors.items() if n.endswith("_scale") and not v.shape]
        assert scales == [pytest.approx(1 / 127 if name == "far" else 1.0, rel=0.05)]
