"""One image of a request, from its bytes to its answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from fdconv_deploy.serve.batching import Outcome
from fdconv_deploy.serve.errors import RefusedError, image_problem
from fdconv_deploy.serve.model_versions import Version
from fdconv_deploy.serve.request_body import Upload
from fdconv_deploy.serve.responses import Answer, Form, MaskForm, Writable
from fdconv_deploy.serve.service import Service
from fdconv_deploy.serve.settings import Settings

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime import Segmentation, Session
from fdconv_deploy.runtime.detection import SHOWN_SCORE
from fdconv_deploy.runtime.multiband import FORMATS, check_format
from fdconv_deploy.runtime.postprocessing import logit_map
from fdconv_deploy.runtime.preprocessing import resize

Picture = npt.NDArray[Any]


@dataclass(frozen=True)
class Wanted:
    """What a request asks for. ``kept``: class numbers, all when None.

    ``min_score``: of a detector's objects.
    """

    form: Form
    mask: MaskForm
    opacity: float
    kept: tuple[int, ...] | None
    fit: Literal["stretch", "pad"] | None
    mode: Literal["whole", "slide"]
    size: Literal["original", "network"] | None
    min_score: float = SHOWN_SCORE


class OneImage:
    """One image's way. Every method but ``run`` works on a codec or inference thread.

    This is a segmentor's; ``detecting.DetectedImage`` is a detector's.
    """

    def __init__(
        self,
        service: Service,
        version: Version,
        upload: Upload,
        wanted: Wanted,
        deadline: float,
    ) -> None:
        self._service, self._version, self._wanted = service, version, wanted
        self._deadline = deadline
        self._upload: Upload | None = upload
        self._name = upload.name
        self._session: Session = version.session
        self.times: dict[str, float] = {}
        self._size = (0, 0)
        self._image: Picture | None = None
        self._prepared: Any = None
        self._outcome: Outcome | None = None

    async def run(self) -> None:
        """Everything up to the logits."""
        scheduler, wanted = self._service.scheduler, self._wanted
        start = time.perf_counter()
        await scheduler.code(self._open)
        waited = time.perf_counter() - start - sum(self.times.values())
        if wanted.mode == "slide":
            image = self._image
            assert image is not None
            self._image = image if self._needs_image() else None
            call = partial(self._session.segment, image, mode="slide")
            outcome = await scheduler.call(self._version, call, self._deadline)
        else:
            outcome = await scheduler.run(self._version, self._prepared.input[None], self._deadline)
            self._prepared = replace(self._prepared, input=None)
        self._outcome = outcome
        self.times["queue"] = outcome.queue_seconds + max(waited, 0.0)
        self.times["inference"] = outcome.run_seconds

    async def run_numbered(self, number: int) -> None:
        """As :meth:`run`, with errors that say which image it was."""
        named = f"Image {number}" + (f" ({self._name})" if self._name else "")
        try:
            await self.run()
        except RefusedError as error:
            raise RefusedError(error.status, f"{named}: {error.detail}") from error
        except ImageError as error:
            status, detail = image_problem(error)
            raise RefusedError(status, f"{named}: {detail}") from error

    def answer(self) -> Writable:
        """The logits as an answer, and the time that took."""
        start = time.perf_counter()
        wanted, outcome = self._wanted, self._outcome
        assert outcome is not None
        logits = None
        if wanted.mode == "slide":
            found: Segmentation = outcome.rows[0]
            self.times["inference"] = found.timings["inference"]
            self.times["preprocess"] = found.timings["preprocess"]
        else:
            if wanted.form.output == "logits":
                logits = self._logits(outcome.rows[0])
            prepared = self._prepared
            if wanted.size == "network":
                place = prepared.placement
                prepared = replace(prepared, image_size=(place.height, place.width))
                if self._image is not None:
                    self._image = resize(self._image, place.height, place.width)
            found = self._session.finish(prepared, outcome.rows[0])
        self.times["postprocess"] = time.perf_counter() - start
        return Answer(
            self._version.name,
            found,
            self._image,
            self._name,
            self._timings_ms(),
            wanted.kept,
            logits,
            self._size,
        )

    def _timings_ms(self) -> dict[str, float]:
        return {name: round(seconds * 1e3, 3) for name, seconds in self.times.items()}

    def _open(self) -> None:
        start = time.perf_counter()
        assert self._upload is not None
        image = decode(self._upload.data, self._session, self._service.settings)
        self._upload = None
        self._size = (image.shape[0], image.shape[1])
        self._check_answer_size()
        decoded = time.perf_counter()
        self.times["decode"] = decoded - start
        if self._wanted.mode == "whole":
            self._prepared = self._prepare(image)
            self.times["preprocess"] = time.perf_counter() - decoded
        if self._wanted.mode == "slide" or self._needs_image():
            self._image = image

    def _prepare(self, image: Picture) -> Any:
        return self._session.prepare(image, fit=self._wanted.fit)

    def _needs_image(self) -> bool:
        return self._wanted.form.output == "overlay"

    def _logits(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self._wanted.size is None:
            return logits
        place = self._prepared.placement
        covered = (place.height, place.width)
        architecture = self._session.bundle.manifest.architecture
        assert architecture is not None
        return logit_map(
            logits,
            self._session.input_size,
            covered,
            covered if self._wanted.size == "network" else self._size,
            align_corners=architecture.decode_head.align_corners,
        )

    def _check_answer_size(self) -> None:
        if self._wanted.form.output != "logits" or self._wanted.size != "original":
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


def decode(data: bytes, session: Session, settings: Settings) -> Picture:
    """An image for the session's network, of the formats and within the pixels accepted here.

    :raises ImageError: it is not.
    """
    if tuple(settings.formats) != FORMATS:
        check_format(data, settings.formats)
    return session.read_image(data, max_pixels=settings.max_pixels)
