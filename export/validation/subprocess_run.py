"""Graphs run in a fresh process, by stock ONNX Runtime.

Run as ``python -m fdconv_deploy.export.validation.subprocess_run JOB``: a process that has
never seen the network opens each graph as a user's would, and imports no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.errors import ExportError

Arrays = Mapping[str, NDArray]
FAILED = "the exported graph did not pass its check"


@dataclass(frozen=True)
class Run:
    """One graph on one input.

    feeds: by input name, .npy files that are joined along the first axis and brought to the
    input's shape. answers: by output name, the .npy file to write.
    """

    model: str
    feeds: Mapping[str, Sequence[str]]
    answers: Mapping[str, str]


def run_fresh(runs: Sequence[Run], folder: Path, library: Path | None = None) -> None:
    """Run graphs one after the other in a process of their own, described in a file in ``folder``.

    ``library``: of native operators to register; none is stock ONNX Runtime.

    Raises:
        ExportError: a graph does not load or run, or its outputs have other names.
    """
    job = folder / "job.json"
    described = {"library": library and str(library), "runs": [asdict(run) for run in runs]}
    job.write_text(json.dumps(described))
    finished = subprocess.run(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", "fdconv_deploy.export.validation.subprocess_run", str(job)],
        capture_output=True,
        text=True,
        cwd=folder,  # no module of the caller's folder is met there
        check=False,
    )
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or ["it gave no reason"]
        raise ExportError(f"{FAILED}: {lines[-1]}")


def fresh(path: Path, names: Collection[str], folder: Path) -> Callable[[Arrays], Arrays]:
    """What runs a graph in a fresh process; ``names`` are its outputs, ``folder`` for files."""

    def run(feed: Arrays) -> Arrays:
        answers = {name: str(folder / f"answer{i}.npy") for i, name in enumerate(names)}
        run_fresh([Run(str(path.absolute()), saved(feed, folder), answers)], folder)
        return {name: np.load(file) for name, file in answers.items()}

    return run


def saved(feed: Arrays, folder: Path) -> dict[str, list[str]]:
    """The files of a feed's tensors, as `Run` takes them."""
    for i, values in enumerate(feed.values()):
        np.save(folder / f"feed{i}.npy", values)
    return {name: [str(folder / f"feed{i}.npy")] for i, name in enumerate(feed)}


def _main(job: Path) -> None:
    import onnxruntime

    described = json.loads(job.read_text())
    for run in described["runs"]:
        options = onnxruntime.SessionOptions()
        if described["library"]:
            options.register_custom_ops_library(described["library"])
        session = onnxruntime.InferenceSession(
            run["model"], options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        if sorted(names) != sorted(run["answers"]):
            sys.exit(f"its outputs are {sorted(names)}, expected {sorted(run['answers'])}")
        shapes = {entry.name: entry.shape for entry in session.get_inputs()}
        feeds = {}
        for name, files in run["feeds"].items():
            joined = np.concatenate([np.load(file) for file in files])
            known = all(isinstance(length, int) for length in shapes.get(name, [None]))
            # A layer's images may be channels of one image in its graph, its tokens a map's
            # pixels; no image is lost.
            same = known and np.prod(shapes[name]) == joined.size
            same = same and (joined.ndim > 2 or joined.ndim != len(shapes[name]))
            feeds[name] = joined.reshape(shapes[name]) if same else joined
        for name, values in zip(names, session.run(names, feeds), strict=True):
            np.save(run["answers"][name], values)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
