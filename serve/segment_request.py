"""A segment request from its images' bytes to its answer: decode, prepare, run, finish, encode."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime import Segmentation, Tensors
from fdconv_deploy.runtime.images import FORMATS, ImageFile, check_format, image_cost
from fdconv_deploy.runtime.panoptic import PanopticSegmentation
from fdconv_deploy.runtime.postprocessing import logit_map
from fdconv_deploy.runtime.preprocessing import Prepared, resize
from fdconv_deploy.serve.admission import Memory
from fdconv_deploy.serve.batching import Code, DeadlineError, Outcome
from fdconv_deploy.serve.errors import RefusedError, answer_to
from fdconv_deploy.serve.model_repository import Version
from fdconv_deploy.serve.responses import (
    MAX_JSON,
    Answer,
    check_masks,
    json_bytes,
    masks_bytes,
    render,
)
from fdconv_deploy.serve.segment_options import SegmentRequest
from fdconv_deploy.serve.service import Service
from fdconv_deploy.serve.uploads import Upload


@dataclass(frozen=True)
class SegmentAnswer:
    """A response's body, with what its headers and the metrics hold.

    Attributes:
        stages: (name, seconds), in order.
        fits: how each image was fitted to the network's input.
    """

    body: bytes
    media_type: str
    stages: list[tuple[str, float]]
    fits: list[str]


async def segment(
    service: Service,
    version: Version,
    uploads: list[Upload],
    request: SegmentRequest,
    deadline: float,
) -> SegmentAnswer:
    """Answer for one image or several by ``deadline``, on the scheduler's clock.

    Raises:
        RefusedError: an image is not accepted; of several, it says which.
        ImageError: the only image is not accepted.
    """
    images = [_Image(service, version, upload, request, deadline) for upload in uploads]
    several = len(images) > 1
    for number, image in enumerate(images, 1):
        image.number = number if several else None
    start = time.perf_counter()
    try:
        with Memory(service.admission) as memory:
            code = partial(service.scheduler.code, deadline=deadline, on_leave=memory.hold)

            def begin() -> int:
                size = _memory(images, service.settings.codec_threads)
                if memory.take_now(size) and not several:
                    images[0]._open()  # at once, without another way to this thread and back
                return size

            await memory.take(await code(begin), deadline)
            return await _segment(images, request, code)
    except Exception as error:
        service.count_failure(version, error, start)
        raise


def _memory(images: list[_Image], threads: int) -> int:
    """The bytes that a request takes at most: as many images are decoded at a time as threads.

    Answers are made one after another, with what was already written in memory.
    """
    costs = [image.cost() for image in images]
    decoding = sum(sorted(cost.decoding for cost in costs)[-threads:])
    written = sum(cost.written for cost in costs)
    if images[0].in_json:  # held to that for all images together
        written = min(written, 2 * MAX_JSON)
    answering = max(cost.answering for cost in costs) + written
    return sum(cost.kept for cost in costs) + max(decoding, answering)


async def _segment(images: list[_Image], request: SegmentRequest, code: Code) -> SegmentAnswer:
    if len(images) == 1:
        await images[0].run(code)
    else:
        await _all([image.run(code) for image in images])
    start = time.perf_counter()

    def write() -> tuple[bytes, str, list[str]]:
        fits: list[str] = []

        def answers() -> Iterator[Answer]:
            for image in images:
                answer = image.answer()
                fits.append(answer.found.fit)
                yield answer

        options = request.options
        body, media_type = render(request.form, answers(), options.opacity, options.mask)
        return body, media_type, fits

    body, media_type, fits = await code(write)
    seconds = time.perf_counter() - start
    postprocess = sum(image.times["postprocess"] for image in images)
    longest = max((image.times for image in images), key=lambda times: sum(times.values()))
    stages = {**longest, "postprocess": postprocess, "encode": max(seconds - postprocess, 0.0)}
    return SegmentAnswer(body, media_type, list(stages.items()), fits)


class _Cost(NamedTuple):
    """Bytes of memory that an image takes.

    Attributes:
        kept: All the time: its tensors, and its pixels where they are needed again.
        decoding: While it is decoded and prepared, beside these.
        answering: While its answer is made.
        written: Of its answer, until the last one is written.
    """

    kept: int
    decoding: int
    answering: int
    written: int


@dataclass(eq=False)
class _Image:
    """One image on its way. ``run`` waits on the event loop; the rest works on codec threads.

    Its ``number`` is for errors to say which of several it was.
    """

    _service: Service
    _version: Version
    _upload: Upload
    _request: SegmentRequest
    _deadline: float
    times: dict[str, float] = field(default_factory=dict)
    number: int | None = None
    _size: tuple[int, int] = (0, 0)
    _file: ImageFile | None = None
    _image: npt.NDArray[Any] | None = None
    _prepared: Prepared | None = None
    _outcome: Outcome | None = None

    def __post_init__(self) -> None:
        self._session = self._version.session
        self._start = time.perf_counter()

    def cost(self) -> _Cost:
        """What the image will take in memory, from its header alone."""
        with self._numbered():
            self._check_format()
            session, settings = self._session, self._service.settings
            self._file = ImageFile.of(self._upload.data)
            found = image_cost(self._file, session.preprocessing, max_pixels=settings.max_pixels)
            self._size = found.size
            self._check_answer_size()
        kept, answer = self._version.tensor_bytes, self._answer_cost(found.size)
        if self._draws or self._request.mode == "slide":
            kept += found.pixels
        if self._request.mode == "slide":
            kept += self._version.slide_bytes(found.size)
        return _Cost(kept, found.decoding, *answer)

    def _answer_cost(self, size: tuple[int, int]) -> tuple[int, int]:
        """Bytes of memory while the answer is made, and of the answer."""
        pixels, form, options = size[0] * size[1], self._request.form, self._request.options
        if options.size == "network":
            pixels = min(pixels, max(map(math.prod, self._session.sizes)))
        labels = pixels * (2 if len(self._version.card.classes) > 256 else 1)
        if self._session.detects:
            labels += masks_bytes(pixels, self._version.card)
        queries = self._version.card.queries
        if queries is not None:  # segments and what they are told by, and a mask for each query
            labels += (12 + queries.number) * pixels
        if self._request.kept is not None:
            labels += 4 * pixels
        if form.output == "json":
            made, written = json_bytes(pixels, options.mask)
            return labels + made, written
        if form.output == "overlay":
            return labels + 6 * pixels, 3 * pixels
        if form.output == "logits":
            output = self._version.card.output
            wide = output.channels * pixels * 4 if output and options.size == "original" else 0
            return labels + wide, wide
        return labels + 2 * pixels, pixels

    async def run(self, code: Code) -> None:
        """Decode and prepare the image, on another thread by ``code``, and run the network.

        Raises:
            RefusedError, ImageError: It is not accepted.
        """
        with self._numbered():
            if not self.times:
                await code(self._open)
            await self._run()

    async def _run(self) -> None:
        scheduler = self._service.scheduler
        waited = time.perf_counter() - self._start - sum(self.times.values())
        if self._request.mode == "slide":
            image, self._image = self._image, self._image if self._draws else None
            assert image is not None
            call = partial(self._slide, image)
            lane = self._version.lane(self._session.input_size)
            outcome = await scheduler.call(lane, call, self._deadline)
        else:
            assert self._prepared is not None
            inputs = {name: value[None] for name, value in self._prepared.inputs.items()}
            lane = self._version.lane(self._prepared.network)
            outcome = await scheduler.run(lane, inputs, self._deadline)
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
            if self.number is None or found is None:
                raise
            image = f"Image {self.number}" + (f" ({name})" if name else "")
            raise RefusedError(found.status, f"{image}: {found.detail}") from error

    def _slide(self, image: npt.NDArray[Any]) -> Segmentation:
        """Label an image in mode 'slide', and stop between crops when the deadline has passed."""

        def run(crops: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            if time.perf_counter() > self._deadline:
                raise DeadlineError
            return self._session.run(crops)

        return self._session.segmentation.slide(image, run, self._session.batch_sizes[-1])

    def answer(self) -> Answer:
        """Turn the network's output into the answer; the time is the postprocess stage's."""
        start = time.perf_counter()
        assert self._outcome is not None
        output, request, logits = self._outcome.rows[0], self._request, None
        found: Any
        if self._session.detects:
            assert self._prepared is not None
            found = self._session.detection.finish(self._prepared, output)
            found = found.kept(request.min_score, request.kept)
            boxes_alone = request.form.output == "json" and request.options.mask == "none"
            if found.has_masks and not boxes_alone:
                check_masks(found)
                _ = found.pasted  # made here, so that its time counts as this stage's
        elif request.mode == "slide":
            found = output
            self.times |= {stage: found.timings[stage] for stage in ("inference", "preprocess")}
        else:
            logits = self._logits(output["logits"]) if request.form.output == "logits" else None
            found = self._labels(output)
            if isinstance(found, PanopticSegmentation):
                found = found.kept(request.min_score)
        self.times["postprocess"] = time.perf_counter() - start
        return Answer(
            model=self._version.name,
            found=found,
            image=self._image,
            name=self._upload.name,
            timings_ms={stage: round(seconds * 1e3, 3) for stage, seconds in self.times.items()},
            kept=request.kept,
            logits=logits,
            image_size=self._size,
        )

    @property
    def in_json(self) -> bool:
        """Whether the answer is JSON."""
        return self._request.form.output == "json"

    @property
    def _draws(self) -> bool:
        return self._request.form.output == "overlay"

    def _open(self) -> None:
        start, file = time.perf_counter(), self._file
        assert file is not None
        self._file, self._upload = None, replace(self._upload, data=b"")
        image = self._session.read_image(file, max_pixels=self._service.settings.max_pixels)
        self._size = (image.shape[0], image.shape[1])
        decoded = time.perf_counter()
        self.times["decode"] = decoded - start
        if self._request.mode == "whole":
            if self._session.detects:
                self._prepared = self._session.detection.prepare(image)
            else:
                fit = self._request.options.fit
                self._prepared = self._session.segmentation.prepare(image, fit=fit)
            self.times["preprocess"] = time.perf_counter() - decoded
        if self._request.mode == "slide" or self._draws:
            self._image = image

    def _check_format(self) -> None:
        formats = self._service.settings.formats
        if tuple(formats) != FORMATS:
            check_format(self._upload.data, formats)

    def _check_answer_size(self) -> None:
        if self._request.form.output != "logits" or self._request.options.size != "original":
            return
        limit = self._service.settings.max_answer_bytes
        output = self._version.card.output
        assert output is not None
        size = output.channels * self._size[0] * self._size[1] * 4
        if size > limit:
            raise RefusedError(
                413,
                f"Logits at this image's size are {size:,} bytes, and answers hold at most "
                f"{limit:,}. Leave size out for the network's own, smaller ones.",
            )

    def _labels(self, output: Tensors) -> Segmentation:
        assert self._prepared is not None
        size = None
        if self._request.options.size == "network":
            size = self._prepared.placement.height, self._prepared.placement.width
            if self._image is not None:
                self._image = resize(self._image, *size)
        return self._session.segmentation.finish(self._prepared, output, size=size)

    def _logits(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        size = self._request.options.size
        if size is None:
            return logits
        assert self._prepared is not None
        covered = self._prepared.placement.height, self._prepared.placement.width
        architecture = self._session.bundle.manifest.architecture
        assert architecture is not None
        return logit_map(
            logits,
            self._prepared.network,
            covered,
            covered if size == "network" else self._size,
            align_corners=architecture.decode_head.align_corners,
        )


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
