"""The exported graph against the network it came from, in a fresh process.

Run as ``python -m export.parity MODEL INPUTS ANSWER``: a process that has never seen the
network opens the graph as a user's would, with stock ONNX Runtime and no library registered.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
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


def compare_all(
    actual: Arrays, expected: Arrays, rule: Rule, others: Iterable[Arrays] = ()
) -> tuple[OutputParity, ...]:
    """Errors of all outputs, by the rule for their kind of network.

    ``others``: for detections, see `compare_detections`.

    Raises:
        ExportError: as `compare` and `compare_detections`.
    """
    found = tuple(
        compare(name, actual[name], expected[name], classes=rule.kind == "classes")
        for name in expected
    )
    if rule.kind == "detections":
        return compare_detections(actual, expected, rule.score_thr, others)
    return found


def measure(
    model: Path,
    inputs: Arrays,
    expected: Arrays,
    folder: Path,
    *,
    rule: Rule,
    others: Iterable[Arrays] = (),
) -> tuple[OutputParity, ...]:
    """Run ``model`` on ``inputs`` in a fresh process and compare with ``expected``.

    Args:
        folder: for the files that go there and back; the caller removes it.
        rule: how to compare.
        others: as `compare_all`'s.

    Raises:
        ExportError: the graph does not load or run, or names, shapes or types differ.
    """
    request, answer = folder / "request.npz", folder / "answer.npz"
    np.savez(request, **inputs)  # type: ignore[arg-type]
    command = [sys.executable, "-m", "export.parity", str(model), str(request), str(answer)]
    # Beside this package, wherever the caller was started from.
    root = str(Path(__file__).resolve().parents[1])
    finished = subprocess.run(  # noqa: S603 - our own interpreter and module
        command, capture_output=True, text=True, cwd=root, check=False
    )
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or ["it gave no reason"]
        raise ExportError(f"{_FAILED}: {lines[-1]}")
    with np.load(answer) as tensors:
        actual = {name: tensors[name] for name in tensors.files}
    if sorted(actual) != sorted(expected):
        raise ExportError(
            f"{_FAILED}: its outputs are {sorted(actual)}, expected {sorted(expected)}"
        )
    try:
        return compare_all(actual, expected, rule, others)
    except ExportError as error:
        raise ExportError(f"{_FAILED}: {error}") from error


_FAILED = "the exported graph did not pass its check"


def _main(arguments: list[str]) -> int:
    import onnxruntime

    model, request, answer = arguments
    with np.load(request) as tensors:
        inputs = {name: tensors[name] for name in tensors.files}
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found: dict[str, NDArray] = dict(zip(names, session.run(names, inputs), strict=True))
    np.savez(answer, **found)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
