"""Is a graph its network? The judge, and the verdict that it gives.

The claim is about the fold. Each FDConv layer is judged on the network's own inputs to it, and
the whole beside what float32 itself costs on that input; where an input cannot tell, another is
taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.validation.comparison import Arrays, perturbed
from fdconv_deploy.export.validation.layer_graphs import CutGraph, Piece
from fdconv_deploy.export.validation.reference import Observation, Observer
from fdconv_deploy.export.validation.sample_inputs import InputSource, SourceNetwork
from fdconv_deploy.export.validation.subprocess_run import Run, run_fresh, saved
from fdconv_deploy.export.validation.tolerance import (
    LAYER_TOLERANCE,
    ROUNDING_MULTIPLE,
    TOLERANCES,
    Outcome,
    Precision,
    counts_classes,
    decide,
)
from fdconv_deploy.runtime.manifest import OutputParity


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        part: the output's name, or the FDConv layers of a piece.
        source: name of the input.
        batch: the graph's batch size.
        error: what is compared with ``allowed``.
        allowed: the tolerance.
        outcome: see `decide`.
        rounding: what float32 itself costs on this input, where it was measured.
        parity: figures of the output; None where other objects were found.
        problem: which objects those are.
        counts_classes: whether ``error`` is a share of positions of another class, as of int8.
        otherwise: how many of the network's decisions the graph takes another way, counted where
            the error is above a layer's tolerance.
    """

    part: str
    source: str
    batch: int
    error: float
    allowed: float
    outcome: Outcome
    rounding: float | None = None
    parity: OutputParity | None = None
    problem: str = ""
    counts_classes: bool = False
    otherwise: int = 0

    @property
    def least_tolerance(self) -> float:
        """The smallest tolerance that this input could tell at, as `decide` has it."""
        return ROUNDING_MULTIPLE * (self.rounding or 0.0)

    @property
    def below_float32(self) -> bool:
        """Whether nothing could be told because of the tolerance alone.

        At what an export accepts by itself, the network's rounding would not hide an error.
        """
        usual = TOLERANCES["int8" if self.counts_classes else "fp32"]
        return self.outcome == "cannot tell" and self.least_tolerance <= usual

    def as_dict(self) -> dict[str, Any]:
        """For JSON; figures that are not finite are null."""
        figures = {"error": self.error, "rounding": self.rounding, "allowed": self.allowed}
        agreement = self.parity and self.parity.argmax_agreement
        return {
            "part": self.part,
            "source": self.source,
            "batch": self.batch,
            **{n: v if v is not None and v < math.inf else None for n, v in figures.items()},
            "outcome": self.outcome,
            **({"argmax_agreement": agreement} if agreement is not None else {}),
            **({"decided_otherwise": self.otherwise} if self.otherwise else {}),
        }

    def figures(self) -> str:
        """The error beside what it is judged by."""
        unit = "of positions of another class" if self.counts_classes else "of its largest value"
        off = self.problem or f"{self.error:.1e} {unit} (tolerance {self.allowed:.0e})"
        if self.rounding is None:
            return off
        alone = f"{self.rounding:.1e}" if self.rounding < math.inf else "other objects"
        return f"{off}, where float32 rounding alone makes {alone}"


@dataclass(frozen=True)
class Verdict:
    """What was found on one graph, in the order of its inputs.

    Attributes:
        whole: one finding per output and input.
        layers: one per piece, on the input that could tell, and one of the outputs where the
            layers before them see what the network's own do.
    """

    whole: tuple[Finding, ...]
    layers: tuple[Finding, ...] = ()

    @property
    def wrong(self) -> Finding | None:
        """The first finding that is an error of the graph: of layers, if any is."""
        found = [*self.layers, *self.whole]
        return next((finding for finding in found if finding.outcome == "differs"), None)

    @property
    def conclusive(self) -> bool:
        """Whether the whole was compared on an input that can tell."""
        return any(finding.outcome == "equal" for finding in self.whole)

    @property
    def shown(self) -> list[Finding]:
        """On the whole, the findings of the first input that can tell, else of the first."""
        source = next((f.source for f in self.whole if f.outcome == "equal"), self.whole[0].source)
        return [finding for finding in self.whole if finding.source == source]

    @property
    def parity(self) -> tuple[OutputParity, ...]:
        """Of the outputs, as far as they can be compared, see `shown`."""
        return tuple(finding.parity for finding in self.shown if finding.parity is not None)

    @property
    def undecided(self) -> list[Finding]:
        """Pieces that no input could tell; where nothing is cut, the whole."""
        if not self.layers:
            return [] if self.conclusive else list(self.whole)
        return [finding for finding in self.layers if finding.outcome == "cannot tell"]

    @property
    def equal(self) -> bool:
        """Whether the graph is proved to be its network."""
        return self.wrong is None and not self.undecided

    def as_dict(self) -> dict[str, Any]:
        """For JSON: findings on the whole, the worst piece, and the verdict's sentences."""
        return {
            "equal": self.equal,
            "whole": [finding.as_dict() for finding in self.whole],
            "layers": len({name for finding in self.layers for name in finding.part.split(", ")}),
            "worst_layer": self._worst().as_dict() if self.layers else None,
            "verdict": self.sentences(),
        }

    def _worst(self) -> Finding:
        return max(self.layers, key=lambda finding: finding.error / finding.allowed)

    def sentences(self) -> list[str]:
        """What was found, for people, with the figures."""
        lines = []
        for source in dict.fromkeys(f.source for f in self.whole):
            of = [f for f in self.whole if f.source == source]
            blind = [f for f in of if f.outcome == "cannot tell"]
            worst = max(blind or of, key=lambda f: f.error / f.allowed)
            what = f"{source}: {worst.part} differs from the network's by {worst.figures()}"
            if blind:
                why = "the network amplifies rounding on it"
                if worst.below_float32:
                    why = "the tolerance is below what float32 can tell"
                if worst.otherwise:
                    why = f"{worst.otherwise} of the network's decisions fall another way in it"
                    if worst.parity is not None and worst.parity.argmax_agreement is not None:
                        why += f" ({worst.parity.argmax_agreement:.2%} of positions agree in class)"
                what += f". This input cannot tell: {why}"
            elif worst.otherwise:
                what += f"; {worst.otherwise} of the network's decisions fall another way in it"
            lines.append(f"{what}.")
        if self.layers:
            worst, count = self._worst(), len(self.layers)
            sources = " and ".join(dict.fromkeys(f.source for f in self.layers))
            lines.append(
                f"Layer by layer, on the network's own inputs to each ({sources}): {count} parts, "
                f"nearest to its limit {worst.part}, {worst.figures()}."
            )
        conclusion = "The graph is the network."
        if self.wrong is not None:
            conclusion = f"The graph differs from the network in {self.wrong.part}."
        elif self.undecided:
            names = "; ".join(dict.fromkeys(f.part for f in self.undecided[:3]))
            conclusion = f"No input could tell whether the graph is the network in {names}."
        elif not self.conclusive:
            conclusion = (
                "The graph is the network, layer by layer; none of these inputs can tell the whole."
            )
        return [*lines, conclusion]


def refusal(verdict: Verdict, what: str) -> str:
    """Why a graph is not taken for its network, and what to do; ``what`` names it."""
    wrong = verdict.wrong
    if wrong is not None:
        return (
            f"{what} differs from the network: {wrong.part} ({wrong.source}) errs by "
            f"{wrong.figures()}."
        )
    first = verdict.undecided[0]
    tried = ", ".join(dict.fromkeys(finding.source for finding in verdict.whole))
    return (
        f"no input tried ({tried}) can tell whether {what} is the network: {first.part} errs by "
        f"{first.figures()}. Give pictures of the kind the network was trained on."
    )


@dataclass(frozen=True)
class Subject:
    """A graph to be judged.

    Attributes:
        batch: its batch size.
        run: gives its answers to a feed.
        precision: what it computes in, and with that what ``tolerance`` is about.
        tolerance: of an output, see `TOLERANCES`.
        path: of the float32 model to cut into layers, if it shall be.
        library: of the native operators that the layers are run with.
    """

    batch: int
    run: Callable[[Mapping[str, NDArray]], Arrays]
    precision: Precision
    tolerance: float
    path: Path | None = None
    library: Path | None = None


class Judge:
    """Judges graphs of one network; what the network computes is kept for the next graph.

    Args:
        network: with how its answers are compared.
        folder: for files, together as large as the layers' inputs; the caller removes it.
        progress: called with a sentence as each step begins.
    """

    def __init__(
        self,
        network: SourceNetwork,
        folder: Path,
        *,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.network, self.folder, self.progress = network, folder, progress
        # A segmentor's or detector's answer to an image is the same in any batch, so that batches
        # are computed image by image.
        self.independent = network.comparison.kind != "values"
        self.observer = Observer(network.module, network.output_names, folder)
        self._observed: dict[tuple[InputSource, int], Observation] = {}

    def answers(self, source: InputSource, batch: int) -> Arrays:
        """What the network answers, by output name.

        Raises:
            ExportError: some of it is not finite.
        """
        return _finite(self.observe(source, batch, layers=True), source)

    def judge(
        self, subject: Subject, sources: Sequence[InputSource], spares: Sequence[InputSource] = ()
    ) -> Verdict:
        """Compare a graph with the network.

        Args:
            subject: the graph.
            sources: the whole is compared on all of these.
            spares: inputs tried one after the other while the whole or a layer is undecided.

        Raises:
            ExportError: the graph does not load or run, or its answers have another form.
        """
        whole: list[Finding] = []
        layers: dict[tuple[str, ...], Finding] = {}
        cut = None
        if subject.path is not None and self.observer.names:
            cut = CutGraph(subject.path, self.observer.names, self.observer.decisions)
        for number, source in enumerate([*sources, *spares]):
            done = number >= len(sources) and any(f.outcome == "equal" for f in whole)
            undecided = not layers or any(f.outcome == "cannot tell" for f in layers.values())
            cuts = cut if cut is not None and cut.pieces and undecided else None
            if done and cuts is None:
                break
            trial = _Trial(self, subject, source, cuts)
            if not done:
                self.progress(f"batch {subject.batch}: comparing the graph on {source.name}")
                whole += trial.whole()
            if cuts is not None:
                self.progress(f"batch {subject.batch}: comparing layer by layer on {source.name}")
                trial.layers(cuts, layers)
            if any(f.outcome == "differs" for f in (*whole, *layers.values())):
                break
        return Verdict(tuple(whole), tuple(layers.values()))

    def observe(self, source: InputSource, batch: int, *, layers: bool) -> list[Observation]:
        """The network on each image, or on the whole batch where images are not independent."""
        feed = source.rows(batch)
        keys = [(source, row) for row in range(batch)] if self.independent else [(source, -batch)]
        for row, key in enumerate(keys):
            found = self._observed.get(key)
            if found is None or (layers and self.observer.names and not found.layers):
                part = tuple(t[row : row + 1] for t in feed) if self.independent else feed
                act = self.observer.observe if layers else self.observer.answer
                self._observed[key] = act(part)
        return [self._observed[key] for key in keys]


@dataclass(frozen=True)
class _Compared:
    """Two answers compared: by output the error in units of the tolerance, and the figures.

    ``problem``: that other objects were found, in place of figures.
    """

    errors: dict[str, float]
    parities: dict[str, OutputParity]
    problem: str = ""

    @property
    def worst(self) -> float:
        return max(self.errors.values())


class _Trial:
    """A graph and its network on one input; ``cut``: the graph, if its layers are looked at."""

    def __init__(
        self, judge: Judge, subject: Subject, source: InputSource, cut: CutGraph | None
    ) -> None:
        self.subject, self.source, self.cut = subject, source, cut
        self.folder, self.observer = judge.folder, judge.observer
        self.comparison = judge.network.comparison
        self.observed = judge.observe(source, subject.batch, layers=cut is not None)
        feeds = zip(*(one.feed for one in self.observed), strict=True)
        tensors = [torch.cat(row).numpy() for row in feeds]
        self.feed = dict(zip(judge.network.input_names, tensors, strict=True))

    def whole(self) -> list[Finding]:
        """One finding for each of the outputs, beside the network's."""
        tolerance = self.subject.tolerance
        expected = _finite(self.observed, self.source)
        actual = self.subject.run(self.feed)
        found = self._compare(actual, expected, explain=True)
        rounding: dict[str, float] = {}
        otherwise = 0
        if found.worst > min(tolerance, LAYER_TOLERANCE):
            otherwise = self._decided_otherwise()
        if found.worst > tolerance:
            rounding, exact = self._rounding(expected)
            if exact is not None and self.comparison.kind != "detections":
                # What is true is not PyTorch in float32.
                found = self._compare(actual, exact)
        findings = []
        for name, error in found.errors.items():
            decided = decide(error, partial(rounding.__getitem__, name), tolerance, tolerance)
            if otherwise and decided[0] == "differs":
                # One step is enough; whether rounding made it is told by the parts between steps.
                decided = "cannot tell", decided[1]
            times, parity = self.comparison.multiple(name), found.parities.get(name)
            shares = parity is not None and counts_classes(parity, self.subject.precision)
            finding = self._finding(name, error * times, tolerance * times, decided, found.problem)
            findings.append(
                replace(finding, parity=parity, counts_classes=shares, otherwise=otherwise)
            )
        return findings

    def layers(self, cut: CutGraph, layers: dict[tuple[str, ...], Finding]) -> None:
        """Judge the pieces that are still undecided, in place."""
        pieces = [
            p for p in cut.pieces
            if p.tensors not in layers or layers[p.tensors].outcome == "cannot tell"
        ]  # fmt: skip
        with TemporaryDirectory(dir=self.folder) as name:
            answers = self._run_pieces(cut, pieces, Path(name))
            for piece, files in zip(pieces, answers, strict=True):
                finding = self._piece(piece, files) if piece.use else self._outputs(piece, files)
                if piece.tensors not in layers or finding.outcome != "cannot tell":
                    layers[piece.tensors] = finding

    def _finding(
        self,
        part: str,
        error: float,
        allowed: float,
        decided: tuple[Outcome, float | None],
        problem: str = "",
    ) -> Finding:
        batch = self.subject.batch
        return Finding(part, self.source.name, batch, error, allowed, *decided, problem=problem)

    def _compare(self, actual: Arrays, expected: Arrays, *, explain: bool = False) -> _Compared:
        """Compare two answers; ``explain``: to this input, where rounding may explain an object."""

        def ask(feed: Arrays) -> Arrays:
            return self.observer.answer(tuple(map(torch.from_numpy, feed.values()))).answers

        try:
            others = perturbed(ask, self.feed) if explain else ()
            found = self.comparison.compare(actual, expected, others)
        except ExportError as problem:
            if self.comparison.kind != "detections":
                raise
            # Other objects: which, and where.
            return _Compared(dict.fromkeys(expected, math.inf), {}, str(problem).rstrip("."))
        errors = {p.name: self.comparison.error(p, self.subject.precision) for p in found}
        return _Compared(errors, {p.name: p for p in found})

    def _distances(self, actual: Arrays, expected: Arrays) -> dict[str, float]:
        """Of the network's own answers from others of its own, by output."""
        try:
            return self._compare(actual, expected).errors
        except ExportError:  # values that are not finite
            return dict.fromkeys(expected, math.inf)

    def _decided_otherwise(self) -> int:
        """How many decisions of the graph are not the network's."""
        if self.cut is None or not self.cut.decided:
            return 0
        with TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            path, decided = folder / "watched.onnx", self.cut.decided
            taken, _ = self.cut.write(decided.values(), path, {})
            feeds = saved({name: self.feed[name] for name in taken}, folder)
            files = {t: str(folder / f"{i}.npy") for i, t in enumerate(decided.values())}
            run_fresh([Run(str(path), feeds, files)], folder, self.subject.library)
            count = 0
            for use, tensor in decided.items():
                decision = self.observer.decisions[use.partition(".use")[0]]
                own = torch.from_numpy(self._seen(use, "inputs"))
                graphs = torch.from_numpy(np.load(files[tensor])).reshape(own.shape)
                count += int((decision(graphs) != decision(own)).sum())
        return count

    def _seen(self, use: str, what: Literal["inputs", "expected"]) -> NDArray[np.float32]:
        """What a use of a layer sees in the network, all images joined."""
        return np.concatenate([np.load(getattr(one.layers[use], what)) for one in self.observed])

    def _rounding(self, expected: Arrays) -> tuple[dict[str, float], Arrays | None]:
        """What float32 costs the network's outputs, and those in float64."""
        exact = [self.observer.in_double(one) for one in self.observed]
        changed = zip(*(self.observer.change(one) for one in self.observed), strict=True)
        double = _joined([e for e in exact if e is not None]) if None not in exact else None
        costs = [self._distances(_joined(draw), expected) for draw in changed]
        if double is not None:
            costs.append(self._distances(expected, double))
        return {name: max(cost[name] for cost in costs) for name in expected}, double

    def _run_pieces(
        self, cut: CutGraph, pieces: Sequence[Piece], folder: Path
    ) -> list[dict[str, Path]]:
        """Files of each piece's tensors; the pieces run on what the network's layers see."""
        seen = [one.layers for one in self.observed]
        # A layer may see more images than the network does, as windows of them.
        images = {use: sum(layers[use].shape[0] for layers in seen) for use in seen[0]}
        shapes = {use: (images[use], *one.shape[1:]) for use, one in seen[0].items()}
        own = saved(self.feed, folder)
        runs, found = [], []
        for number, piece in enumerate(pieces):
            model = folder / f"piece{number}.onnx"
            taken, given = cut.write(piece.tensors, model, shapes)
            files = {t: folder / f"piece{number}.{i}.npy" for i, t in enumerate(piece.tensors)}
            feeds = {
                t: [str(layers[use].inputs) for layers in seen] if use else own[t]
                for t, use in taken.items()
            }
            runs.append(Run(str(model), feeds, {n: str(files[t]) for t, n in given.items()}))
            found.append(files)
        run_fresh(runs, folder, self.subject.library)
        return found

    def _shift(self) -> None:
        for one in self.observed:
            self.observer.shift(one)

    def _piece(self, piece: Piece, files: Mapping[str, Path]) -> Finding:
        """What the next layer sees in the graph, beside what it sees in the network."""
        expected = self._seen(piece.use, "expected")
        (file,) = files.values()
        found = np.load(file)
        off = float(np.abs(found.reshape(expected.shape) - expected).max(initial=0))
        largest = float(np.abs(expected).max(initial=0)) or 1.0

        def rounding() -> float:
            self._shift()
            return max(one.layers[piece.use].off for one in self.observed) / largest

        error = off / largest if np.isfinite(found).all() else math.inf
        tolerance = max(self.subject.tolerance, LAYER_TOLERANCE)
        part = ", ".join(piece.layers) or f"what is before {piece.use}"
        decided = decide(error, rounding, LAYER_TOLERANCE, tolerance)
        return self._finding(part, error, LAYER_TOLERANCE, decided)

    def _outputs(self, piece: Piece, files: Mapping[str, Path]) -> Finding:
        """The graph's outputs, where its layers see what the network's own do."""
        expected = _joined([one.expected for one in self.observed])
        actual = {name: np.load(files[name]) for name in expected}
        detects = self.comparison.kind == "detections"
        limit = self.subject.tolerance if detects else LAYER_TOLERANCE
        found = self._compare(actual, expected, explain=True)

        def rounding() -> float:
            self._shift()
            own = _joined([one.answers for one in self.observed])
            shifted = _joined([one.shifted or {} for one in self.observed])
            return max(max(self._distances(x, expected).values()) for x in (own, shifted))

        part = ", ".join(piece.layers) or f"what makes {', '.join(expected)}"
        decided = decide(found.worst, rounding, limit, max(self.subject.tolerance, limit))
        return self._finding(part, found.worst, limit, decided, found.problem)


def _joined(parts: Sequence[Arrays]) -> Arrays:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _finite(observed: Sequence[Observation], source: InputSource) -> Arrays:
    """The network's answers, all images joined."""
    answers = _joined([one.answers for one in observed])
    for name, values in answers.items():
        if not np.isfinite(values).all():
            raise ExportError(
                f"the PyTorch network's own output {name!r} on {source.name} holds values that are "
                "not finite, so there is nothing to compare a graph with. Check the checkpoint, "
                "or give pictures of the kind it was trained on (--image)."
            )
    return answers
