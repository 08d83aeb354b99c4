"""Two detectors' answers compared object by object.

Rows are in the order of scores, and two scores that are almost equal may change places, so
rows are not compared with rows. The same object is one of the same class at almost the same
place. Each side must have an object for each of the other's, except where rounding alone
decides that it is shown: at the last place when all are taken, or at the score threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.errors import ExportError
from fdconv_deploy.runtime.manifest import OutputParity

Arrays = Mapping[str, NDArray]

# Of the same object, even if it is but a few pixels wide.
SAME_PLACE = 0.95
# Scores as near to an edge as this may fall on either side of it.
EDGE = 1e-4


def compare_detections(
    actual: Arrays, expected: Arrays, score_thr: float
) -> tuple[OutputParity, ...]:
    """Errors of each output over the objects both sides found.

    Args:
        actual, expected: ``boxes`` (B, D, 4), ``scores`` (B, D), ``labels`` (B, D), ``count``
            (B,) and perhaps ``masks`` (B, D, h, w), as the graph and the network give them.
        score_thr: objects of a score up to this are left out.

    Returns:
        One entry per output. ``argmax_agreement`` of ``labels`` is the share of objects that
        have their like on the other side: 1, but for those at an edge.

    Raises:
        ExportError: an object is on one side only, or the graph's rows are out of order, not
            empty past the count, or not finite.
    """
    _check_form(actual)
    pairs: list[tuple[int, int, int]] = []  # image, row of actual, row of expected
    found = total = 0
    for image in range(len(expected["count"])):
        ours, theirs = _rows(actual, image), _rows(expected, image)
        same = _matched(ours, theirs)
        pairs += [(image, a, e) for a, e in same]
        edges = [_edge(side, score_thr) for side in (ours, theirs)]
        _refuse_singles(image, ours, {a for a, _ in same}, "graph", "network", edges[1])
        _refuse_singles(image, theirs, {e for _, e in same}, "network", "graph", edges[0])
        found += len(same)
        total += max(len(ours.scores), len(theirs.scores))
    report = []
    for name, values in expected.items():
        difference = largest = 0.0
        if name not in ("labels", "count"):
            for image, a, e in pairs:
                own = actual[name][image, a].astype(np.float64)
                difference = max(difference, float(np.abs(own - values[image, e]).max()))
                largest = max(largest, float(np.abs(values[image, e]).max()))
        report.append(
            OutputParity(
                name=name,
                max_abs=difference,
                max_rel=difference / largest if largest else difference,
                argmax_agreement=(found / total if total else 1.0) if name == "labels" else None,
            )
        )
    return tuple(report)


@dataclass(frozen=True)
class _Objects:
    """Those of one image; ``full``: no place is left."""

    boxes: NDArray
    scores: NDArray
    labels: NDArray
    full: bool


def _rows(answer: Arrays, image: int) -> _Objects:
    count = int(answer["count"][image])
    boxes, scores, labels = (answer[n][image, :count] for n in ("boxes", "scores", "labels"))
    return _Objects(boxes, scores, labels, count == answer["scores"].shape[1])


def _check_form(actual: Arrays) -> None:
    for image, count in enumerate(actual["count"]):
        if not 0 <= count <= actual["scores"].shape[1]:
            raise ExportError(f"the graph counts {count} objects in image {image}.")
        for name, values in actual.items():
            if not np.isfinite(values).all():
                raise ExportError(
                    f"output {name!r} of the exported graph holds values that are not finite."
                )
            if name != "count" and values[image, count:].any():
                raise ExportError(
                    f"output {name!r} of the exported graph is not empty past the count."
                )
        if (np.diff(actual["scores"][image]) > 0).any():
            raise ExportError("the exported graph's objects are not in the order of their scores.")


def _matched(ours: _Objects, theirs: _Objects) -> list[tuple[int, int]]:
    """Pairs of rows, each row once, the nearest places first."""
    overlap = _overlaps(ours.boxes.astype(np.float64), theirs.boxes.astype(np.float64))
    overlap[ours.labels[:, None] != theirs.labels[None]] = -1
    pairs = []
    for flat in np.argsort(-overlap, axis=None, kind="stable"):
        a, e = np.unravel_index(flat, overlap.shape)
        if overlap[a, e] < SAME_PLACE:
            if overlap[a, e] == -1:
                break
            continue
        pairs.append((int(a), int(e)))
        overlap[a] = overlap[:, e] = -1
    return pairs


def _overlaps(a: NDArray, b: NDArray) -> NDArray:
    """IoU of each of (N, 4) with each of (M, 4); two equal boxes without area have 1."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    areas = [(side[:, 2:] - side[:, :2]).prod(-1) for side in (a, b)]
    union = areas[0][:, None] + areas[1][None] - common
    equal = (a[:, None] == b[None]).all(-1)
    return np.where(equal, 1.0, common / np.where(union > 0, union, 1))


def _edge(side: _Objects, score_thr: float) -> float:
    """The score up to which this side shows nothing: it has no place left, or may not."""
    return max(float(side.scores[-1]), score_thr) if side.full else score_thr


def _refuse_singles(
    image: int, side: _Objects, matched: set[int], has: str, lacks: str, edge: float
) -> None:
    for row in sorted(set(range(len(side.scores))) - matched):
        score = float(side.scores[row])
        if score > edge + EDGE:
            place = ", ".join(f"{v:.1f}" for v in side.boxes[row])
            raise ExportError(
                f"in image {image} the {has} finds class {side.labels[row]} at ({place}) with "
                f"score {score:.4f}, and the {lacks} does not."
            )
