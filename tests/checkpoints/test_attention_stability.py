"""Whether attentions amplify rounding is told by a checkpoint's weights, and told rightly."""

from __future__ import annotations

from io import StringIO

import pytest
import torch
from rich.console import Console

from benchmarks.stability import NOISE, TOLERANCE, measure
from fdconv_deploy.checkpoints import inspect_checkpoint, load_checkpoint
from fdconv_deploy.checkpoints.inspect import render, report_on
from fdconv_deploy.demo import packaged_checkpoint, packaged_detector, plain_checkpoint
from tests.checkpoints.small import shapes_of, small_architecture


def narrowed(network, factor):
    """Let its attentions take the training's frames for `factor` times less varied."""
    with torch.no_grad():
        for name, values in network.named_buffers():
            if name.endswith("KSM_Global.bn.running_var"):
                values /= factor**2
    return network


def state_of(network):
    return network.float().state_dict()


@pytest.mark.parametrize("checkpoint", [packaged_checkpoint, packaged_detector])
def test_packaged_checkpoints_are_called_stable(checkpoint):
    report = inspect_checkpoint(checkpoint())
    found = report.attention_stability
    assert found.layers == 30
    assert not found.amplifies
    assert found.saturating < 5
    out = StringIO()
    render(report, Console(file=out, width=120))
    assert "Unstable" not in out.getvalue()


def test_narrow_statistics_are_called_unstable_with_advice():
    report = report_on(state_of(narrowed(load_checkpoint(packaged_checkpoint()), 3)))
    found = report.attention_stability
    assert found.amplifies
    assert found.saturating > 20
    assert found.largest_swing > found.median_swing > 5
    out = StringIO()
    render(report, Console(file=out, width=120))
    told = " ".join(out.getvalue().split())
    assert f"Unstable: The attention amplifies: in {found.saturating} of 30 FDConv layers" in told
    assert "docs/stability.md" in told


@pytest.mark.parametrize("factor", [1, 3])
def test_the_verdict_is_what_is_measured(factor):
    networks = {
        dtype: narrowed(load_checkpoint(packaged_checkpoint()), factor).to(dtype)
        for dtype in (torch.float64, torch.float32)
    }
    worst = max(each.change for each in measure(networks, [(64, 64)], 1, [], NOISE))
    told = report_on(state_of(networks[torch.float64])).attention_stability
    assert told.amplifies == (worst > TOLERANCE)


def test_swing_is_free_of_the_features_scale():
    state = state_of(load_checkpoint(packaged_checkpoint()))
    before = report_on(state).attention_stability
    for name in state:
        if name.endswith("KSM_Global.fc.weight"):
            bn = name.replace("fc.weight", "bn")
            state[name] = state[name] * 100
            state[f"{bn}.running_mean"] = state[f"{bn}.running_mean"] * 100
            state[f"{bn}.running_var"] = state[f"{bn}.running_var"] * 100**2
    after = report_on(state).attention_stability
    assert after.median_swing == pytest.approx(before.median_swing, rel=1e-3)
    assert after.saturating == before.saturating


@pytest.mark.parametrize("damage", ["missing", "widened"])
def test_nothing_is_said_of_tensors_that_are_no_layers(damage):
    state = state_of(load_checkpoint(packaged_checkpoint()))
    name = next(name for name in state if name.endswith("KSM_Global.relu.scale"))
    if damage == "missing":
        del state[name]
    else:
        state[name] = torch.ones(3)
    assert report_on(state).attention_stability is None


def test_nothing_is_said_without_attention_statistics():
    assert inspect_checkpoint(plain_checkpoint()).attention_stability is None
    assert report_on(shapes_of(small_architecture())).attention_stability is None
    state = state_of(load_checkpoint(packaged_checkpoint()))
    bare = {name: value for name, value in state.items() if "KSM_Global.bn." not in name}
    from fdconv_deploy.checkpoints.attention_stability import attention_stability

    assert attention_stability(bare) is None
