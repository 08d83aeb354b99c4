"""Heads with one output, as mmsegmentation 1.2.2 builds them for two classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fdconv_deploy.checkpoints import (
    infer_segmentor_config,
    inspect_checkpoint,
    load_checkpoint,
    parse_config,
    read_checkpoint,
)
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.config import DecodeHeadConfig, UPerHeadConfig
from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.runtime.segmentation import class_names, class_palette
from tests.checkpoints.small import infer, shapes_of, small_architecture, weights_of

TWO = {"num_classes": 2, "out_channels": 1}


def shapes(**head: Any) -> dict[str, torch.Tensor]:
    return shapes_of(small_architecture(head=head))


def told(head: dict[str, Any] | None, **more: Any) -> DecodeHeadConfig:
    model = None if head is None else {"decode_head": head}
    return infer(shapes(**TWO), model, **more).architecture.decode_head


@pytest.mark.parametrize(
    ("fields", "classes", "expected"),
    [
        ("num_classes=2, out_channels=1, threshold=0.3", ("background", "road"), (2, 0.3)),
        ("num_classes=1", ("road",), (1, 0.3)),
        ("num_classes=1, threshold=0.5", ("background", "road"), (1, 0.5)),
    ],
)
def test_packaged_network_with_one_output_is_understood(
    fields: str, classes: tuple[str, ...], expected: tuple[int, float], tmp_path: Path
) -> None:
    packaged = read_checkpoint(packaged_checkpoint())
    content = {"meta": dict(packaged.meta), "state_dict": dict(packaged.state_dict)}
    for head in ("decode_head", "auxiliary_head"):
        for part in ("weight", "bias"):
            key = f"{head}.conv_seg.{part}"
            content["state_dict"][key] = content["state_dict"][key][:1].clone()
    content["meta"]["cfg"] = content["meta"]["cfg"].replace("num_classes=11", fields)
    palette = [[7, 8, 9]] * len(classes)
    content["meta"]["dataset_meta"] = {"classes": classes, "palette": palette}
    path = tmp_path / "binary.pth"
    torch.save(content, path)
    report = inspect_checkpoint(path)
    assert report.problem is None
    assert report.refusal is None
    assert any("has one output: a pixel is 'road' (label 1)" in note for note in report.notes)
    architecture = load_checkpoint(path, auxiliary=True).architecture
    head = architecture.decode_head
    assert (head.num_classes, head.label_threshold) == expected
    assert (head.outputs, head.labels) == (1, 2)
    assert class_names(architecture) == ("background", "road")
    assert class_palette(architecture)[1] == (7, 8, 9)


def test_threshold_is_mmsegmentations_where_there_is_none() -> None:
    for head in (TWO, {**TWO, "threshold": None}, {"num_classes": 1}, None):
        found = told(head)
        assert found.label_threshold == 0.3
        assert found.outputs == 1
    assumed = infer(shapes(**TWO), {"decode_head": TWO}).assumed
    assert ("decode_head.threshold", 0.3) in {(fact.field, fact.value) for fact in assumed}


def test_threshold_may_be_given() -> None:
    assert told({**TWO, "threshold": 0.5}).label_threshold == 0.5
    given = told({**TWO, "threshold": 0.5}, overrides={"decode_head.threshold": 0.9})
    assert given.label_threshold == 0.9


@pytest.mark.parametrize("threshold", [-0.1, 1.5, "half"])
def test_threshold_that_is_no_probability_is_refused(threshold: object) -> None:
    with pytest.raises(CheckpointError, match=r"decode_head\.threshold: the config says"):
        told({**TWO, "threshold": threshold})


def test_classes_of_one_output_are_one_or_two() -> None:
    assert told(None).num_classes == 2
    assert told(None, meta={"dataset_meta": {"classes": ["road"]}}).num_classes == 1
    assert told({}, meta={"dataset_meta": {"classes": ["rest", "road"]}}).num_classes == 2
    with pytest.raises(CheckpointError, match="has one output, which tells two classes apart"):
        told({"num_classes": 5, "out_channels": 1})
    with pytest.raises(CheckpointError, match="makes 1 or 2 classes"):
        told(None, meta={"dataset_meta": {"classes": ["a", "b", "c"]}})


def test_loss_changes_nothing() -> None:
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": True}
    head = {"num_classes": 3, "loss_decode": loss, "threshold": 0.5}
    found = infer(shapes(), {"decode_head": head}).architecture.decode_head
    assert (found.outputs, found.labels, found.label_threshold) == (3, 3, None)
    with pytest.raises(CheckpointError, match="3 outputs, of which the highest wins"):
        infer(shapes(), overrides={"decode_head.threshold": 0.5})


@pytest.mark.parametrize("head", [{**TWO, "threshold": 0.7}, {"num_classes": 1, "threshold": 0.3}])
def test_config_of_one_output_is_read_back(head: dict[str, Any]) -> None:
    architecture = small_architecture(head=head)
    text = format_config(architecture)
    found = infer_segmentor_config(
        weights_of(architecture), config=parse_config(text), meta={"CLASSES": architecture.classes}
    ).architecture
    assert found.decode_head == architecture.decode_head


def test_older_bundles_fields_are_all_there_are_of_other_heads() -> None:
    dumped = small_architecture().decode_head.model_dump()
    assert not {"out_channels", "threshold"} & set(dumped)
    binary = small_architecture(head={**TWO, "threshold": 0.3}).decode_head
    assert UPerHeadConfig.model_validate(binary.model_dump()) == binary
