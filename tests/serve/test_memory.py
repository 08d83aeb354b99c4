"""The process's own settings, each in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys, os
import numpy as np
from fdconv_deploy.serve.app import return_large_blocks
if sys.argv[1] == "set":
    assert return_large_blocks()
page = os.sysconf("SC_PAGE_SIZE")
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page / 2**20
np.ones(24 << 20, np.uint8)  # a large image, freed: glibc's threshold is 24 MiB from now on
before, kept = resident(), []
for _ in range(20):
    large = np.ones(12 << 20, np.uint8)
    kept.append(np.ones(200_000, np.uint8))  # what stays, behind it
    del large
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own setting")
def test_what_was_large_does_not_stay() -> None:
    def grown(how: str) -> float:
        command = [sys.executable, "-c", PROGRAM, how]
        return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    assert grown("set") < 6  # what is kept is 4 MB
    assert grown("unset") > 10  # else the setting, or this test, is for nothing


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("3", "3")])
def test_the_command_leaves_the_cores_to_its_own_threads(given: str | None, found: str) -> None:
    """OpenBLAS reads it when numpy is imported, so it is set before; the user's own stays."""
    program = (
        "import atexit, os, sys\n"
        "from fdconv_deploy.cli.app import main\n"
        "assert 'numpy' not in sys.modules\n"
        "atexit.register(lambda: print(os.environ['OPENBLAS_NUM_THREADS']))\n"
        "sys.argv = ['fdconv', 'serve', '/none']\n"
        "main()\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    env |= {} if given is None else {"OPENBLAS_NUM_THREADS": given}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ended.stdout.split()[-1] == found, ended.stderr
