"""A segment request: its options, and its way from its images' bytes to its answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime import Segmentation
from fdconv_deploy.runtime.detection import SHOWN_SCORE
from fdconv_deploy.runtime.images import FORMATS, ImageFile, check_format, image_cost
from fdconv_deploy.runtime.postprocessing import logits_of, view_of
from fdconv_deploy.runtime.preprocessing import Prepared, resize
from fdconv_deploy.serve.batching import DeadlineError, Outcome
from fdconv_deploy.serve.errors import RefusedError, answer_to
from fdconv_deploy.serve.model_cards import ModelCard
from fdconv_deploy.serve.responses import (
    JSON,
    MAX_JSON,
    MAX_MASKS,
    Answer,
    Form,
    MaskForm,
    Output,
    check_masks,
    json_bytes,
    render,
)
from fdconv_deploy.serve.service import Work
from fdconv_deploy.serve.settings import Settings
from fdconv_deploy.serve.telemetry import Stages, milliseconds
from fdconv_deploy.serve.uploads import Upload


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
    """A request's options, checked against the card of the model they are for."""

    card: ModelCard
    form: Form
    options: SegmentOptions
    mode: Literal["whole", "slide"]
    kept: tuple[int, ...] | None  # ids of the classes asked for; None for all

    @property
    def min_score(self) -> float:
        """Least score of a detector's objects."""
        return SHOWN_SCORE if self.options.min_score is None else self.options.min_score


def check_options(card: ModelCard, options: SegmentOptions, form: Form) -> SegmentRequest:
    """Check a request's options; a 406 or 422 where the model cannot do what one asks for."""
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
    return SegmentRequest(card, form, options, mode, kept)


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


async def segment(
    work: Work, uploads: list[Upload], request: SegmentRequest
) -> tuple[Response, Stages]:
    """Answer an admitted request for one image or several; and its stages."""
    several, card = len(uploads) > 1, work.version.card
    if card is not request.card:  # loaded, or replaced, since it was checked
        request = check_options(card, request.options, request.form)
    images = [
        _Image(work, request, upload, number if several else None)
        for number, upload in enumerate(uploads, 1)
    ]

    def begin() -> int:
        size = _memory([image.cost() for image in images], request, work.service.settings)
        if work.memory.take_now(size) and not several:
            images[0]._open()  # at once, without another way to this thread and back
        return size

    await work.memory.take(await work.code(begin), work.deadline)
    if several:
        await _all([image.run() for image in images])
    else:
        await images[0].run()
    start, fits = time.perf_counter(), list[str]()

    def answers() -> Iterator[Answer]:
        for image in images:
            answer = image.answer()
            fits.append(answer.found.fit)
            yield answer

    options = request.options
    body, media_type = await work.code(
        lambda: render(request.form, answers(), options.opacity, options.mask)
    )
    seconds = time.perf_counter() - start
    postprocess = sum(image.times["postprocess"] for image in images)
    longest = max((image.times for image in images), key=lambda times: sum(times.values()))
    last = {"postprocess": postprocess, "encode": max(seconds - postprocess, 0.0)}
    stages = list({**longest, **last}.items())
    headers = {
        "Vary": "Accept",
        "X-Model": card.name,
        "X-Fit": ", ".join(dict.fromkeys(fits)),
        "X-Mode": request.mode,
        "Server-Timing": ", ".join(f"{k};dur={v}" for k, v in milliseconds(stages).items()),
    }
    return Response(body, media_type=media_type, headers=headers), stages


class _Cost(NamedTuple):
    """Bytes of memory that an image takes."""

    kept: int  # all the time: its tensors, and its pixels where they are needed again
    decoding: int  # while it is decoded and prepared, beside these
    answering: int  # while its answer is made
    written: int  # of its answer, until the last one is written


def _memory(costs: list[_Cost], request: SegmentRequest, settings: Settings) -> int:
    """The bytes that a request takes at most: as many images are decoded at a time as threads.

    Answers are made one after another, with what was already written in memory.
    """
    decoding = sum(sorted(cost.decoding for cost in costs)[-settings.codec_threads :])
    written = sum(cost.written for cost in costs)
    if request.form.output == "json":  # held to that for all images together
        written = min(written, 2 * MAX_JSON)
    answering = max(cost.answering for cost in costs) + written
    return sum(cost.kept for cost in costs) + max(decoding, answering)


class _Image:
    """One image on its way. ``run`` waits on the event loop; the rest works on codec threads."""

    def __init__(
        self, work: Work, request: SegmentRequest, upload: Upload, number: int | None
    ) -> None:
        self._work, self._request, self._upload = work, request, upload
        self._number = number  # among several, for errors to say which it was
        self._session, self._start = work.version.session, time.perf_counter()
        self.times: dict[str, float] = {}
        self._file: ImageFile
        self._size = 0, 0
        self._is_drawn = request.form.output == "overlay"
        self._is_needed_again = self._is_drawn or request.mode == "slide"
        self._image: npt.NDArray[Any] | None = None  # where it is
        self._prepared: Prepared | None = None  # but for mode 'slide'
        self._outcome: Outcome

    def cost(self) -> _Cost:
        """What the image will take in memory, from its header alone."""
        settings, version = self._work.service.settings, self._work.version
        with self._numbered():
            if settings.formats != FORMATS:
                check_format(self._upload.data, settings.formats)
            self._file = ImageFile.of(self._upload.data)
            found = image_cost(
                self._file, self._session.preprocessing, max_pixels=settings.max_pixels
            )
            self._size = found.size
            answer = self._answer_cost(settings.max_answer_bytes)
        kept = version.tensor_bytes
        if self._is_needed_again:
            kept += found.pixels
        if self._request.mode == "slide":
            kept += version.slide_bytes(found.size)
        return _Cost(kept, found.decoding, *answer)

    def _answer_cost(self, most: int) -> tuple[int, int]:
        """Bytes of memory while the answer is made, and of the answer, of logits at ``most``."""
        pixels, options, card = math.prod(self._size), self._request.options, self._request.card
        form = self._request.form
        if options.size == "network":
            pixels = min(pixels, max(map(math.prod, self._session.sizes)))
        labels = pixels * (2 if len(card.classes) > 256 else 1)
        if card.instances is not None and card.instances.masks:
            labels += min(card.instances.most * pixels, MAX_MASKS)
        if card.queries is not None:  # segments, and a mask for each query
            labels += (12 + card.queries.number) * pixels
        if self._request.kept is not None:
            labels += 4 * pixels
        if form.output == "json":
            made, written = json_bytes(pixels, options.mask)
            return labels + made, written
        if form.output == "overlay":
            return labels + 6 * pixels, 3 * pixels
        if form.output == "mask":
            return labels + 2 * pixels, pixels
        wide = (
            card.output.channels * pixels * 4 if card.output and options.size == "original" else 0
        )
        if wide > most:
            raise RefusedError(
                413,
                f"Logits at this image's size are {wide:,} bytes, and answers hold at most "
                f"{most:,}. Leave size out for the network's own, smaller ones.",
            )
        return labels + wide, wide

    async def run(self) -> None:
        """Decode and prepare the image, on another thread, and run the network."""
        with self._numbered():
            if not self.times:
                await self._work.code(self._open)
            waited = time.perf_counter() - self._start - sum(self.times.values())
            if self._prepared is None:
                outcome = await self._work.call(self._slide)
            else:
                inputs = {name: value[None] for name, value in self._prepared.inputs.items()}
                outcome = await self._work.run(inputs)
                self._prepared = replace(self._prepared, inputs={})
        self._outcome = outcome
        self.times["queue"] = outcome.queue_seconds + max(waited, 0.0)
        self.times["inference"] = outcome.run_seconds

    @contextmanager
    def _numbered(self) -> Iterator[None]:
        """A ``with`` block whose errors say which of several images it was."""
        try:
            yield
        except (RefusedError, ImageError) as error:
            found, name = answer_to(error), self._upload.name
            if self._number is None or found is None:
                raise
            image = f"Image {self._number}" + (f" ({name})" if name else "")
            raise RefusedError(found.status, f"{image}: {found.detail}") from error

    def _open(self) -> None:
        start, session = time.perf_counter(), self._session
        image = session.read_image(self._file, max_pixels=self._work.service.settings.max_pixels)
        decoded = time.perf_counter()
        self.times["decode"] = decoded - start
        if self._request.mode == "whole":
            self._prepared = session.images.prepare(image, fit=self._request.options.fit)
            self.times["preprocess"] = time.perf_counter() - decoded
        if self._is_needed_again:
            self._image = image

    def _slide(self) -> Segmentation:
        """Label an image in mode 'slide', and stop between crops when the deadline has passed."""
        image, self._image = self._image, self._image if self._is_drawn else None
        assert image is not None

        def run(crops: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            if time.perf_counter() > self._work.deadline:
                raise DeadlineError
            return self._session.run(crops)

        return self._session.segmentation.slide(image, run, self._session.batch_sizes[-1])

    def answer(self) -> Answer:
        """Turn the network's output into the answer; the time is the postprocess stage's."""
        start, request, logits = time.perf_counter(), self._request, None
        prepared, output = self._prepared, self._outcome.rows[0]
        found: Any
        if prepared is None:
            found = output
            self.times |= {stage: found.timings[stage] for stage in ("inference", "preprocess")}
        elif self._session.detects:
            found = self._session.detection.finish(prepared, output)
            found = found.kept(request.min_score, request.kept)
            boxes_alone = request.form.output == "json" and request.options.mask == "none"
            if found.has_masks and not boxes_alone:
                check_masks(found)
                _ = found.pasted  # made here, so that its time counts as this stage's
        else:
            size = prepared.covered if request.options.size == "network" else None
            if size is not None and self._image is not None:
                self._image = resize(self._image, *size)
            if request.form.output == "logits":
                logits = self._logits(output["logits"], prepared)
            found = self._session.segmentation.finish(prepared, output, size=size)
            found = found.kept(request.min_score)
        self.times["postprocess"] = time.perf_counter() - start
        return Answer(
            model=request.card.name,
            found=found,
            image=self._image,
            name=self._upload.name,
            timings_ms=milliseconds(list(self.times.items())),
            kept=request.kept,
            logits=logits,
            image_size=prepared.image if prepared is not None else self._size,
        )

    def _logits(
        self, logits: npt.NDArray[np.float32], prepared: Prepared
    ) -> npt.NDArray[np.float32]:
        """A network's logits at the size that is asked for."""
        if self._request.options.size is None:
            return logits
        architecture = self._session.bundle.manifest.architecture
        assert architecture is not None
        size = prepared.covered if self._request.options.size == "network" else None
        align_corners = architecture.decode_head.align_corners
        return logits_of(view_of(logits, prepared, size, align_corners=align_corners))


async def _all(works: list[Coroutine[Any, Any, None]]) -> None:
    """Await all; at the first failure stop the others and raise it."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
