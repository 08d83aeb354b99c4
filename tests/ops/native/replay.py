"""Runs of the native operators, recorded here and repeated on another processor.

``record``: every session that the tests of instruction sets run, with its answers. ``replay``, of
which all that is needed is numpy and ONNX Runtime: the same sessions, against these answers.
"""

from __future__ import annotations

import hashlib
import pickle
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

# Either side is within 2e-6 of float64.
TOLERANCE = 4e-6
MODULES = "instructions", "test_blocked_assembly"


def record(folder: Path, library: Path) -> int:
    """Write each run as a file; how many there are."""
    session = onnxruntime.InferenceSession

    class Recorder:
        def __init__(self, model: bytes, *arguments: Any, **named: Any) -> None:
            self.model, self.session = model, session(model, *arguments, **named)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.session, name)

        def run(self, names: Any, feeds: dict[str, Any]) -> list[Any]:
            answers = self.session.run(names, feeds)
            key = hashlib.sha256(self.model + b"".join(x.tobytes() for x in feeds.values()))
            content = pickle.dumps((self.model, names, feeds, answers))
            (folder / f"{key.hexdigest()[:16]}.run").write_bytes(content)
            return list(answers)

    onnxruntime.InferenceSession = Recorder
    sys.argv = ["record", str(library)]
    for name in MODULES:
        runpy.run_module(f"tests.ops.native.{name}", run_name="__main__")
    return len(list(folder.glob("*.run")))


def replay(folder: Path, library: Path) -> int:
    """How many runs were right, whatever the number of threads; exits where one was not."""
    paths = sorted(folder.glob("*.run"))
    for path in paths:
        model, names, feeds, expected = pickle.loads(path.read_bytes())  # our own
        answers = []
        for threads in (1, 3):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.register_custom_ops_library(str(library))
            session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
            answers.append(session.run(names, feeds))
        for one, several, right in zip(*answers, expected, strict=True):
            error = np.abs(one - right).max() / max(np.abs(right).max(), 1e-30)
            if not error <= TOLERANCE or not np.array_equal(one, several):
                sys.exit(f"{path.name}: error {error:.1e}, or threads change it")
    return len(paths)


if __name__ == "__main__":
    action = {"record": record, "replay": replay}[sys.argv[1]]
    count = action(Path(sys.argv[2]), Path(sys.argv[3]))
    print(f"{sys.argv[1]}: {count} runs")
