"""The parent's end of a `child`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.latency import machine
from fdconv_deploy.latency.interleaving import Turn
from fdconv_deploy.latency.targets import Side, UnavailableError


class Child(contextlib.AbstractContextManager["Child"]):
    """A side in a process of its own, opened and run once. A context manager.

    ``opened``: what the child said of opening. ``cpu_seconds``: CPU time it has taken so far.

    :raises UnavailableError: its backend is not to be had here.
    :raises FDConvError: it cannot be opened or run.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        self.cpu_seconds = 0.0
        self.peak_mb = 0.0
        self.device_mb: float | None = None
        # Closed in `close`: it lives as long as the process.
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115
        path = os.pathsep.join([str(machine.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter and package
            [sys.executable, "-m", "fdconv_deploy.latency.workers", side.as_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(side.threads)},
        )
        try:
            self.opened = self._read()
            self.cpu_seconds, self.peak_mb = self.opened["cpu"], self.opened["peak_mb"]
        except BaseException:
            self.close()
            raise

    def turn(self, runs: int, concurrency: int) -> Turn:
        """Run ``runs`` times in each of ``concurrency`` threads.

        :raises FDConvError: a run failed.
        """
        assert self._process.stdin is not None
        try:
            request = json.dumps({"runs": runs, "concurrency": concurrency})
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it died of is read below
        found = self._read()
        self.cpu_seconds, self.peak_mb = found["cpu"], found["peak_mb"]
        if found["device_mb"] is not None:
            self.device_mb = max(self.device_mb or 0.0, found["device_mb"])
        return Turn(tuple(found["seconds"]), found["wall"], found["joules"])

    def close(self) -> None:
        """End the process; a child that runs is not waited for."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it ended before it was told to
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise FDConvError(f"{self.side.name} {self._end()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            kind = UnavailableError if found["unavailable"] else FDConvError
            raise kind(found["error"])
        return found

    def _end(self) -> str:
        code = self._process.wait()
        if code == -9:
            return "was killed, most likely for want of memory. Free some, or time fewer sides."
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"ended with {code}: {lines[-1] if lines else 'it gave no reason'}"

    def __exit__(self, *_: object) -> None:
        self.close()
