"""Reports count what the published code has, and say what is in a file."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fdconv_deploy.checkpoints import inspect_checkpoint
from fdconv_deploy.checkpoints.inspect import Report, render, report_on
from fdconv_deploy.config import FDConvConfig
from fdconv_deploy.nn import Segmentor
from tests.checkpoints.small import key_list, shapes_of, small_architecture, weights_of


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


def test_report_on_a_file(oracle: Path) -> None:
    report = inspect_checkpoint(oracle / "segmentor" / "B_r18b14_mmcv1.pth")
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
