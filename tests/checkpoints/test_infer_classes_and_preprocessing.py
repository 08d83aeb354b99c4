"""How images are loaded and normalised, by the config's test pipeline; images of other bands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fdconv_deploy.checkpoints import inspect_checkpoint, load_checkpoint, read_checkpoint
from fdconv_deploy.checkpoints.config_parser import parse_config
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.checkpoints.infer_config import infer_config
from fdconv_deploy.config import Preprocessing
from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import dynamic_state, shapes_of, small_architecture, weights_of


def of(bands: int) -> Preprocessing:
    return Preprocessing(mean=(1.5,) * bands, std=(2.0,) * bands, loading="bands", to_float32=True)


def shapes(bands: int) -> dict[str, torch.Tensor]:
    return shapes_of(small_architecture(in_channels=bands, preprocessing=of(bands)))


def config(load: str, bands: int, more: str = "") -> Any:
    return parse_config(
        f"model = dict(data_preprocessor=dict(mean={[1.5] * bands}, std={[2.0] * bands}{more}))\n"
        f"test_pipeline = [dict({load}), dict(type='PackSegInputs')]\n"
    )


@pytest.mark.parametrize("bands", [1, 4, 12])
def test_preprocessing_of_other_bands_asks_for_their_statistics(bands: int, tmp_path: Path) -> None:
    packaged = read_checkpoint(packaged_checkpoint())
    content = {"meta": dict(packaged.meta), "state_dict": dict(packaged.state_dict)}
    first = content["state_dict"]["backbone.conv1.weight"]
    content["state_dict"]["backbone.conv1.weight"] = first.mean(1, keepdim=True).repeat(
        1, bands, 1, 1
    )
    cfg = content["meta"]["cfg"]
    content["meta"]["cfg"] = cfg.replace("in_channels=3,", f"in_channels={bands},")
    path = tmp_path / "bands.pth"
    torch.save(content, path)
    report = inspect_checkpoint(path)
    assert report.problem is not None
    assert f"the network takes {bands} band" in report.problem
    assert "--set 'preprocessing.mean=[…]' and --set 'preprocessing.std=[…]'" in report.problem
    given = {"preprocessing.mean": [100] * bands, "preprocessing.std": [50] * bands}
    found = inspect_checkpoint(path, overrides=given)
    assert found.problem is None
    assert found.refusal is None
    assert any("gives three bands" in note for note in found.notes)
    network = load_checkpoint(path, overrides=given)
    assert network.architecture.preprocessing.channels == bands
    assert network.architecture.preprocessing.loading == "bands"


def test_preprocessing_of_other_bands_is_never_guessed() -> None:
    with pytest.raises(CheckpointError, match=r"mean is not known: the network takes 4 bands"):
        infer_config(shapes(4))
    told = {"preprocessing.mean": [0, 1, 2, 3]}
    with pytest.raises(CheckpointError, match="std is not known"):
        infer_config(shapes(4), overrides=told)
    told["preprocessing.std"] = [1, 2, 3, 4]
    found = infer_config(shapes(4), overrides=told)
    assert found.architecture.preprocessing.mean == (0, 1, 2, 3)
    assumed = {fact.field: fact.value for fact in found.assumed}
    assert assumed["preprocessing.loading"] == "bands"
    assert assumed["preprocessing.to_float32"] is True


@pytest.mark.parametrize(
    ("load", "bands", "loading", "to_float32"),
    [
        ("type='LoadSingleRSImageFromFile'", 4, "bands", True),
        ("type='LoadSingleRSImageFromFile', to_float32=False", 12, "bands", False),
        ("type='LoadSingleRSImageFromFile'", 3, "bands", True),
        ("type='LoadImageFromFile', imdecode_backend='tifffile'", 4, "bands", False),
        ("type='LoadImageFromFile', color_type='unchanged'", 4, "unchanged", False),
        ("type='LoadImageFromFile', color_type='unchanged'", 1, "unchanged", False),
        ("type='LoadImageFromFile', color_type='grayscale', to_float32=True", 1, "grayscale", True),
        ("type='LoadImageFromFile'", 3, "color", False),
        ("type='LoadImageFromFile', to_float32=True", 3, "color", True),
        ("type='LoadImageFromFile'", 4, "bands", False),
        ("type='LoadOurOwnFiles'", 4, "bands", True),
    ],
)
def test_preprocessing_loading_is_that_of_the_pipeline(
    load: str, bands: int, loading: str, to_float32: bool
) -> None:
    state = shapes(bands)
    found = infer_config(state, config=config(load, bands)).architecture.preprocessing
    assert (found.loading, found.to_float32) == (loading, to_float32)
    assert found.channels == bands


def test_preprocessing_loading_of_other_bands_is_refused() -> None:
    for load in (
        "type='LoadImageFromFile', color_type='grayscale'",
        "type='LoadImageFromFile', color_type='x'",
    ):
        with pytest.raises(CheckpointError, match=r"preprocessing\.loading"):
            infer_config(shapes(4), config=config(load, 4))
    with pytest.raises(CheckpointError, match="takes 4 bands, which is loading bands or unchanged"):
        infer_config(
            shapes(4),
            config=config("type='LoadImageFromFile'", 4),
            overrides={"preprocessing.loading": "color"},
        )


def test_preprocessing_mean_stands_for_every_band() -> None:
    load = "type='LoadSingleRSImageFromFile'"
    found = infer_config(shapes(4), config=config(load, 1)).architecture.preprocessing
    assert (found.mean, found.std) == ((1.5,) * 4, (2.0,) * 4)
    none = parse_config(
        "model = dict(data_preprocessor=dict(type='SegDataPreProcessor', bgr_to_rgb=True))\n"
        f"test_pipeline = [dict({load})]"
    )
    found = infer_config(shapes(4), config=none).architecture.preprocessing
    assert (found.mean, found.std) == ((0.0,) * 4, (1.0,) * 4)


def test_preprocessing_swap_goes_by_its_other_name() -> None:
    load = "type='LoadSingleRSImageFromFile'"
    for more, swapped in ((", rgb_to_bgr=True", True), (", bgr_to_rgb=True", True), ("", False)):
        found = infer_config(shapes(3), config=config(load, 3, more)).architecture
        assert found.preprocessing.reversed is swapped


@pytest.mark.parametrize("bands", [1, 3, 4])
@pytest.mark.parametrize("loading", ["bands", "unchanged"])
def test_preprocessing_of_other_bands_is_read_back(bands: int, loading: str) -> None:
    how = of(bands).model_copy(update={"loading": loading})
    architecture = small_architecture(in_channels=bands, preprocessing=how)
    text = format_config(architecture)
    found = infer_config(weights_of(architecture), config=parse_config(text)).architecture
    assert found.preprocessing == how


def test_preprocessing_is_read_back_and_from_older_bundles() -> None:
    first = ("bgr_to_rgb", "keep_ratio", "mean", "scale", "std")
    older = {name: Preprocessing().model_dump()[name] for name in first}
    assert Preprocessing.model_validate(older) == Preprocessing()
    assert of(4).model_dump()["loading"] == "bands"
    assert Preprocessing.model_validate_json(of(4).model_dump_json()) == of(4)


def test_preprocessing_of_mmseg_0() -> None:
    text = """
img_norm_cfg = dict(mean=[1.0, 2, 3], std=[4, 5, 6], to_rgb=False)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(512, 2048), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'),
        dict(type='Normalize', **img_norm_cfg), dict(type='Pad', size_divisor=32),
        dict(type='ImageToTensor', keys=['img']), dict(type='Collect', keys=['img'])])]
test_cfg = dict(mode='slide', crop_size=(512, 512), stride=341)
data = dict(test=dict(classes=['a', 'b', 'c'], palette=[[1, 2, 3]]))
"""
    found = infer_config(dynamic_state(), config=parse_config(text))
    settings = found.architecture.preprocessing
    assert (settings.mean, settings.std, settings.bgr_to_rgb) == ((1, 2, 3), (4, 5, 6), False)
    assert settings.scale == (2048, 512)
    test = found.architecture.test
    assert (test.mode, test.crop_size, test.stride) == ("slide", (512, 512), (341, 341))
    assert found.architecture.classes == ("a", "b", "c")
    assert found.architecture.palette == ()
    assert any("Pad step" in note for note in found.notes)
    assert any("palette in the config is not one RGB colour" in note for note in found.notes)


def test_preprocessing_of_mmseg_1() -> None:
    text = """
model = dict(data_preprocessor=dict(type='SegDataPreProcessor', mean=None))
train_cfg = dict(type='IterBasedTrainLoop')
test_cfg = dict(type='TestLoop')
test_dataloader = dict(dataset=dict(metainfo=dict(classes=('a', 'b', 'c')), pipeline=[
    dict(type='Resize', scale=(300, 200), keep_ratio=False)]))
"""
    found = infer_config(dynamic_state(), config=parse_config(text)).architecture
    assert found.preprocessing.mean == (0, 0, 0)
    assert found.preprocessing.std == (1, 1, 1)
    assert (found.preprocessing.scale, found.preprocessing.keep_ratio) == ((300, 200), False)
    assert found.test.mode == "whole"
    assert found.classes == ("a", "b", "c")


def test_preprocessing_takes_the_first_of_several_scales() -> None:
    text = """
data = dict(test=dict(pipeline=[
    dict(type='MultiScaleFlipAug', img_scale=[(1024, 512), (2048, 1024)], transforms=[
        dict(type='Resize', keep_ratio=True)])]))
"""
    found = infer_config(dynamic_state(), config=parse_config(text))
    assert found.architecture.preprocessing.scale == (1024, 512)
    assert any("has 2 scales; the first is used" in note for note in found.notes)
