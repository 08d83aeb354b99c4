"""Config text is read without running it; what cannot be read is noted, never guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdconv_deploy.checkpoints import read_checkpoint
from fdconv_deploy.checkpoints.config_parser import Unreadable, config_of, parse_config
from fdconv_deploy.checkpoints.loading import read_config
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import bounded_work


@pytest.mark.parametrize("name", ["mmcv1", "mmengine_published"])
def test_config_of_a_reference_checkpoint_is_whole(oracle: Path, name: str) -> None:
    reference = json.loads((oracle / "segmentor" / "index.json").read_text())["models"]["B"]
    found = config_of(read_checkpoint(oracle / "segmentor" / f"B_r18b14_{name}.pth").meta)
    assert found is not None
    assert found.notes == ()
    for part in ("backbone", "decode_head", "auxiliary_head", "test_cfg"):
        section = json.loads(json.dumps(found.section("model", part)))
        assert section == reference["model"][part]


def test_config_statements_that_are_evaluated() -> None:
    found = parse_config(
        """
'''A config.'''
norm_cfg = dict(type='SyncBN', requires_grad=True)
crop = (512, 1024)
n, (a, b) = 19, (1, 2)
lr: float = 1e-4 * 2 ** 3
model = dict(
    type='EncoderDecoder', pretrained=None,
    backbone=dict(depth=50, out_indices=[0] + [1, 2] + [3], norm_cfg=norm_cfg, k=-1, t=not True),
    decode_head=dict(num_classes=n + 1, **dict(channels=512), scale=crop[1], size=(*crop, 3)),
    test_cfg={'mode': 'slide', 'crop_size': crop, **{'stride': (crop[0] // 2,) * 2}})
model['decode_head']['num_classes'] += 2
model.backbone.depth = 18
model['backbone']['out_indices'][0] = 7
name = 'a' 'b' + 'c'
"""
    )
    assert found.notes == ()
    assert found.values["lr"] == pytest.approx(8e-4)
    assert (found.values["a"], found.values["b"], found.values["name"]) == (1, 2, "abc")
    assert found.section("model", "backbone") == {
        "depth": 18,
        "out_indices": [7, 1, 2, 3],
        "norm_cfg": {"type": "SyncBN", "requires_grad": True},
        "k": -1,
        "t": False,
    }
    assert found.section("model", "decode_head") == {
        "num_classes": 22,
        "channels": 512,
        "scale": 1024,
        "size": (512, 1024, 3),
    }
    assert found.section("model", "test_cfg")["stride"] == (256, 256)
    assert found.section("model", "nothing", "here") == {}


@pytest.mark.parametrize(
    ("text", "value", "says"),
    [
        ("x = open('/etc/passwd').read()", "x", "a call of open"),
        ("import os\nx = os.environ['HOME']", "x", "the imported os is code"),
        ("x = __import__('os').system('true')", "x", "a call of"),
        ("x = lambda: 1", "x", "Lambda is code"),
        ("x = [i for i in (1, 2)]", "x", "ListComp is code"),
        ("x = y", "x", "'y' is not assigned"),
        ("x = {{_base_.num_classes}}", "x", "reference to another file"),
        ("x = '{{ fileDirname }}/a'", "x", "reference to another file"),
        ("x = 10 ** 10 ** 10", "x", "power out of bounds"),
        ("x = 2 ** 62 * 1000", "x", "64 bits"),
        ("x = 'a' * 10 ** 6 * 10 ** 6", "x", "100000 items"),
        ("x = 1 / 0", "x", "ZeroDivisionError"),
        ("x = 1\nfor i in (1, 2):\n    x = i", "x", "changed by a For statement"),
        ("x = dict(a=1)\nx.update(dict(a=2))", "x", "changed by a Expr statement"),
        ("x = 1\ndel x", "x", "changed by a Delete statement"),
        ("x = f'{1}'", "x", "JoinedStr is code"),
        ("def f():\n    return 1\nx = f()", "x", "a call of f"),
        ("x = (-1) ** 0.5", "x", "a complex number"),
        ("x = [1, *([2] * 99_999), 3]", "x", "a list of more than 100000 items"),
        ("x = 5\nx = x[0]", "x", "int has no items"),
        ("x = {} + {}", "x", "not arithmetic on numbers"),
        ("x = [1]\nx[7] = 2", "x", "an item of it is assigned in a way that is not read"),
        ("x, *y = 1, 2, 3", "x", "in a way that is not read"),
    ],
)
def test_config_code_is_reported_and_not_run(text: str, value: str, says: str) -> None:
    found = parse_config(text, name="cfg")
    assert isinstance(found.values[value], Unreadable)
    assert any(says in note for note in found.notes), found.notes


def test_config_loses_only_the_unreadable_part() -> None:
    found = parse_config("model = dict(backbone=dict(depth=50, x=f()), head=[1, g(), 3])", name="c")
    assert found.section("model", "backbone")["depth"] == 50
    assert found.section("model")["head"][2] == 3
    assert [note.split(":")[0] for note in found.notes] == ["c, line 1"] * 2
    assert "model.backbone.x" in found.notes[0]
    assert "model.head.1" in found.notes[1]


def test_config_loses_one_assignment_to_an_objects_repr() -> None:
    found = parse_config("a = 1\nhook = <function f at 0x7f>\nb = dict(\n    c=2)\n")
    assert found.values == {"a": 1, "b": {"c": 2}}
    assert "line 2" in found.notes[0]


def test_config_base_files_are_named_as_missing() -> None:
    for text in (
        "_base_ = ['../_base_/models/upernet_r50.py']\nmodel = dict(backbone=dict(depth=18))",
        "from mmengine.config import read_base\nwith read_base():\n    from .base import *\n"
        "model = dict(backbone=dict(depth=18))",
    ):
        found = parse_config(text)
        assert found.section("model", "backbone")["depth"] == 18
        assert any("base config files, which are not read" in note for note in found.notes)
    inherited = parse_config("_base_ = './a.py'\nx = _base_.model.depth")
    assert isinstance(inherited.values["x"], Unreadable)


def test_config_of_excessive_length_is_refused() -> None:
    with pytest.raises(CheckpointError, match="larger than 4 MiB: not a config's text"):
        parse_config("x = 1\n" * (1 << 20))


def test_config_wildcard_imports_are_named_as_missing() -> None:
    found = parse_config("from base import *\nmodel = dict(backbone=dict(depth=18))")
    assert found.section("model", "backbone")["depth"] == 18
    assert any("base config files, which are not read" in note for note in found.notes)


def test_config_of_a_checkpoint_may_be_a_dict() -> None:
    found = config_of({"cfg": {"model": {"backbone": {"depth": 18}}}})
    assert found is not None
    assert found.section("model", "backbone") == {"depth": 18}
    assert config_of({"cfg": " "}) is None


def test_config_imported_classes_are_read_as_types_only() -> None:
    found = parse_config("from mmseg.models import UPerHead as U\nh = dict(type=U, other=U)")
    assert found.values["h"]["type"] == "mmseg.models.UPerHead"
    assert isinstance(found.values["h"]["other"], Unreadable)


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 90 + "]" * 90,
        "x = " + "[" * 5000 + "]" * 5000,
        "x = " + "-" * 20000 + "1",
        "x = " + "1+" * 20000 + "1",
        "a = {}\n" + "a = dict(a=a)\n" * 5000,
        "a = [1] * 1000\n" + "a = [a, a, a, a]\n" * 60,
        "a = [1]\n" + "a = a + a\n" * 60,
        "a = []\na = [a]\na[0] = a",
        "x = " + "9" * 10000,
        "\x00 = 1",
        "x = (" * 200,
        '{"a": ' * 100000,
        "x = a" + ".a" * 20000 + "()",
        "x = a" + "()" * 20000,
        "x = 1" + "+1" * 20000,
        "x = 0x" + "f" * 100000 + "\ny = x * x\nz = f(x)",
    ],
)
def test_config_of_hostile_text_is_bounded_work(text: str) -> None:
    with bounded_work(2_000_000):
        try:
            parse_config(text)
        except CheckpointError as error:
            assert "JSON" in str(error)  # noqa: PT017 - either outcome is right


GIANT = 10**5000


@pytest.mark.parametrize(
    "number",
    [
        hex(GIANT),
        "-" + hex(GIANT),
        f"[1, {oct(GIANT)}]",
        "int('" + "9" * 4000 + "')",
        "9" * 4000,
        f"2 * {1 << 63}",
    ],
    ids=lambda text: text[:20],
)
def test_config_giant_integers_are_named_and_not_read(number: str) -> None:
    config = parse_config(f"depth = {number}\nmodel = dict(width=0)\nmodel['width'] = {number}")
    assert len(config.notes) == 2
    assert "line 1: depth" in config.notes[0]
    assert "line 3: model.width" in config.notes[1]
    for note in config.notes:
        assert "could not be read" in note
        assert note.endswith("a number of more than 64 bits.")
    assert 0 not in config.values.values()


def test_config_giant_integers_of_dicts_and_json_are_named() -> None:
    config = parse_config('{"model": {"depth": ' + "9" * 4000 + "}}", name="a.json")
    assert config.notes == (
        "a.json: model.depth could not be read: a number of more than 64 bits.",
    )
    given: dict[Any, Any] = {"a": [GIANT, (1, -GIANT)], "b": {GIANT: 1, "d": True}}
    config = config_of({"cfg": given})
    assert config is not None
    assert config.notes == (
        "meta['cfg']: a.0 could not be read: a number of more than 64 bits.",
        "meta['cfg']: a.1.1 could not be read: a number of more than 64 bits.",
    )
    assert config.values["b"]["d"] is True
    assert given["a"] == [GIANT, (1, -GIANT)]  # what was given stays as it is
    with pytest.raises(CheckpointError, match="not valid JSON"):
        parse_config('{"model": ' + "9" * 5000 + "}")


def test_config_values_nested_without_end_are_cut_off() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    config = config_of({"cfg": {"a": deep, "b": 3}})
    assert config is not None
    assert config.values["b"] == 3
    assert "nested deeper than 60 levels" in config.notes[0]


@given(st.text(max_size=300))
def test_config_of_any_text_is_read_or_reported(text: str) -> None:
    try:
        parse_config(text)
    except CheckpointError:
        assert text.lstrip().startswith("{")


def test_config_files_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("model = dict(depth=50)")
    assert read_config(path).section("model") == {"depth": 50}
    (tmp_path / "config.json").write_text('{"model": {"depth": 50}}')
    assert read_config(str(tmp_path / "config.json")).section("model") == {"depth": 50}
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        read_config(tmp_path / "list.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_config(tmp_path / "missing.py")
    with pytest.raises(CheckpointError, match=r"expected a \.py or \.json"):
        read_config(tmp_path / "config.toml")
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_config(path)
    path.write_text("#" * (5 << 20))
    with pytest.raises(CheckpointError, match="larger than 4 MiB"):
        read_config(path)
    (tmp_path / "bad.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path / "bad.json")
