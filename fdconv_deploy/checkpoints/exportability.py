"""Whether a checkpoint can be exported, and the command that does it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from fdconv_deploy.checkpoints.inspect import Report

_EXAMPLE_SIZE = (512, 512)


def export_command(report: Report, options: Sequence[str] = ()) -> str | None:
    """A command line that exports the inspected checkpoint, ready to be pasted.

    Args:
        report: of a file (`Report.path` is its path).
        options: those given to ``inspect`` that ``export`` needs too, such as ``--config``.

    Returns:
        The command, or None where export would refuse the checkpoint.
    """
    if not report.ready:
        return None
    source = Path(report.path)
    words = ["fdconv", "export", str(source), "-o", f"{source.stem}_bundle", *options]
    if needs_size(report):
        height, width = report.training_size or _EXAMPLE_SIZE
        words += ["--size", f"{height}x{width}"]
    return shlex.join(words)


def needs_size(report: Report) -> bool:
    """Whether export asks for ``--size``: of a segmentor that was tested on whole images."""
    return report.architecture is not None and report.architecture.test.mode == "whole"
