from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import matrix, session, speed
from benchmarks.cases import Case
from benchmarks.export_size import TOLERANCE
from benchmarks.speed import OPENVINO, RATIOS, SIDES
from fdconv_deploy.export import export_module
from fdconv_deploy.ops import native
from tests.runtime import toy

CASE = Case("backbone", 18, 64, 64, 1, kernel_num=4, channels=8)


@pytest.fixture
def exports_here(monkeypatch) -> None:
    """Exports in this process: a fresh one spends its time importing torch."""

    def export(case: Case, network, bundle: Path, *, dynamic: bool = True) -> dict:
        made = export_module(network, case.images(), bundle, tolerance=TOLERANCE)
        nodes = made.manifest.graph["nodes.b1"]
        return {"nodes": nodes, "export_seconds": 1.0, "peak_mb": 1, "bundle_mb": 1.0}

    monkeypatch.setattr(speed, "measure_export", export)


@pytest.mark.parametrize("built", [True, False])
def test_all_sides_of_a_tiny_network(
    built: bool, tmp_path: Path, exports_here, capsys, monkeypatch, tmp_path_factory
) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path_factory.mktemp("native"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    if built:
        if native.compiler() is None:
            pytest.skip("no C compiler for the native operators (cc, gcc, clang or $CC)")
        native.build(native.FOLDER)
    sides = {side for side in SIDES if built or side not in ("native", "native_nchw")} - set(
        OPENVINO
    )
    result = speed.measure(CASE, tmp_path, threads=1, rounds=5)
    assert result["case"] == CASE.as_dict()
    if find_spec("openvino"):  # nothing of it is built here, nor need there be bfloat16
        sides |= {"openvino_plain", "openvino"}
    assert set(result["ms"]) - {"openvino_bf16_plain", "openvino_bf16"} == sides
    for ms in result["ms"].values():
        assert 0 < ms["min"] <= ms["q1"] <= ms["median"] <= ms["q3"]
        assert ms["runs"] == 5
    assert set(result["cpu_ms"]) == set(result["ms"])
    assert all(0 < cpu["min"] <= cpu["median"] for cpu in result["cpu_ms"].values())
    assert set(result["ratios"]) == {f"{a}/{b}" for a, b in RATIOS if {a, b} <= set(result["ms"])}
    assert 0 < result["max_rel_error"] < 1e-4  # the timed graph answers what the network does
    assert result["export"]["nodes"] > result["plain_export"]["nodes"]
    speed.show(result)
    printed = capsys.readouterr().out
    assert all(name in printed for name in SIDES.values())
    assert ("FDConv, exported, native operators not here" in " ".join(printed.split())) != built


@pytest.mark.slow
def test_matrix_in_fresh_processes(tmp_path: Path) -> None:
    arguments = (
        "--networks upernet --depths 18 --sizes 64x64 --batches 1 --sweeps --rounds 5 --threads 1 "
        "--kernel-num 4 --channels 8"
    )
    matrix.main([*arguments.split(), "--output", str(tmp_path / "m.json")])
    (result,) = json.loads((tmp_path / "m.json").read_text())["cases"].values()
    assert set(SIDES) - {"native", "native_nchw", *OPENVINO} <= set(result["ms"]) <= set(SIDES)
    export = result["export"]
    assert export["export_seconds"] > 0
    assert export["peak_mb"] > 100
    assert export["nodes"] > result["plain_export"]["nodes"]
    assert export["bundle_mb"] >= export["inference_weights_mb"]


def test_a_sessions_life(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(session, "VARIANTS", ("runtime", "pattern"))
    bundle = toy.make_bundle(tmp_path / "b", batches=(2,)).path
    result = session.measure(bundle, threads=1, repeats=1)
    model = bundle / "model.b2.onnx"
    result["variants"] = session.variants(model, threads=1, rounds=5, seconds=1)
    result["binding"] = session.binding(model, threads=1, rounds=5, seconds=1)
    life = result["batches"]["2"]
    assert 0 < life["open_mb"] <= life["settled_mb"] * 1.2
    assert life["first_request_ms"]["median"] > 0
    assert set(result["variants"]) == set(session.VARIANTS)
    for found in result["variants"].values():
        assert found["peak_mb"] >= found["loaded_mb"] > 0
    assert set(result["binding"]["ms"]) == {"returned", "new", "kept"}
    session.show(result)
    assert "import" in capsys.readouterr().out
