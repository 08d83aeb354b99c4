"""The allocator's settings, in a process of their own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys, os
import numpy as np
from serve.memory import return_large_blocks
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
