"""Reports count what the published code has, and say what is in a file."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from fdconv_deploy.checkpoints import inspect_checkpoint
from fdconv_deploy.checkpoints.config_parser import parse_config
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.checkpoints.inspect import Report, render, report_on
from fdconv_deploy.config import FCNHeadConfig, FDConvConfig, SegmentorConfig
from fdconv_deploy.nn import Segmentor
from tests.checkpoints.small import head_config, key_list, shapes_of, small_architecture, weights_of


def printed(report: Report, **options: Any) -> str:
    out = StringIO()
    render(report, Console(file=out, width=120), **options)
    return out.getvalue()


@pytest.mark.parametrize("depth", [18, 50])
def test_parameters_and_buffers_of_backbones(oracle: Path, depth: int) -> None:
    folder = oracle / "backbone"
    counts = json.loads((folder / "param_counts.json").read_text())[str(depth)]
    report = report_on(key_list(folder / f"resnet{depth}_fdconv_kn64_keys.json"))
    assert report.kind == "backbone"
    assert report.parameters == {
        "backbone": counts["params_fdconv"],
        "total": counts["params_fdconv"],
    }
    assert report.fdconv_parameters == counts["by_part"]
    assert report.dynamic_layers == counts["n_fdconv_layers"]
    assert report.published_buffer_bytes == round(counts["nonpersistent_buffer_MB"] * 1e6)
    assert report.spectrum_bytes == 4 * counts["by_part"]["dft_weight"]
    plain = report_on(key_list(folder / f"resnet{depth}_plain_keys.json"))
    assert plain.parameters["total"] == counts["params_plain"]
    assert (plain.dynamic_layers, plain.published_buffer_bytes) == (0, 0)


@pytest.mark.parametrize("size", ["512x512", "800x1280", "512x1024"])
def test_multiply_adds_of_resnet50(oracle: Path, size: str) -> None:
    reference = json.loads((oracle / "backbone" / "flops.json").read_text())[size]
    height, width = map(int, size.split("x"))
    keys = key_list(oracle / "backbone" / "resnet50_fdconv_kn64_keys.json")
    report = report_on(keys, size=(height, width))
    assert report.macs is not None
    for part, giga in reference["fdconv_conv_GMACs"].items():
        assert report.macs[part] == round(giga * 1e9)
    assert report.macs["total"] == round(reference["flopcounter_GMACs_fdconv"] * 1e9)
    assert report.macs["total"] == sum(layer.macs or 0 for layer in report.layers)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("r50_fdconv_kn64", "upernet_r50_fdconv_kn64_c150"),
        ("r50_fdconv_deepstem_kn64_cgt32", "upernet_r50_fdconv_deepstem_kn64_cgt32_c150"),
        ("r50_fdconv_deepstem_kn32", "upernet_r50_fdconv_deepstem_kn32_c150"),
        ("r50_plain", "upernet_r50_plain_c150"),
        ("r50_plain_deepstem", "upernet_r50_plain_deepstem_c150"),
    ],
)
def test_parameters_of_segmentors(oracle: Path, name: str, keys: str) -> None:
    folder = oracle / "segmentor"
    counts = json.loads((folder / "upernet_param_counts.json").read_text())[name]
    report = report_on(key_list(folder / f"{keys}_keys.json"))
    parts = ("backbone", "decode_head", "auxiliary_head", "total")
    assert report.parameters == {part: counts[part] for part in parts}
    assert report.tensors == counts["n_keys"]
    assert (report.kind, report.problem) == ("segmentor", None)


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn"])
@pytest.mark.parametrize("fdconv", [True, False])
def test_parameters_of_detectors(oracle: Path, name: str, fdconv: bool) -> None:
    folder = oracle / "mmdet"
    which = "fdconv_kn64" if fdconv else "plain"
    counts = json.loads((folder / "param_counts.json").read_text())[f"{name}_{which}"]
    suffix = "_keys_mmdet2.28.1" if fdconv else "_keys"
    report = report_on(key_list(folder / f"{name}_r50_fpn_{which}_c80{suffix}.json"))
    assert report.parameters["total"] == counts["params"]
    assert report.parameters["backbone"] == counts["backbone"]
    assert report.tensors == counts["n_keys"]
    assert (report.kind, report.problem, report.architecture) == ("detector", None, None)
    assert report.detector is not None
    assert (report.detector.mask_head is not None) == (name == "mask_rcnn")
    assert report.backbone == report.detector.backbone
    assert report.dynamic_layers == (48 if fdconv else 0)
    assert "test.rcnn.score_thr" in printed(report)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"depth": 50, "style": "caffe"},
        {"depth": 50, "deep_stem": True, "stem_channels": 40, "avg_down": True},
        {"depth": 50, "strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)},
        {"conv": FDConvConfig(ksm_only_kernel_att=True, param_ratio=2)},
        {"conv": None},
    ],
)
def test_multiply_adds_equal_a_counted_run(fields: dict[str, Any]) -> None:
    """The count without a run equals torch's count of a run, heads included."""
    architecture = small_architecture(**fields)
    if "conv" not in fields:
        head = FCNHeadConfig(
            in_channels=architecture.decode_head.in_channels[-1:],
            in_index=(3,),
            channels=8,
            num_classes=3,
        )
        architecture = architecture.model_copy(update={"decode_head": head})
    assert_counted(architecture)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"type": "PSPHead", "pool_scales": (1, 5)},
        {"type": "ASPPHead"},
        {"type": "DepthwiseSeparableASPPHead", "dilations": (1, 3)},
        {"type": "DepthwiseSeparableASPPHead", "c1_in_channels": 8, "c1_channels": 5},
    ],
)
def test_multiply_adds_of_each_head_equal_a_counted_run(
    fields: dict[str, Any], joined: bool
) -> None:
    index = (2, 0) if joined else (3,)
    architecture = small_architecture(conv=None)
    widths = architecture.decode_head.in_channels
    head = head_config(
        in_channels=tuple(widths[i] for i in index),
        in_index=index,
        input_transform="resize_concat" if joined else None,
        channels=8,
        num_classes=3,
        **fields,
    )
    assert_counted(architecture.model_copy(update={"decode_head": head}))


def assert_counted(architecture: SegmentorConfig) -> None:
    """The report's total is what torch counts when the network runs."""
    network = Segmentor(architecture).eval()
    size = (75, 98)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, *size))
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    linear = sum(
        count
        for operator, count in counter.get_flop_counts()["Global"].items()
        if operator is not torch.ops.aten.convolution
    )
    config = parse_config(format_config(architecture))
    report = report_on(dict(network.state_dict()), config=config, size=size)
    assert report.macs is not None
    assert 2 * report.macs["total"] == convolutions + linear


def test_macs_of_a_network_with_attention() -> None:
    """All of it by part; of a ResNet's part, those that a head of convolutions leaves it."""
    size = (64, 96)
    head = {"type": "Mask2FormerHead", "channels": 32, "hidden_channels": 32, "mask_channels": 32}
    queries = small_architecture(head={**head, "num_queries": 6}, conv=None)
    report = report_on(shapes_of(queries), size=size)
    plain = report_on(shapes_of(small_architecture(conv=None)), size=size)
    assert report.problem is None
    assert report.macs is not None
    assert plain.macs is not None
    assert report.macs["backbone"] == plain.macs["main"]
    assert report.macs["decode_head"] > 0
    # What is left joins queries' classes and masks: 3 classes, 6 queries.
    rest = report.macs["total"] - report.macs["backbone"] - report.macs["decode_head"]
    assert rest == 3 * 6 * size[0] * size[1]
    assert "GMAC at 64×96" in printed(report)


def test_report_on_a_file(oracle: Path) -> None:
    report = inspect_checkpoint(oracle / "segmentor" / "B_r18b14_mmcv1.pth", size=(128, 160))
    assert (report.format, report.kind, report.dynamic_layers) == ("mmcv 1.x", "segmentor", 11)
    index = json.loads((oracle / "segmentor" / "index.json").read_text())
    assert report.parameters["total"] == index["models"]["B"]["info"]["n_params"]
    assert report.architecture is not None
    again = Report.model_validate_json(report.model_dump_json())
    assert again.parameters == report.parameters
    assert again.architecture == report.architecture
    text = printed(report, layers=True)
    for expected in (
        "11 FDConv layers",
        "mmcv 1.x",
        "Found in the file or given",
        "Assumed",
        "685,338",
        "layer4.1.conv2",
    ):
        assert expected in text
    assert "layer4.1.conv2" not in printed(report)
    (row,) = [row for row in report.layers if row.name == "backbone.layer2.1.conv1"]
    assert (row.in_channels, row.out_channels, row.kernel, row.kernel_num) == (28, 28, (3, 3), 4)
    assert row.spectrum_bytes == 84 * 43 * 2 * 4


def test_problems_are_reported_and_not_raised(tmp_path: Path) -> None:
    weights = weights_of(small_architecture(auxiliary=True))
    path = tmp_path / "a.pth"
    torch.save({"state_dict": weights, "meta": {"CLASSES": ("a",)}}, path)
    report = inspect_checkpoint(path)
    assert report.problem is not None
    assert "the decode head makes 3 classes" in report.problem
    assert report.architecture is None
    assert report.parameters["decode_head"] > 0
    assert "Not understood" in printed(report)
    told = inspect_checkpoint(path, overrides={"classes": ["a", "b", "c"]})
    assert told.problem is None
    broken = {key: v for key, v in weights.items() if not key.endswith("layer4.1.conv2.dft_weight")}
    assert "does not fit together" in (report_on(broken).problem or "")
    strange = report_on({"blocks.0.weight": torch.ones(2, 2)})
    assert (strange.kind, strange.parameters["total"]) == ("unknown", 4)
    assert "blocks.0.weight" in (strange.problem or "")


def test_classifier_and_names_with_markup() -> None:
    state = shapes_of(small_architecture())
    bare = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    report = report_on(bare | {"fc.weight": torch.ones(10, 64)})
    assert report.kind == "classifier"
    assert report.parameters["fc"] == 640
    assert report.parameters["backbone"] + 640 == report.parameters["total"]
    assert "[red]x.pth" in printed(report.model_copy(update={"path": "[red]x.pth"}))


def test_parameter_reduction_and_ratio_are_counted() -> None:
    conv = FDConvConfig(param_reduction=0.5, param_ratio=2)
    architecture = small_architecture(conv=conv)
    report = report_on(shapes_of(architecture))
    assert report.spectrum_bytes == 4 * report.fdconv_parameters["dft_weight"]
    network = Segmentor(architecture)
    buffers = network.named_buffers(remove_duplicate=False)
    indices = sum(value.nbytes for name, value in buffers if name.endswith(".indices"))
    assert report.published_buffer_bytes == indices + 7 * 3 * 64 * 33
