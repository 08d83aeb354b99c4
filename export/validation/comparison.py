"""How far a graph's answers are from its network's, output by output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from fdconv_deploy.export.validation.detections import compare_detections
from numpy.typing import NDArray

from fdconv_deploy.errors import ExportError
from fdconv_deploy.runtime.manifest import OutputParity
from fdconv_deploy.runtime.resize import logit_of

Arrays = Mapping[str, NDArray]
# A mask is a sigmoid of sums over a hundred thousand numbers: ten times what a score may err.
MASK_SLACK = 10.0


@dataclass(frozen=True)
class Rule:
    """``values``: number by number. ``classes``: and which of axis 1's scores is highest.

    ``threshold``: of classes told by one score, the probability that its sigmoid is compared
    with.

    ``detections``: object by object, see `validation.detections`; a network of this kind
    leaves out objects of a score up to ``score_thr``.
    """

    kind: Literal["values", "classes", "detections"] = "values"
    score_thr: float = 0.0
    threshold: float | None = None

    def slack(self, output: str) -> float:
        """How many times the tolerance this output may err."""
        return MASK_SLACK if self.kind == "detections" and output == "masks" else 1.0


def compare(
    name: str,
    actual: NDArray,
    expected: NDArray,
    *,
    classes: bool,
    threshold: float | None = None,
) -> OutputParity:
    """Errors of one output.

    Args:
        classes: whether axis 1 holds scores that a class is chosen by.
        threshold: of a single score, the probability above which it means class 1.

    What is expected of a float32 output may be given in float64.

    Raises:
        ExportError: the shapes or types differ, or the graph's answer is not finite.
    """
    same = actual.dtype == expected.dtype
    same = same or (actual.dtype == np.float32 and expected.dtype == np.float64)
    if actual.shape != expected.shape or not same:
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
    elif classes and threshold is not None:
        cut = np.float32(logit_of(threshold))
        agreement = float(((actual > cut) == (expected > cut)).mean())
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
        compare(
            name,
            actual[name],
            expected[name],
            classes=rule.kind == "classes",
            threshold=rule.threshold,
        )
        for name in expected
    )
    if rule.kind == "detections":
        return compare_detections(actual, expected, rule.score_thr, others)
    return found
