"""The exported graph against the network it came from, in a fresh process.

Run as ``python -m export.parity MODEL REQUEST RULE``: a process that has never seen the
network opens the graph as a user's would, with stock ONNX Runtime and no library registered.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.detection_parity import compare_detections
from export.rules import Rule
from fdconv_deploy.errors import ExportError
from fdconv_deploy.runtime.manifest import OutputParity

Arrays = Mapping[str, NDArray]


def compare(name: str, actual: NDArray, expected: NDArray, *, classes: bool) -> OutputParity:
    """Errors of one output; ``classes``: whether axis 1 holds scores one is chosen from.

    Raises:
        ExportError: the shapes or types differ, or the graph's answer is not finite.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise ExportError(
            f"output {name!r} of the exported graph is {actual.dtype} {actual.shape}, the "
            f"network's is {expected.dtype} {expected.shape}."
        )
    if not np.isfinite(actual).all():
        raise ExportError(
            f"output {name!r} of the exported graph holds values that are not finite."
        )
    difference = float(np.abs(actual.astype(np.float64) - expected).max(initial=0))
    largest = float(np.abs(expected).max(initial=0))
    agreement = None
    if classes and actual.ndim >= 2 and actual.shape[1] > 1:
        agreement = float((actual.argmax(1) == expected.argmax(1)).mean())
    return OutputParity(
        name=name,
        max_abs=difference,
        max_rel=difference / largest if largest else difference,
        argmax_agreement=agreement,
    )


def compare_all(actual: Arrays, expected: Arrays, rule: Rule) -> tuple[OutputParity, ...]:
    """Errors of all outputs, by the rule for their kind of network.

    Raises:
        ExportError: as `compare` and `compare_detections`.
    """
    found = tuple(
        compare(name, actual[name], expected[name], classes=rule.kind == "classes")
        for name in expected
    )
    if rule.kind == "detections":
        return compare_detections(actual, expected, rule.score_thr)
    return found


def measure(
    model: Path, inputs: Arrays, expected: Arrays, folder: Path, *, rule: Rule
) -> tuple[OutputParity, ...]:
    """Run ``model`` on ``inputs`` in a fresh process and compare with ``expected``.

    Args:
        folder: for the request's files; the caller removes it.

    Raises:
        ExportError: the graph does not load or run, or names, shapes or types differ.
    """
    request = folder / "request.npz"
    tensors = {f"in.{k}": v for k, v in inputs.items()}
    tensors |= {f"out.{k}": v for k, v in expected.items()}
    np.savez(request, **tensors)  # type: ignore[arg-type]
    described = json.dumps(asdict(rule))
    command = [sys.executable, "-m", "export.parity", str(model), str(request), described]
    # Beside this package, wherever the caller was started from.
    root = str(Path(__file__).resolve().parents[1])
    finished = subprocess.run(  # noqa: S603 - our own interpreter and module
        command, capture_output=True, text=True, cwd=root, check=False
    )
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or ["it gave no reason"]
        raise ExportError(f"the exported graph did not pass its check: {lines[-1]}")
    return tuple(OutputParity.model_validate(o) for o in json.loads(finished.stdout))


def _main(arguments: list[str]) -> int:
    import onnxruntime

    model, request, described = arguments
    with np.load(request) as tensors:
        inputs = {k[3:]: tensors[k] for k in tensors.files if k.startswith("in.")}
        expected = {k[4:]: tensors[k] for k in tensors.files if k.startswith("out.")}
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    if sorted(names) != sorted(expected):
        print(f"its outputs are {sorted(names)}, expected {sorted(expected)}", file=sys.stderr)
        return 1
    actual = dict(zip(names, session.run(names, inputs), strict=True))
    try:
        report = compare_all(actual, expected, Rule(**json.loads(described)))
    except ExportError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps([o.model_dump() for o in report]))
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
