"""What a model is to the service: its name, its bundle, and the version that is loaded."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from fdconv_deploy.serve.schemas import Benchmark, ModelCard

from fdconv_deploy.runtime import Session
from fdconv_deploy.runtime.batching import least_seconds
from fdconv_deploy.runtime.bundle import MANIFEST_NAME

# What timing may add to a model's loading, beyond one run of each batch size.
MOST_SECONDS = 1.0
Fingerprint = tuple[int, int, int]


@dataclass(eq=False)
class Version:
    """One opened state of a model's bundle."""

    name: str
    session: Session
    card: ModelCard
    owned: bool
    leases: int = 0
    retired: bool = False


@dataclass(eq=False)
class Model:
    """A name, the bundle behind it, and the version that is loaded, if one is."""

    name: str
    path: Path
    card: ModelCard
    session: Session | None = None  # the caller's own, already open
    fingerprint: Fingerprint | None = None
    version: Version | None = None
    loading: asyncio.Task[Version] | None = None
    generation: int = 0
    last_used: float = 0.0
    error: str | None = None
    wanted: bool = True  # False once it was unloaded by hand


def fingerprint(path: Path) -> Fingerprint | None:
    """What changes when a bundle is written anew; None when there is no bundle."""
    try:
        found = os.stat(path / MANIFEST_NAME)  # noqa: PTH116 - the exact fields
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def bundles_in(folder: Path) -> list[Path]:
    """The bundles right inside a folder, by name; hidden ones are not looked at."""
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and (path / MANIFEST_NAME).is_file()
    )


def timed_runs(session: Session) -> list[Benchmark]:
    """The least time of a few runs of each batch size, of the network alone.

    Args:
        session: warmed up, so that no run pays for loading a graph.
    """
    runs = {}
    for batch, specs in session.bundle.manifest.inputs.items():
        feeds = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in specs}
        runs[batch] = partial(session.run_batches, feeds)
    return [
        Benchmark(batch=batch, milliseconds=round(seconds * 1e3, 3))
        for batch, seconds in sorted(least_seconds(runs, seconds=MOST_SECONDS).items())
    ]
