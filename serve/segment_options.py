"""The options of a segment request, and which of them a model can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fdconv_deploy.runtime.detection import SHOWN_SCORE
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.model_cards import ModelCard
from fdconv_deploy.serve.responses import JSON, Form, MaskForm, Output


class SegmentOptions(BaseModel):
    """The query of a segment request."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    output: Output | None = None
    """'json', 'mask' (indexed PNG), 'overlay' (PNG, or JPEG where Accept prefers it) or, of
    segmentors, 'logits' (npz). When not given, the Accept header chooses."""
    mask: MaskForm = "rle"
    """How JSON holds masks: run lengths (COCO's for a detector's objects), polygons, or not at
    all."""
    classes: list[str] | None = Field(default=None, max_length=200, examples=[["road", "3"]])
    """Only these classes, by name or id, repeated or separated by commas. Elsewhere masks hold 255
    (transparent), run lengths -1, and overlays the image."""
    min_score: float | None = Field(default=None, ge=0, le=1)
    """Leave out a detector's objects that score less; 0.3 when not given, 0 for all that the
    network gives."""
    opacity: float = Field(default=0.5, ge=0, le=1)
    """Opacity of the colours in an overlay."""
    size: Literal["original", "network"] | None = None
    """Size of the answer: the image's own, or the network's input as far as the image covers it.
    When not given: the image's own; for logits, the network's output."""
    fit: Literal["stretch", "pad"] | None = None
    """How an image of another aspect ratio is fitted; see the model's card."""
    mode: Literal["whole", "slide"] | None = None
    """Whole image or sliding window; see the model's card."""


@dataclass(frozen=True)
class SegmentRequest:
    """A request's options, checked against the model they are for.

    Attributes:
        kept: ids of the classes asked for; None for all.
    """

    form: Form
    options: SegmentOptions
    mode: Literal["whole", "slide"]
    kept: tuple[int, ...] | None

    @property
    def min_score(self) -> float:
        """Least score of a detector's objects."""
        return SHOWN_SCORE if self.options.min_score is None else self.options.min_score


def check_options(card: ModelCard, options: SegmentOptions, form: Form) -> SegmentRequest:
    """Check a request's options against the card of its model.

    Raises:
        RefusedError: 406 or 422, the model cannot do what an option asks for.
    """
    if card.instances is not None:
        _check_detector(card, options, form)
    elif options.min_score is not None and card.queries is None:
        raise RefusedError(
            422, f"The model {card.name!r} labels pixels, which have no scores: no min_score."
        )
    mode = options.mode or card.mode
    if mode not in card.modes:
        raise RefusedError(
            422,
            f"The model {card.name!r} does not run in mode {mode!r}, only in "
            f"{', '.join(card.modes)}: its bundle records no stride that fits its input.",
        )
    if mode == "slide" and (options.size == "network" or form.output == "logits"):
        raise RefusedError(
            422,
            "In mode 'slide' the network sees many crops, so there are no logits of one run and "
            "no one network size. Ask for mode=whole, or for labels at the original size.",
        )
    if form.output == "logits" and card.output is None:
        raise RefusedError(
            406,
            f"The model {card.name!r} gives segments, and no logits of pixels. Ask for {JSON}, "
            "or for its tensors at /v2.",
        )
    kept = None if options.classes is None else _class_ids(card, options.classes)
    most = 256 if kept is None else 255
    if form.output == "mask" and card.instances is None and len(card.classes) > most:
        raise RefusedError(
            406,
            f"An indexed PNG holds at most {most} classes"
            + ("" if kept is None else " beside the value for the others")
            + f", and the model {card.name!r} has {len(card.classes)}. Ask for {JSON} or "
            "?output=overlay.",
        )
    return SegmentRequest(form, options, mode, kept)


def _check_detector(card: ModelCard, options: SegmentOptions, form: Form) -> None:
    if form.output == "logits":
        raise RefusedError(
            406,
            f"The model {card.name!r} is a detector, which has no logits. Ask for {JSON}, or for "
            "its tensors at /v2.",
        )
    if form.output == "mask" and card.instances is not None and not card.instances.masks:
        raise RefusedError(
            406, f"The model {card.name!r} gives boxes and no masks. Ask for {JSON} or an overlay."
        )
    if options.size == "network" or options.fit == "stretch":
        raise RefusedError(
            422,
            f"The model {card.name!r} is a detector: images keep their aspect ratio, and answers "
            "are in pixels of the image. Leave size and fit out.",
        )


def _class_ids(card: ModelCard, classes: list[str]) -> tuple[int, ...]:
    """The ids of classes given by name, by id, or as several of them with commas between."""
    ids = {str(entry.id): entry.id for entry in card.classes}
    ids |= {entry.name: entry.id for entry in card.classes}
    found: set[int] = set()
    for text in classes:
        for part in [text] if text in ids else text.split(","):
            name = part.strip()
            if name not in ids:
                raise RefusedError(
                    422,
                    f"The model {card.name!r} has no class {name[:60]!r}; its card lists them, by "
                    "name and id.",
                )
            found.add(ids[name])
    return tuple(sorted(found))
