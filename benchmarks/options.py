"""What the scripts' command lines share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.records import write_json
from fdconv_deploy.latency import machine
from fdconv_deploy.runtime.backends.threads import available_cores


def script(description: str | None, *, threads: bool = True) -> argparse.ArgumentParser:
    """A script's parser, with ``--json`` and, where it chooses threads, ``--threads``."""
    parser = argparse.ArgumentParser(description=description)
    if threads:
        parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", type=Path, help="write the result here too")
    return parser


def keep(
    options: argparse.Namespace, kind: str, where: dict[str, Any], result: dict[str, Any]
) -> None:
    """Say on which machine a result was measured, and write it where ``--json`` says.

    :param kind: what `records.newest` finds it by.
    :param where: the machine, see ``machine.describe``.
    """
    print(machine.say(where))
    if options.json:
        write_json(options.json, {"kind": kind, "machine": where, **result})
