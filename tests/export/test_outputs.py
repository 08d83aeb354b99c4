"""`export_module` on modules whose answers are nested."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export import export_module
from fdconv_deploy.export.api import flatten_outputs
from tests.export.graphs import relative, run_file
from tests.reference.lively import lively_input
from tests.reference.networks import Wired, dynamic
from tests.reference.published import FDConv


class Answer(NamedTuple):
    logits: Tensor
    features: list[Tensor]


# What a module answers to (its layer's output, its input), and what its outputs are called.
NESTED = {
    "yolo": (lambda y, x: (y, {"boxes": y, "scores": y.sigmoid()}),
             ["output0", "output1.boxes", "output1.scores"]),
    "levels": (lambda y, x: (y, {"boxes": y[:, :4], "feats": [y, y[:, ::2]]}),
               ["output0", "output1.boxes", "output1.feats.0", "output1.feats.1"]),
    "segment": (lambda y, x: ((y, y.mean(1)), {"a": {"b": (y,)}}),
                ["output0.0", "output0.1", "output1.a.b.0"]),
    "dict": (lambda y, x: {"out": y, "aux": y.relu()}, ["out", "aux"]),
    "ordered": (lambda y, x: OrderedDict(out=y), ["out"]),
    "named": (lambda y, x: Answer(y, [x, y.tanh()]), ["logits", "features.0", "features.1"]),
    "numbered": (lambda y, x: {0: y, 1: y.tanh()}, ["0", "1"]),
    "one": (lambda y, x: [y], ["output"]),
}  # fmt: skip


def network(answer) -> Wired:
    return Wired(lambda s, x: answer(s.a(x), x), a=dynamic()).eval()


@pytest.mark.parametrize("kind", NESTED)
@torch.no_grad()
def test_nested_outputs_are_named_by_where_they_stand(tmp_path, kind):
    answer, names = NESTED[kind]
    module, x = network(answer), lively_input((2, 18, 9, 11))
    made = export_module(module, x, tmp_path / "bundle")
    assert [t.name for t in made.manifest.outputs[2]] == names
    found = run_file(made.model_path(2), x.numpy())
    for ours, theirs in zip(found, pytree.tree_leaves(module(x)), strict=True):
        assert relative(ours, theirs.numpy()) <= 5e-6


@torch.no_grad()
def test_chosen_outputs_alone_are_exported(tmp_path):
    module, x = network(NESTED["levels"][0]), lively_input((1, 18, 9, 11))
    made = export_module(
        module, x, tmp_path / "bundle",
        outputs=["output1.feats.1", "output0"], output_names=["half", "whole"],
    )  # fmt: skip
    assert [t.name for t in made.manifest.outputs[1]] == ["half", "whole"]
    half, whole = run_file(made.model_path(1), x.numpy())
    assert relative(half, module(x)[1]["feats"][1].numpy()) <= 5e-6
    assert relative(whole, module(x)[0].numpy()) <= 5e-6


def test_what_is_no_tensor_may_stand_beside_chosen_outputs(tmp_path):
    module, x = network(lambda y, x: (y, {"shape": 3, "loss": None})), lively_input((1, 18, 9, 11))
    made = export_module(module, x, tmp_path / "bundle", outputs=["output0"])
    assert [t.name for t in made.manifest.outputs[1]] == ["output0"]


def test_copies_of_the_published_class_in_modules_of_nested_outputs(tmp_path):
    torch.manual_seed(0)
    copied = FDConv(18, 18, 3, padding=1, kernel_num=3)
    module = Wired(lambda s, x: {"y": s.a(x)}, a=copied).eval()
    made = export_module(module, lively_input((1, 18, 9, 11)), tmp_path / "bundle")
    assert made.manifest.graph["converted_layers"] == ["a"]
    assert not module._forward_hooks


def test_the_module_is_left_as_it_was():
    module, x = network(NESTED["yolo"][0]), lively_input((1, 18, 9, 11))
    flat, _ = flatten_outputs(module, x)
    assert isinstance(module(x)[1], dict)
    assert isinstance(flat(x), tuple)
    assert flat.a is module.a
    plain = nn.Sequential(dynamic()).eval()
    assert flatten_outputs(plain, x)[0] is plain


def test_none_is_left_out_and_said():
    module, x = network(lambda y, x: (y, None, {"aux": None})), lively_input((1, 18, 9, 11))
    said: list[str] = []
    _, names = flatten_outputs(module, x, progress=said.append)
    assert names == ["output0"]
    assert ["'output1' is None" in said[0], "'output2.aux' is None" in said[1]] == [True, True]


REFUSED = [
    (lambda y, x: (y, {"shape": 3}), {}, r"'output1.shape' is int 3\. Choose.*'output0'"),
    (lambda y, x: {"out": y, "mode": "eval"}, {}, r"'mode' is of type str\. Choose.*'out'"),
    (lambda y, x: (y, object()), {}, "'output1' is of type object"),
    (lambda y, x: "nothing", {}, "'output' is of type str. Wrap the module"),
    (lambda y, x: (None, {}), {}, "no tensor in its answer"),
    (lambda y, x: {"a.b": y, "a": {"b": y}}, {}, r"need names of their own.*\['a.b', 'a.b'\]"),
    (lambda y, x: {"": y}, {}, "need names of their own"),
    (lambda y, x: {"input": y}, {}, "called 'input' as the input is"),
    (lambda y, x: {"out": y}, {"outputs": ["x"]}, r"no output called 'x'\. Choose.*'out'"),
    (lambda y, x: {"out": y}, {"outputs": []}, "name one or more"),
    (lambda y, x: {"a.b": y, "a": {"b": y}}, {"outputs": ["a.b"]}, "several outputs called 'a.b'"),
    (lambda y, x: {"out": y}, {"output_names": ["a", "b"]}, "1 outputs.*names 2"),
    (lambda y, x: (y, y), {"output_names": ["a", "a"]}, "need names of their own"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "options", "says"), REFUSED)
def test_refusals_name_the_output(tmp_path, answer, options, says):
    with pytest.raises(ExportError, match=says):
        export_module(network(answer), lively_input((1, 18, 9, 11)), tmp_path / "b", **options)
    assert list(tmp_path.iterdir()) == []
