"""``fdconv doctor``: what is here, and what to install for the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fdconv_deploy import environment
from fdconv_deploy.cli import doctor
from fdconv_deploy.cli.app import app
from fdconv_deploy.errors import BackendError
from fdconv_deploy.runtime import open_session
from fdconv_deploy.version import __version__
from tests.runtime import toy


def test_doctor_lists_what_is_installed() -> None:
    answer = CliRunner().invoke(app, ["doctor", "--json"])
    assert answer.exit_code == 0
    found = json.loads(answer.stdout)
    assert found["fdconv_deploy"] == __version__
    assert found["backends"]["onnxruntime-cpu"] is None
    assert "CPUExecutionProvider" in found["onnxruntime_providers"]
    extras = {purpose["extra"]: purpose for purpose in found["purposes"]}
    assert {"numpy", "pydantic"} <= set(extras[""]["installed"])
    assert extras["export"]["missing"] == []
    assert extras["export"]["install"] is None


def test_doctor_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    known = environment.installed_version
    monkeypatch.setattr(
        environment, "installed_version", lambda name: None if name == "grpcio" else known(name)
    )
    answer = CliRunner().invoke(app, ["doctor"])
    assert answer.exit_code == 0
    (line,) = [line for line in answer.stdout.splitlines() if "(serve over gRPC):" in line]
    assert "pip install 'grpcio>=" in line


def test_doctor_gives_a_backends_whole_problem_without_the_advice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "libnvinfer.so.11: version 2.31 not found. A newer C library is needed"
    (tmp_path / "tensorrt.py").write_text(f"raise ImportError({text!r})")
    monkeypatch.syspath_prepend(tmp_path)
    answer = CliRunner().invoke(app, ["doctor", "--json"])
    problem = json.loads(answer.stdout)["backends"]["tensorrt"]
    assert problem == f"TensorRT does not load ({text})."


def test_doctor_times_a_bundle_and_recommends_a_backend(tmp_path: Path) -> None:
    bundle = toy.make_bundle(tmp_path / "bundle").path
    answer = CliRunner().invoke(app, ["doctor", str(bundle), "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    timings = {timing["backend"]: timing for timing in found["timings"]}
    usable = [name for name, problem in found["backends"].items() if problem is None]
    assert "onnxruntime-cpu" in timings
    assert {name for name in usable if name.startswith("open")} <= set(timings)
    assert timings["onnxruntime-cpu"]["difference"] < 1e-5
    assert all(timing["milliseconds"] > 0 for timing in timings.values())
    assert found["recommended"].partition(",")[0] in usable


def test_the_fastest_float32_backend_is_recommended() -> None:
    timings = [
        doctor.Timing("onnxruntime-cpu", "native operators", 200.0, 2e-6),
        doctor.Timing("openvino", "native operators", 180.0, 3e-6),
        doctor.Timing("openvino-bf16", "native operators", 110.0, 4e-2),
    ]
    assert doctor.recommended(timings) == (
        "openvino, 180.0 ms a run; openvino-bf16 takes 110.0 ms, and its answers differ by 4.0e-02 "
        "of the largest value"
    )
    assert doctor.recommended(timings[::2]).startswith("onnxruntime-cpu, 200.0 ms a run; openvino")
    slow = [timings[0], doctor.Timing("openvino-bf16", "", 300.0, 4e-2)]
    assert doctor.recommended(slow) == "onnxruntime-cpu, 200.0 ms a run"


def test_doctor_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["doctor", str(tmp_path / "nothing")])
    assert answer.exit_code != 0
    assert "nothing" in str(answer.exception)


@pytest.mark.parametrize("command", [found.callback.__name__ for found in app.registered_commands])
def test_help_cuts_no_options_name_at_80_columns(command: str) -> None:
    answer = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"})
    names = re.findall(r"--[a-z0-9-]+\S*", answer.stdout)
    assert "--help" in names
    assert not [name for name in names if name.endswith("…")]


def test_doctor_fails_where_nothing_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_backends", lambda: {"onnxruntime-cpu": "it is not installed"})
    answer = CliRunner().invoke(app, ["doctor"])
    assert answer.exit_code == 1
    assert "no: it is not installed" in answer.stdout


@pytest.mark.parametrize(
    "command", [*(found.callback.__name__ for found in app.registered_commands), ""]
)
def test_help_shows_no_python_types(command: str) -> None:
    answer = CliRunner().invoke(app, [*([command] if command else []), "--help"])
    assert answer.exit_code == 0
    for word in ("<bool>", "<path>", "<str>", "<int>", "<float>", "<int range>", "<float range>"):
        assert word not in answer.stdout


def test_doctor_says_that_two_onnxruntimes_overwrite_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = environment.installed_version
    monkeypatch.setattr(
        environment,
        "installed_version",
        lambda name: "1.31.1" if name == "onnxruntime-gpu" else known(name),
    )
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert found["clash"].startswith("onnxruntime and onnxruntime-gpu are installed")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install" in found["clash"]
    assert found["clash"] in found["backends"]["onnxruntime-cuda"]
    assert found["clash"] in CliRunner().invoke(app, ["doctor"]).stdout.replace("\n", "")


def test_doctor_counts_the_onnxruntime_for_gpus_as_one_for_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = environment.installed_version
    versions = {"onnxruntime-gpu": "1.31.1", "onnxruntime": None}

    def version(name: str) -> str | None:
        return versions[name] if name in versions else known(name)

    monkeypatch.setattr(environment, "installed_version", version)
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    (cpu,) = (purpose for purpose in found["purposes"] if purpose["extra"] == "cpu")
    assert cpu["installed"] == {"onnxruntime-gpu": "1.31.1"}
    assert cpu["install"] is None


def test_a_session_says_why_two_onnxruntimes_leave_it_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = toy.make_bundle(tmp_path / "bundle")
    monkeypatch.setattr(environment, "installed_version", lambda _: "1.31.1")
    monkeypatch.setattr(environment, "_RUNTIMES", ("onnxruntime", "onnxruntime-gpu"))
    with open_session(bundle) as session:
        assert session.backend == "onnxruntime-cpu"
        assert "since onnxruntime and onnxruntime-gpu are installed" in session.choice
    with pytest.raises(BackendError, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        open_session(bundle, "onnxruntime-cuda")
