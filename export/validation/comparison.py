"""By which rule the answers of a graph and of its network are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
