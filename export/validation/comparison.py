"""How far a graph's answers are from its network's, by the kind of network.

Values and classes are compared number by number, a detector's answers object by object. Its rows
are in the order of scores, and two scores that are almost equal may change places, so rows are not
compared with rows. The same object is one of the same class at almost the same place. Each side
must have an object for each of the other's, except where rounding alone decides that it is shown:
at the last place when all are taken, at the score threshold, or where the network itself finds it
or not when its images change by a millionth. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.config import DetectorConfig, SegmentorConfig
from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.validation.tolerance import MASK_MULTIPLE, Precision, measured
from fdconv_deploy.runtime.manifest import OutputParity
from fdconv_deploy.runtime.postprocessing import logit_of

Arrays = Mapping[str, NDArray]

# IoU of the same object, even if it is but a few pixels wide.
SAME_PLACE = 0.95
# Scores as near to an edge as this may fall on either side of it.
EDGE = 1e-4
# Relative change of each pixel that stands for rounding, and how often it is tried.
ROUNDING, PERTURBATIONS = 1e-6, 6


@dataclass(frozen=True)
class Comparison:
    """By which rule the answers of a graph and of its network are compared.

    Attributes:
        kind: ``values``: number by number. ``queries``: likewise, each image by itself.
            ``classes``: and which of axis 1's scores is highest. ``detections``: object by object.
        score_thr: a detector leaves out objects of a score up to this.
        threshold: of a head with one score, the probability above which it means class 1.
    """

    kind: Literal["values", "queries", "classes", "detections"] = "values"
    score_thr: float = 0.0
    threshold: float | None = None

    @classmethod
    def of(cls, network: SegmentorConfig | DetectorConfig | None) -> Comparison:
        """The comparison for a network of this architecture; None is any other module."""
        if isinstance(network, DetectorConfig):
            return cls("detections", network.test.rcnn.score_thr)
        if network is None:
            return cls("values")
        if network.panoptic is not None:
            return cls("queries")
        return cls("classes", threshold=network.decode_head.label_threshold)

    def compare(
        self, actual: Arrays, expected: Arrays, others: Iterable[Arrays] = ()
    ) -> tuple[OutputParity, ...]:
        """Errors of all outputs, by `compare_output`, of objects by `compare_detections`."""
        classes, threshold = self.kind == "classes", self.threshold
        found = tuple(
            compare_output(name, actual[name], values, classes=classes, threshold=threshold)
            for name, values in expected.items()
        )
        if self.kind == "detections":
            return compare_detections(actual, expected, self.score_thr, others)
        return found

    def multiple(self, output: str) -> float:
        """How many times the tolerance this output may err."""
        return MASK_MULTIPLE if self.kind == "detections" and output == "masks" else 1.0

    def error(self, parity: OutputParity, precision: Precision) -> float:
        """The figure of an output that the tolerance itself is compared with."""
        return measured(parity, precision) / self.multiple(parity.name)


def compare_output(
    name: str,
    actual: NDArray,
    expected: NDArray,
    *,
    classes: bool,
    threshold: float | None = None,
) -> OutputParity:
    """Errors of one output.

    Args:
        name: of the output.
        actual: the graph's answer.
        expected: the network's; of a float32 output it may be float64.
        classes: whether axis 1 holds scores that a class is chosen by.
        threshold: of a single score, the probability above which it means class 1.

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
    return _parity(name, difference, largest, agreement)


def _parity(name: str, difference: float, largest: float, agreement: float | None) -> OutputParity:
    relative = difference / largest if largest else difference
    return OutputParity(name=name, max_abs=difference, max_rel=relative, argmax_agreement=agreement)


def compare_detections(
    actual: Arrays,
    expected: Arrays,
    score_thr: float,
    others: Iterable[Arrays] = (),
) -> tuple[OutputParity, ...]:
    """Errors of each output over the objects both sides found.

    Args:
        actual: ``boxes`` (B, D, 4), ``scores`` (B, D), ``labels`` (B, D), ``count`` (B,) and
            perhaps ``masks`` (B, D, h, w), as the graph gives them.
        expected: the same of the network.
        score_thr: objects of a score up to this are left out.
        others: what the network answers when its inputs change by rounding, see `perturbed`;
            taken while there are objects on one side that rounding may explain.

    Returns:
        One entry per output; ``argmax_agreement`` of ``labels`` is the share of objects that have
        their like on the other side: 1, but for those that rounding decides.

    Raises:
        ExportError: an object is on one side only and rounding does not explain it, or the
            graph's rows are out of order, not empty past the count, or not finite.
    """
    _check_form(actual)
    pairs: list[tuple[int, int, int]] = []  # image, row of actual, row of expected
    singles: list[_Single] = []
    total = 0
    for image in range(len(expected["count"])):
        ours, theirs = _Objects.of(actual, image), _Objects.of(expected, image)
        same = _matched(ours, theirs)
        pairs += [(image, a, e) for a, e in same]
        for side, (objects, other) in enumerate(((ours, theirs), (theirs, ours))):
            # A score near the edge itself explains that the other side lacks the object.
            least = other.edge(score_thr) + EDGE
            rows = set(np.flatnonzero(objects.scores > least).tolist()) - {p[side] for p in same}
            singles += [_Single(image, objects.row(n), side == 0) for n in sorted(rows)]
        total += max(len(ours.scores), len(theirs.scores))
    _refuse_unexplained(singles, others)
    agreement = len(pairs) / total if total else 1.0
    report = []
    for name, values in expected.items():
        difference = largest = 0.0
        if name not in ("labels", "count"):
            for image, a, e in pairs:
                own = actual[name][image, a].astype(np.float64)
                difference = max(difference, float(np.abs(own - values[image, e]).max()))
                largest = max(largest, float(np.abs(values[image, e]).max()))
        report.append(_parity(name, difference, largest, agreement if name == "labels" else None))
    return tuple(report)


def perturbed(run: Callable[[Arrays], Arrays], feed: Arrays) -> Iterator[Arrays]:
    """Answers to ``feed`` with its ``images`` changed by a millionth, several times over.

    That is as far as float32 sums of another order take a deep network's features. Greedy
    suppression makes a decision of each such difference: an IoU just under its threshold
    lets a box stay that another rounding removes.
    """
    for seed in range(PERTURBATIONS):
        generator = np.random.default_rng(seed)
        images = feed["images"]
        change = generator.uniform(-ROUNDING, ROUNDING, images.shape).astype(images.dtype)
        yield run({**feed, "images": images * (1 + change)})


@dataclass(frozen=True)
class _Objects:
    """Objects of one image, the best score first; ``full``: no place is left."""

    boxes: NDArray
    scores: NDArray
    labels: NDArray
    full: bool = False

    @classmethod
    def of(cls, answer: Arrays, image: int) -> _Objects:
        count = int(answer["count"][image])
        boxes, scores, labels = (answer[n][image, :count] for n in ("boxes", "scores", "labels"))
        return cls(boxes, scores, labels, count == answer["scores"].shape[1])

    def row(self, row: int) -> _Objects:
        own = slice(row, row + 1)
        return _Objects(self.boxes[own], self.scores[own], self.labels[own])

    def edge(self, score_thr: float) -> float:
        """The score up to which nothing is shown: there is no place left, or it may not be."""
        return max(float(self.scores[-1]), score_thr) if self.full else score_thr


@dataclass(frozen=True)
class _Single:
    """An object that only the graph, or only the network, found in ``image``."""

    image: int
    object: _Objects
    in_graph: bool


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
    """Pairs of rows of one class and place, each row once, the nearest places first."""
    overlap = _overlaps(ours.boxes.astype(np.float64), theirs.boxes.astype(np.float64))
    overlap[ours.labels[:, None] != theirs.labels[None]] = -1
    near = np.argwhere(overlap >= SAME_PLACE)
    pairs = []
    for a, e in near[np.argsort(-overlap[tuple(near.T)], kind="stable")].tolist():
        if overlap[a, e] >= SAME_PLACE:
            pairs.append((a, e))
            overlap[a] = overlap[:, e] = -1
    return pairs


def _overlaps(a: NDArray, b: NDArray) -> NDArray:
    """IoU of each of (N, 4) with each of (M, 4); two equal boxes without area have 1."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - common
    equal = (a[:, None] == b[None]).all(-1)
    return np.where(equal, 1.0, common / np.where(union > 0, union, 1))


def _refuse_unexplained(singles: list[_Single], others: Iterable[Arrays]) -> None:
    """Refuse an object that the network, but for rounding, always finds, or never."""
    tries, answers = 0, iter(others)
    while singles and (answer := next(answers, None)) is not None:
        tries += 1
        singles = [
            one
            for one in singles
            if bool(_matched(one.object, _Objects.of(answer, one.image))) != one.in_graph
        ]
    if not singles:
        return
    single = singles[0]
    has, lacks = ("graph", "network") if single.in_graph else ("network", "graph")
    found = single.object
    place = ", ".join(f"{v:.1f}" for v in found.boxes[0])
    finds = "never finds" if single.in_graph else "finds"
    rounding = (
        f" Rounding does not explain it: the network {finds} it when its images change by a "
        f"millionth, in {tries} of {tries} tries."
    )
    raise ExportError(
        f"in image {single.image} the {has} finds class {found.labels[0]} at ({place}) with score "
        f"{found.scores[0]:.4f}, and the {lacks} does not.{rounding if tries else ''}"
    )
