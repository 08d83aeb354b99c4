"""A client of the service. Needs numpy and nothing of the service or the runtime.

>>> from fdconv_deploy.client import Client                      # doctest: +SKIP
>>> with Client("http://localhost:8000") as client:              # doctest: +SKIP
...     answer = client.segment("street.jpg")
...     answer.labels.shape, answer.areas["road"]
"""

from __future__ import annotations

import http.client
import io
import json
import os
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode, urlsplit

import numpy as np
import numpy.typing as npt

from fdconv_deploy.coco_rle import decode
from fdconv_deploy.errors import FDConvError

Image = bytes | str | os.PathLike[str] | npt.NDArray[Any]
Reply = tuple[dict[str, str], bytes]  # headers by lower-case name, body
_HEADER_LENGTH = "Inference-Header-Content-Length"
_DATATYPES = {"FP32": "<f4", "UINT8": "u1", "UINT16": "<u2", "INT64": "<i8"}
# Unreachable (0), overloaded, a worker lost or starting up: nothing was done, so a retry is safe.
_RETRIED = (0, 429, 503)


class ServiceError(FDConvError):
    """The service refused a request, or could not be reached.

    Attributes:
        status: HTTP status; 0 when the service could not be reached.
        request_id: the request's id in the service's log.
        retry_after: seconds that the service asks to wait before the next try.
    """

    def __init__(
        self, status: int, detail: str, request_id: str = "", retry_after: float = 0.1
    ) -> None:
        super().__init__(detail)
        self.status, self.request_id, self.retry_after = status, request_id, retry_after


@dataclass(frozen=True)
class _Answer:
    fit: str
    model: str
    timings_ms: dict[str, float]
    request_id: str


@dataclass(frozen=True)
class Answer(_Answer):
    """One image's segmentation.

    Attributes:
        labels: (H, W) int32 class ids; −1 where the class was not asked for.
        classes: each class's ``id``, ``name``, ``color``, ``area`` (pixels) and ``share`` (0–1).
        mode: whether the network saw the whole image at once ("whole") or crops ("slide").
        fit: how the image was brought to the network's size; see the service's API.
        timings_ms: milliseconds by stage.
    """

    labels: npt.NDArray[np.int32]
    classes: list[dict[str, Any]]
    mode: str

    @property
    def areas(self) -> dict[str, int]:
        """Pixels by class name."""
        return {entry["name"]: entry["area"] for entry in self.classes}


@dataclass(frozen=True)
class Objects(_Answer):
    """One image's objects, the best score first.

    Attributes:
        boxes: (N, 4) float32 x1, y1, x2, y2 in pixels of the image.
        scores: (N,) float32, 0–1.
        labels: (N,) int64 class ids.
        names: the objects' class names.
        masks: (N, H, W) bool; None when the model gives none or they were not asked for.
        fit: how the image was brought to the network's size; see the service's API.
        timings_ms: milliseconds by stage.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...]
    masks: npt.NDArray[np.bool_] | None

    def __len__(self) -> int:
        return len(self.boxes)


class Client:
    """One connection to a service; not for use from several threads at once.

    Its methods raise `ServiceError`.

    Args:
        url: ``http://host:port`` or ``https://…``.
        api_key: the service's API key, where it asks for one.
        timeout: seconds for an answer. The service is told, and drops requests past it.
        retries: how often to send a request again that was turned away (429, 503) or whose
            connection broke. Segmentation changes nothing on the server, so that is safe.
        context: TLS settings, for a certificate authority of your own.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        context: ssl.SSLContext | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServiceError(0, f"A service's address looks like http://host:8000, not {url!r}.")
        self._timeout, self._retries = timeout, retries
        self._base = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        host, port = parts.hostname, parts.port
        self._connection = http.client.HTTPConnection(host, port, timeout=timeout + 5)
        if parts.scheme == "https":
            self._connection = http.client.HTTPSConnection(
                host, port, timeout=timeout + 5, context=context
            )

    def models(self) -> list[dict[str, Any]]:
        """Every model's card, the default one first."""
        return list(json.loads(self._ask("GET", "/v1/models")[1])["models"])

    def model(self, name: str) -> dict[str, Any]:
        """A model's card: classes, palette, sizes, parity, benchmark."""
        return dict(json.loads(self._ask("GET", f"/v1/models/{quote(name, '')}")[1]))

    def ready(self) -> bool:
        """Whether the service is ready for requests."""
        try:
            self._once("GET", "/readyz", b"", {})
        except ServiceError:
            return False
        return True

    def segment(
        self,
        image: Image,
        model: str | None = None,
        *,
        classes: Sequence[str | int] | None = None,
        size: Literal["original", "network"] | None = None,
        fit: Literal["stretch", "pad"] | None = None,
        mode: Literal["whole", "slide"] | None = None,
    ) -> Answer:
        """Label every pixel of an image.

        Args:
            image: a file's path or its bytes, or (H, W, 3) uint8 RGB; for a model of other
                bands, (H, W, C) of any real type.
            model: the model's name; the service's default when not given.
            classes: keep only these, by name or id.
            size: of the labels: the image's, or the network's input.
            fit: how an image of another aspect ratio is fitted; the model's own when not given.
            mode: the whole image at once or a sliding window; the model's own when not given.
        """
        options = {"size": size, "fit": fit, "mode": mode, "classes": classes}
        found, common = self._json(image, model, options)
        if "instances" in found:
            raise ServiceError(0, f"The model {found['model']!r} is a detector: use detect().")
        mask = found["mask"]
        labels = np.repeat(np.array(mask["values"], np.int32), mask["counts"])
        return Answer(
            labels=labels.reshape(mask["size"]),
            classes=found["classes"],
            mode=found["mode"],
            **common,
        )

    def detect(
        self,
        image: Image,
        model: str | None = None,
        *,
        min_score: float | None = None,
        classes: Sequence[str | int] | None = None,
        masks: bool = True,
    ) -> Objects:
        """Find the objects in an image, with a model that is a detector.

        Args:
            image: a file's path or its bytes, or (H, W, 3) uint8 RGB.
            model: as :meth:`segment`'s.
            min_score: leave out objects that score less; 0.3 when not given.
            classes: keep only these, by name or id.
            masks: False leaves the masks out.
        """
        options = {"min_score": min_score, "classes": classes, "mask": "rle" if masks else "none"}
        found, common = self._json(image, model, options)
        if "instances" not in found:
            raise ServiceError(0, f"The model {found['model']!r} is a segmentor: use segment().")
        entries = found["instances"]
        pixels = None
        # A model of boxes alone gives null masks.
        if masks and all(entry["mask"] is not None for entry in entries):
            pixels = np.zeros((len(entries), found["height"], found["width"]), np.bool_)
            for canvas, entry in zip(pixels, entries, strict=True):
                canvas[:] = decode(entry["mask"])
        return Objects(
            boxes=np.array([entry["box"] for entry in entries], np.float32).reshape(-1, 4),
            scores=np.array([entry["score"] for entry in entries], np.float32),
            labels=np.array([entry["label"] for entry in entries], np.int64),
            names=tuple(entry["class"] for entry in entries),
            masks=pixels,
            **common,
        )

    def mask(self, image: Image, model: str | None = None, **options: Any) -> bytes:
        """An indexed PNG of the labels; options as for :meth:`segment` or :meth:`detect`."""
        return self._segment(image, model, "image/png", output="mask", **options)[1]

    def overlay(
        self,
        image: Image,
        model: str | None = None,
        *,
        opacity: float = 0.5,
        kind: Literal["png", "jpeg"] = "png",
        **options: Any,
    ) -> bytes:
        """The image with the classes' colours over it, as a PNG or JPEG file's bytes."""
        options |= {"output": "overlay", "opacity": opacity}
        return self._segment(image, model, f"image/{kind}", **options)[1]

    def logits(self, image: Image, model: str | None = None, **options: Any) -> dict[str, Any]:
        """``logits`` (classes, h, w) float32, ``class_ids``, ``classes`` and ``image_size``."""
        body = self._segment(image, model, "application/x-npz", output="logits", **options)[1]
        with np.load(io.BytesIO(body), allow_pickle=False) as found:
            return dict(found)

    def infer(
        self,
        model: str,
        batch: npt.NDArray[Any],
        output: Literal["logits", "labels", "boxes", "scores", "count", "masks"] = "logits",
        *,
        sizes: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Run a model on a tensor, by the KServe protocol with binary tensors.

        Args:
            model: the model's name.
            batch: (N, C, H, W) float32 normalised, or (N, H, W, C) uint8, RGB where C is 3.
            output: the output to return; a segmentor has logits and labels.
            sizes: for a detector, (N, 2) height and width of each image within its input.

        Returns:
            (N, classes, h, w) float32 logits, or (N, H, W) labels; of a detector, the output of
            its graph.
        """
        tensors = {"images": batch}
        if sizes is not None:
            tensors["sizes"] = np.asarray(sizes, np.float32)
        request = {
            "inputs": [
                {
                    "name": name,
                    "datatype": {"float32": "FP32", "uint8": "UINT8"}.get(array.dtype.name, "?"),
                    "shape": list(array.shape),
                    "parameters": {"binary_data_size": array.nbytes},
                }
                for name, array in tensors.items()
            ],
            "outputs": [{"name": output, "parameters": {"binary_data": True}}],
            "parameters": {"timeout": int(self._timeout * 1e6)},
        }
        head = json.dumps(request).encode()
        data = b"".join(array.tobytes() for array in tensors.values())
        headers, body = self._ask(
            "POST",
            f"/v2/models/{quote(model, '')}/infer",
            head + data,
            **{_HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"},
        )
        length = int(headers[_HEADER_LENGTH.lower()])
        (found,) = json.loads(body[:length])["outputs"]
        kind = _DATATYPES[found["datatype"]]
        return np.frombuffer(body, kind, offset=length).reshape(found["shape"])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _json(
        self, image: Image, model: str | None, options: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The answer's JSON, and what every kind of answer holds of it."""
        headers, body = self._segment(image, model, "application/json", output="json", **options)
        found = json.loads(body)
        common = {name: found[name] for name in ("fit", "model", "timings_ms")}
        return found, {**common, "request_id": headers.get("x-request-id", "")}

    def _segment(self, image: Image, model: str | None, accept: str, **options: Any) -> Reply:
        path = "/v1/segment" if model is None else f"/v1/models/{quote(model, '')}/segment"
        query = urlencode({k: v for k, v in options.items() if v is not None}, doseq=True)
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept": accept,
            "X-Timeout-Ms": f"{self._timeout * 1e3:.0f}",
        }
        return self._ask("POST", f"{path}?{query}", _encoded(image), **headers)

    def _ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
        end, left = time.monotonic() + self._timeout, self._retries
        while True:
            try:
                return self._once(method, path, body, headers)
            except ServiceError as error:
                wait = error.retry_after
                if not left or error.status not in _RETRIED or time.monotonic() + wait > end:
                    raise
            left -= 1
            time.sleep(wait)

    def _once(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        try:
            self._connection.request(method, self._base + path, body, self._headers | headers)
            answer = self._connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next request opens it again
            raise ServiceError(
                0,
                f"The service at {self._connection.host}:{self._connection.port} cannot be "
                f"reached ({error or type(error).__name__}). Check the address, and that it runs.",
            ) from error
        found = {name.lower(): value for name, value in answer.getheaders()}
        if answer.status == 200:
            return found, data
        try:
            detail = str(json.loads(data)["detail"])
        except (ValueError, KeyError, TypeError):
            detail = f"The service answered with status {answer.status}."
        after = found.get("retry-after", "")
        wait = float(after) if after.isdigit() else 0.1
        raise ServiceError(answer.status, detail, found.get("x-request-id", ""), wait)


def _encoded(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    if not isinstance(image, np.ndarray):
        return Path(image).read_bytes()
    if image.ndim not in (2, 3) or image.dtype.kind not in "uif":
        raise ServiceError(
            0, f"An image is (H, W, C) real numbers, not {image.shape} {image.dtype}."
        )
    buffer = io.BytesIO()
    if image.dtype == np.uint8 and image.shape[2:] == (3,):
        from PIL import Image as Pictures

        Pictures.fromarray(image).save(buffer, "PNG", compress_level=1)
    else:
        np.save(buffer, image, allow_pickle=False)
    return buffer.getvalue()
