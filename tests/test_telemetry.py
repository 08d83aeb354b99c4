"""Telemetry is off in every command and in the library: ONNX Runtime's unless the user sets it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version
from PIL import Image

from fdconv_deploy.environment import installed_version
from tests.runtime import toy

OPENVINO = "from fdconv_deploy import open_session; open_session('bundle', 'openvino').warm_up()"
COMMANDS = {
    "segment": ["-m", "fdconv_deploy", "segment", "bundle", "image.png", "-o", "results"],
    "bench": ["-m", "fdconv_deploy", "bench", "bundle", "--seconds", "0.01", "--batch", "1"],
    "doctor": ["-m", "fdconv_deploy", "doctor"],
    "library": ["-c", "from fdconv_deploy import open_session; open_session('bundle').warm_up()"],
    "openvino": ["-c", OPENVINO],
    "service": ["-c", "import fdconv_deploy.serve.app; import onnxruntime"],
    "worker": ["-c", "import fdconv_deploy.serve.workers; import onnxruntime"],
    "export": ["-m", "fdconv_deploy.export.validation.subprocess_run", "job.json"],
}


def written(folder: Path, command: list[str], setting: str | None) -> set[str]:
    """What a run leaves in its home and temporary folder."""
    toy.make_bundle(folder / "bundle")
    Image.new("RGB", (48, 32)).save(folder / "image.png")
    (folder / "job.json").write_text('{"library": null, "runs": []}')
    home = folder / "home"
    home.mkdir()
    # ONNX Runtime sends nothing from a CI service, which it knows by variables.
    env = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    env |= {"HOME": str(home), "TMPDIR": str(home), "OMP_NUM_THREADS": "1"}
    env |= {} if setting is None else {"ORT_DISABLE_TELEMETRY": setting}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {path.name for path in home.rglob("*")} & {".ses", "deviceid", "onnxruntime.db", "intel"}


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_collected(tmp_path: Path, name: str) -> None:
    if name == "openvino" and find_spec("openvino") is None:
        pytest.skip("extra [openvino] is not installed")
    assert written(tmp_path, COMMANDS[name], None) == set()


@pytest.mark.skipif(
    Version(installed_version("onnxruntime") or "0") < Version("1.29"), reason="it has none"
)
def test_the_users_own_setting_stays(tmp_path: Path) -> None:
    """Also what shows that the files above are what tells."""
    assert written(tmp_path, COMMANDS["library"], "0") >= {".ses", "deviceid"}
