"""Where ONNX Runtime's CUDA provider runs the nodes of bundles, by a record of the real one."""

from __future__ import annotations

import json

import pytest

from tests.real_packages.onnxruntime_gpu.make import PAGE, RECORD, page
from tests.real_packages.onnxruntime_gpu.networks import KINDS, node_kinds

FOUND = json.loads(RECORD.read_text())
REFRESH = "run python -m tests.real_packages.onnxruntime_gpu.make (its README.md says how)"
# The others' nodes are mostly of these kinds; each export takes seconds.
FAST = ("segmentor fp32", "detector", "tokens (SegFormer)")


@pytest.mark.parametrize("graph", FOUND["graphs"])
def test_every_node_is_on_the_gpu_and_the_graph_can_be_captured(graph, proved):
    found = FOUND["graphs"][graph]
    assert found["on_cpu"] == {}
    assert found["copies"] == 0
    assert found["capture_refused"] is None
    proved("bundles placed wholly on the GPU by ONNX Runtime's real CUDA provider", 1)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in KINDS]
)
def test_todays_graphs_have_no_node_the_provider_was_not_asked_about(kind, tmp_path):
    bundle = KINDS[kind](tmp_path / "bundle")
    for batch in bundle.batch_sizes:
        assert node_kinds(bundle.model_path(batch)) <= set(FOUND["node_kinds"]), REFRESH


def test_the_page_is_what_the_script_writes():
    assert PAGE.read_text() == page(FOUND), REFRESH
