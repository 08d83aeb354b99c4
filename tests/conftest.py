"""Fixtures every test may use."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Small layers on two busy cores would spend their time waiting for each other's threads.
# Before torch is first imported, since it reads this once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
TEMPORARY: list[Path] = []
# pytest's own folder, torch.compile's cache, what ONNX Runtime writes when it is imported, and
# the engines of tests' stand-in for TensorRT, which live as long as its process.
NOT_OURS = ("pytest-of-", "torchinductor_", ".ses", "fake-engine-")


def pytest_configure(config: pytest.Config) -> None:
    """Give the run a temporary folder of its own, which the processes it starts inherit."""
    if not hasattr(config, "workerinput"):  # not in the processes of pytest-xdist, which inherit it
        TEMPORARY.append(Path(tempfile.mkdtemp(prefix="fdconv-")))
        tempfile.tempdir = os.environ["TMPDIR"] = str(TEMPORARY[0])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that left something behind."""
    for folder in TEMPORARY:
        names = sorted(entry.name for entry in folder.iterdir())
        left = [name for name in names if not name.startswith(NOT_OURS)]
        if left:
            print(f"\nleft in the temporary folder: {', '.join(left)}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:
    """Remove the run's temporary folder."""
    while TEMPORARY:
        shutil.rmtree(TEMPORARY.pop(), ignore_errors=True)


@pytest.fixture(scope="session")
def oracle() -> Path:
    """Folder of reference tensors computed with the published code."""
    path = Path(os.environ.get("FDCONV_ORACLE", ROOT.parent / "shared" / "oracle"))
    if not (path / "README.md").is_file():
        pytest.skip(f"no reference tensors at {path} (set FDCONV_ORACLE)")
    return path


@pytest.fixture
def proved(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Say what a test proved, for the run's summary: a sentence, or one more of a kind.

    What tests print is swallowed where several processes share them.
    """

    def say(what: str, count: int = 0) -> None:
        record_property("proved", [what, count])

    return say


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts: Counter[str] = Counter()
    sentences = []
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties if report.when == "call" else []:
            if name == "proved":
                what, count = value
                if count:
                    counts[what] += count
                else:
                    sentences.append(what)
    lines = [*(f"{count} {what}" for what, count in sorted(counts.items())), *sorted(sentences)]
    if lines:
        terminalreporter.section("proved without a GPU")
        for line in lines:
            terminalreporter.line(line)
