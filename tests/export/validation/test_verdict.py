"""How one error is judged."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fdconv_deploy.export.validation.tolerance import decide
from fdconv_deploy.export.validation.verdict import Finding, Verdict, refusal


def never() -> float:
    raise AssertionError("float32's own error was not needed")


def test_a_small_error_needs_no_excuse():
    assert decide(1e-6, never, 1e-5, 1e-4) == ("equal", None)


@pytest.mark.parametrize(
    ("error", "rounding", "outcome"),
    [
        (5e-5, 6e-6, "equal"),  # within ten times what float32 costs, and that is little
        (5e-5, 1e-6, "differs"),
        (1.0, 9e-6, "differs"),
        (5e-5, 1e-4, "cannot tell"),
        (1.0, 1e-3, "cannot tell"),
        (math.inf, 1e-7, "differs"),
        (math.inf, math.inf, "cannot tell"),
        (1.0, math.nan, "cannot tell"),
        (math.nan, 1e-7, "differs"),
    ],
)
def test_an_error_is_judged_beside_rounding(error, rounding, outcome):
    found, own = decide(error, lambda: rounding, 1e-5, 1e-4)
    assert found == outcome
    assert own is rounding


def finding(outcome, part="logits", source="gray.png", error=1e-6, rounding=None) -> Finding:
    return Finding(part, source, 1, error, 1e-4, outcome, rounding)


LAYER = finding("equal", "layer1.conv", "scenes")


@pytest.mark.parametrize(
    ("whole", "layers", "equal", "said"),
    [
        (["equal"], [LAYER], True, "The graph is the network."),
        (["cannot tell"], [LAYER], True, "none of these inputs can tell the whole"),
        (["cannot tell"], [], False, "No input could tell"),
        (["equal"], [finding("cannot tell", "layer2.conv")], False, "in layer2.conv"),
        (
            ["equal"],
            [finding("differs", "layer2.conv")],
            False,
            "differs from the network in layer2",
        ),
        (["differs"], [LAYER], False, "differs from the network in logits"),
    ],
)
def test_a_verdict_is_of_the_layers_where_the_whole_cannot_tell(whole, layers, equal, said):
    found = [finding(o, error=0.3, rounding=0.1) for o in whole]
    verdict = Verdict(tuple(found), tuple(layers))
    assert verdict.equal is equal
    assert said in " ".join(verdict.sentences())
    assert verdict.as_dict()["equal"] is equal


def test_a_blind_input_is_named_with_its_figures():
    verdict = Verdict((finding("cannot tell", error=7e-3, rounding=1.1e-3),), (LAYER,))
    line = verdict.sentences()[0]
    for piece in ("gray.png", "7.0e-03", "1.1e-03", "This input cannot tell"):
        assert piece in line


def test_a_tolerance_below_float32_is_not_the_networks_fault():
    found = Finding("logits", "gray.png", 1, 4e-7, 1e-9, "cannot tell", 3e-7)
    line = Verdict((found,), (LAYER,)).sentences()[0]
    assert line.endswith("the tolerance is below what float32 can tell.")
    assert found.least_tolerance == pytest.approx(3e-6)
    assert not finding("cannot tell", error=7e-3, rounding=1.1e-3).below_float32


def test_a_refusal_never_asks_to_export_again():
    for layers in ([finding("differs", "layer2.conv", error=0.1, rounding=1e-7)],
                   [finding("cannot tell", "layer2.conv", error=0.1, rounding=0.1)]):  # fmt: skip
        message = refusal(Verdict((finding("cannot tell"),), tuple(layers)), "the bundle")
        assert "layer2.conv" in message
        assert "1.0e-01" in message
        assert "again" not in message
        assert "raise" not in message


def test_finding_says_what_its_error_is_a_share_of() -> None:
    found = Finding("logits", "a picture", 1, 6e-3, 0.1, "equal")
    assert found.figures() == "6.0e-03 of its largest value (tolerance 1e-01)"
    classes = replace(found, counts_classes=True)
    assert classes.figures() == "6.0e-03 of positions of another class (tolerance 1e-01)"
