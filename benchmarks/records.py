"""Results as files: JSON, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fdconv_deploy.atomic_write import write_atomically

FOLDER = Path(__file__).parent / "results"


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record; an older file of that name is replaced at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def newest(kind: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """The record of a kind that was measured last; None where there is none."""
    return next(iter(every(kind, folder)), None)


def every(kind: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The records of a kind, the last first."""
    found = [record for path in sorted(folder.glob("*.json")) for record in [_read(path)]]
    found = [record for record in found if record.get("kind") == kind]
    return sorted(found, key=lambda record: str(record["machine"]["date"]), reverse=True)


def _read(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if isinstance(record, dict) else {}
