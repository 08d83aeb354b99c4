"""The package's public face."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fdconv_deploy.checkpoints as checkpoints


def test_importing_loads_no_torch() -> None:
    code = "import fdconv_deploy.checkpoints, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_name_is_there() -> None:
    for name in checkpoints.__all__:
        assert callable(getattr(checkpoints, name))
        assert name in dir(checkpoints)
    assert {"load_checkpoint", "read_checkpoint", "inspect_checkpoint", "save_checkpoint"} <= set(
        checkpoints.__all__
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        checkpoints.nothing  # noqa: B018 - the access is the test
