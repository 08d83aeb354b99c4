"""What an engine launches, counted in its graph, and what its plugins take of every GPU."""

from __future__ import annotations

import importlib.util
import json

import pytest
from onnx import helper

from benchmarks.gpu.tensorrt_kernels import RECORD, TARGETS, count, kernels
from fdconv_deploy.ops.compile_kernels import CAPABILITIES


def test_pointwise_operators_and_copies_are_kernels_or_a_neighbours():
    def node(operator: str, inputs: str, output: str):
        return helper.make_node(operator, inputs.split(), [output])

    nodes = [
        node("Conv", "x w", "a"),
        node("Relu", "a", "b"),
        node("Cast", "b", "c"),  # one chain
        node("Reshape", "c s", "d"),
        node("FrequencyAssemblyRows_Wide", "d g", "e"),
        node("Relu", "e", "f"),
        node("Sigmoid", "e", "g"),
        node("Mul", "f g", "h"),  # joins both: one more chain
        node("Slice", "h s", "y"),
    ]
    found = kernels(helper.make_model(helper.make_graph(nodes, "g", [], [])))
    assert (found["least"], found["most"]) == (2, 2 + 2 + 1)
    assert found["nodes"]["FrequencyAssemblyRows"] == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_record_is_of_todays_engine(tmp_path):
    assert json.loads(RECORD.read_text()) == count(tmp_path), (
        "run python -m benchmarks.gpu.tensorrt_kernels"
    )


def test_plugins_go_through_the_newest_ptxas_for_every_gpu_without_a_spill(proved):
    """By the record of the real one; its launches are today's."""
    record = json.loads(TARGETS.read_text())
    assert list(map(int, sorted(record["targets"], key=int))) == list(CAPABILITIES)
    for row in record["targets"].values():
        assert {of["spilled"] for of in row["kernels"].values()} == {0}
        assert max(of["shared"] for of in row["kernels"].values()) <= 48 * 1024
    if importlib.util.find_spec("triton") is not None:
        from tests.real_packages.cuda_toolkit.check import launches_mark

        assert record["launches"] == launches_mark(), (
            "run python -m tests.real_packages.cuda_toolkit.check (its README.md says how)"
        )
    proved(f"plugin kernels assembled by ptxas {record['ptxas']} for {len(CAPABILITIES)} GPUs")
