"""The verdict on a graph: is it its network, as far as float32 can tell?

The claim is about the fold. Each FDConv layer is judged on the network's own inputs to it, and
the whole beside what float32 itself costs on that input. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fdconv_deploy.export.validation.tolerance import Outcome
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

    def as_dict(self) -> dict[str, Any]:
        """For JSON; figures that are not finite are null."""
        figures = {"error": self.error, "rounding": self.rounding, "allowed": self.allowed}
        return {
            "part": self.part,
            "source": self.source,
            "batch": self.batch,
            **{n: v if v is not None and v < float("inf") else None for n, v in figures.items()},
            "outcome": self.outcome,
        }

    def figures(self) -> str:
        """The error beside what it is judged by."""
        unit = "of positions of another class" if self.counts_classes else "of its largest value"
        off = self.problem or f"{self.error:.1e} {unit} (tolerance {self.allowed:.0e})"
        if self.rounding is None:
            return off
        return f"{off}, where float32 rounding alone makes {_amount(self.rounding)}"


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
                what += ". This input cannot tell: the network amplifies rounding on it"
            lines.append(f"{what}.")
        if self.layers:
            worst, count = self._worst(), len(self.layers)
            sources = " and ".join(dict.fromkeys(f.source for f in self.layers))
            lines.append(
                f"Layer by layer, on the network's own inputs to each ({sources}): {count} parts, "
                f"nearest to its limit {worst.part}, {worst.figures()}."
            )
        lines.append(self._conclusion())
        return lines

    def _conclusion(self) -> str:
        if self.wrong is not None:
            return f"The graph differs from the network in {self.wrong.part}."
        if self.undecided:
            names = "; ".join(dict.fromkeys(f.part for f in self.undecided[:3]))
            return f"No input could tell whether the graph is the network in {names}."
        if self.conclusive:
            return "The graph is the network."
        return "The graph is the network, layer by layer; none of these inputs can tell the whole."


def refusal(verdict: Verdict, what: str) -> str:
    """Why a graph is not taken for its network, and what to do.

    Args:
        what: the graph, as the subject of a sentence.
    """
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


def _amount(value: float) -> str:
    return f"{value:.1e}" if value < float("inf") else "other objects"
