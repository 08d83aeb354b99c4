"""Where settings come from: the user before the config, the config before the default."""

from __future__ import annotations

from typing import Any

import pytest

from fdconv_deploy.checkpoints.config_parser import UNSET, parse_config
from fdconv_deploy.checkpoints.infer_config import infer_config
from fdconv_deploy.checkpoints.settings import CHECKPOINT_META, Evidence, SettingResolver
from fdconv_deploy.config import TestMode
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import (
    CLASSES,
    dynamic_state,
    infer,
    shapes_of,
    small_architecture,
)


def test_setting_of_the_user_goes_before_the_config() -> None:
    state = shapes_of(small_architecture(depth=50))
    found = infer(
        state,
        {"backbone": {"style": "pytorch", "conv_cfg": {"type": "FDConv", "att_multi": 2.0}}},
        overrides={
            "backbone.style": "caffe",
            "backbone": {"conv": {"att_multi": 1.5}},
            "classes": list(CLASSES),
            "preprocessing.mean": [1, 2, 3],
        },
    )
    assert found.architecture.backbone.style == "caffe"
    assert found.architecture.backbone.conv is not None
    assert found.architecture.backbone.conv.att_multi == 1.5
    assert found.architecture.classes == CLASSES
    sources = {fact.field: fact.source for fact in found.found}
    assert sources["backbone.style"] == sources["classes"] == "command line"
    with pytest.raises(CheckpointError, match=r"'backbone\.stile'.*Did you mean backbone\.style"):
        infer(state, overrides={"backbone.stile": "caffe"})
    with pytest.raises(CheckpointError, match="the command line says 18, but"):
        infer(state, overrides={"backbone.depth": 18})


def test_setting_that_cannot_be_read_is_left_to_the_default() -> None:
    text = "model = dict(backbone=dict(style=f(), strides=[1, g(), 2, 2]))"
    found = infer_config(dynamic_state(), config=parse_config(text))
    assert found.architecture.backbone.strides == (1, 2, 2, 2)
    assert "backbone.strides" in {fact.field for fact in found.assumed}
    assert len(found.notes) == 2
    text = "metainfo = dict(classes=['a', f(), 'c'])"
    assert infer_config(dynamic_state(), config=parse_config(text)).architecture.classes == ()


def resolver(section: dict[str, Any] | None = None, **overrides: Any) -> SettingResolver[TestMode]:
    return SettingResolver(Evidence({"test": overrides}), TestMode, "test", section or {})


@pytest.mark.parametrize(
    ("section", "overrides", "known", "expected"),
    [
        ({"mode": "slide"}, {"mode": "whole"}, {}, ("whole", "command line")),
        ({"mode": "slide"}, {}, {}, ("slide", "config")),
        ({"mode": "slide"}, {}, {"config_name": CHECKPOINT_META}, ("slide", "checkpoint meta")),
        ({}, {}, {}, ("whole", "published default")),
        ({}, {}, {"exact": "slide", "source": "names"}, ("slide", "names")),
        ({"mode": "slide"}, {}, {"exact": "slide"}, ("slide", "shapes")),
        ({}, {}, {"accepts": lambda v: v == "slide", "derived": "slide"}, ("slide", "shapes")),
        ({"mode": UNSET}, {}, {"default": "slide"}, ("slide", "published default")),
    ],
)
def test_setting_has_its_source(
    section: dict[str, Any],
    overrides: dict[str, Any],
    known: dict[str, Any],
    expected: tuple[str, str],
) -> None:
    settings = resolver(section, **overrides)
    assert settings.resolve("mode", **known) == expected[0]
    (setting,) = settings.evidence.settings
    assert (setting.field, setting.value, setting.source) == ("test.mode", *expected)


@pytest.mark.parametrize(
    ("section", "overrides", "known", "says"),
    [
        ({"mode": "slide"}, {}, {"exact": "whole"}, "the config says 'slide', but the weights' sh"),
        ({}, {"mode": "slide"}, {"exact": "whole"}, "the command line says 'slide', but .*correct"),
        ({"mode": "zoom"}, {}, {}, "says 'zoom', which is not possible: Input should be 'whole'"),
        ({}, {}, {"default": UNSET, "because": "two fit"}, "test.mode is not known: two fit. Give"),
        ({}, {}, {"accepts": lambda v: False, "because": "none fits"}, "is not known: none fits"),
    ],
)
def test_setting_that_contradicts_or_is_unknown_is_refused(
    section: dict[str, Any], overrides: dict[str, Any], known: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        resolver(section, **overrides).resolve("mode", **known)


def test_setting_without_effect_is_not_listed() -> None:
    settings = resolver()
    settings.resolve("mode", matters=False)
    assert not settings.evidence.settings
    assert "test.mode" in settings.evidence.fields


def test_settings_left_are_resolved_when_the_model_is_built() -> None:
    settings = resolver({"mode": "slide", "crop_size": [64, 32]})
    settings.resolve("mode")
    assert settings.build(stride=(8, 4)) == TestMode(
        mode="slide", crop_size=(64, 32), stride=(8, 4)
    )
    assert [setting.field for setting in settings.evidence.settings] == [
        "test.mode",
        "test.crop_size",
    ]
