"""A segment request on its way through the stages: decode, prepare, run, finish, encode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from fdconv_deploy.serve.detect_request import DetectedImage
from fdconv_deploy.serve.model_versions import Version
from fdconv_deploy.serve.request_body import Upload
from fdconv_deploy.serve.responses import Writable, render
from fdconv_deploy.serve.segment_request import OneImage, Wanted
from fdconv_deploy.serve.service import Service

__all__ = ["Answered", "Wanted", "segment"]


@dataclass(frozen=True)
class Answered:
    """A response's body, with what its headers and the metrics say: how each image was fitted."""

    body: bytes
    media_type: str
    stages: list[tuple[str, float]]
    fits: list[str]


async def segment(
    service: Service,
    version: Version,
    uploads: list[Upload],
    wanted: Wanted,
    deadline: float,
) -> Answered:
    """Answer for one image or several.

    :param deadline: on the scheduler's clock.
    :raises RefusedError: an image is not accepted; of several, it says which.
    """
    way = DetectedImage if version.session.detects else OneImage
    if len(uploads) == 1:
        one = way(service, version, uploads[0], wanted, deadline)
        await one.run()
        parts = [one]
    else:
        parts = [way(service, version, upload, wanted, deadline) for upload in uploads]
        await _all([part.run_numbered(n) for n, part in enumerate(parts, 1)])
    start = time.perf_counter()

    def write() -> tuple[bytes, str, list[str]]:
        answers: list[Writable] = [part.answer() for part in parts]
        fits = [answer.fit for answer in answers]
        return *render(wanted.form, answers, wanted.opacity, wanted.mask), fits

    body, media_type, fits = await service.scheduler.code(write)
    seconds = time.perf_counter() - start
    after = sum(part.times.get("postprocess", 0.0) for part in parts)
    longest = max(parts, key=lambda part: sum(part.times.values())).times
    stages = {**longest, "postprocess": after, "encode": max(seconds - after, 0.0)}
    return Answered(body, media_type, list(stages.items()), fits)


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
