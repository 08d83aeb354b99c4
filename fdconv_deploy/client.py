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
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote, urlencode, urlsplit

import numpy as np
import numpy.typing as npt

from fdconv_deploy.client_answers import Answer, Objects
from fdconv_deploy.errors import FDConvError

__all__ = ["Answer", "Client", "Objects", "ServiceError"]

Image = bytes | str | os.PathLike[str] | npt.NDArray[Any]
_HEADER_LENGTH = "Inference-Header-Content-Length"
# Nothing was done, so asking again is safe: too much in hand, a worker lost, starting up.
_AGAIN = (429, 503)


class ServiceError(FDConvError):
    """The service did not answer with what was asked for.

    ``status``: of HTTP, 0 when it could not be reached. ``request_id``: names the request in
    the service's log.
    """

    def __init__(self, status: int, detail: str, request_id: str = "") -> None:
        super().__init__(detail)
        self.status, self.request_id = status, request_id


class Client:
    """One connection to a service; not for use from several threads at once.

    :param url: ``http://host:port`` or ``https://…``.
    :param api_key: where the service asks for one.
    :param timeout: seconds; the service is told, so that it does not work in vain.
    :param retries: how often a request is sent again that was turned away (429, 503) or whose
        connection broke before an answer. Segmentation changes nothing, so that is safe.
    :param context: TLS settings, for a certificate authority of your own.
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
        self._connection = (
            http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=timeout + 5, context=context
            )
            if parts.scheme == "https"
            else http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout + 5)
        )

    def models(self) -> list[dict[str, Any]]:
        """Every model's card, the default one first."""
        found: list[dict[str, Any]] = json.loads(self._ask("GET", "/v1/models")[1])["models"]
        return found

    def model(self, name: str) -> dict[str, Any]:
        """A model's card: classes, palette, sizes, parity, benchmark."""
        found: dict[str, Any] = json.loads(self._ask("GET", f"/v1/models/{quote(name, '')}")[1])
        return found

    def ready(self) -> bool:
        """Whether the service can be asked now."""
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
        """Label every pixel.

        :param image: a file's path or its bytes, or (H, W, 3) uint8 RGB; for a model of other
            bands, (H, W, C) of any real type.
        :param model: the service's default when not given.
        :param classes: keep these only, by name or number.
        :raises ServiceError: it was refused, or the service cannot be reached.
        """
        query = _query(classes, size=size, fit=fit, mode=mode, output="json")
        headers, body = self._post(image, model, query, "application/json")
        found = json.loads(body)
        if "instances" in found:
            raise ServiceError(0, f"The model {found['model']!r} is a detector: use detect().")
        return Answer.of(found, headers.get("x-request-id", ""))

    def detect(
        self,
        image: Image,
        model: str | None = None,
        *,
        min_score: float | None = None,
        classes: Sequence[str | int] | None = None,
        masks: bool = True,
    ) -> Objects:
        """Find the objects, with a model that is a detector.

        :param image: a file's path or its bytes, or (H, W, 3) uint8 RGB.
        :param min_score: leave out what scores less; the service's own (0.3) when not given.
        :param masks: False leaves masks out.
        :raises ServiceError: it was refused, or the service cannot be reached.
        """
        form = "rle" if masks else "none"
        query = _query(classes, min_score=min_score, mask=form, output="json")
        headers, body = self._post(image, model, query, "application/json")
        found = json.loads(body)
        if "instances" not in found:
            raise ServiceError(0, f"The model {found['model']!r} is a segmentor: use segment().")
        # Boxes alone come where the model has no masks; of no objects, that makes no difference.
        masks = masks and all(entry["mask"] is not None for entry in found["instances"])
        return Objects.of(found, headers.get("x-request-id", ""), masks=masks)

    def mask(self, image: Image, model: str | None = None, **options: Any) -> bytes:
        """As :meth:`segment`, as the bytes of an indexed PNG."""
        query = _query(options.pop("classes", None), output="mask", **options)
        return self._post(image, model, query, "image/png")[1]

    def overlay(
        self,
        image: Image,
        model: str | None = None,
        *,
        opacity: float = 0.5,
        kind: Literal["png", "jpeg"] = "png",
        **options: Any,
    ) -> bytes:
        """The image with the classes' colours over it, as the bytes of a PNG or JPEG."""
        kept = options.pop("classes", None)
        query = _query(kept, output="overlay", opacity=opacity, **options)
        return self._post(image, model, query, f"image/{kind}")[1]

    def logits(self, image: Image, model: str | None = None, **options: Any) -> dict[str, Any]:
        """``logits`` (classes, h, w) float32, ``class_ids``, ``classes`` and ``image_size``."""
        query = _query(options.pop("classes", None), output="logits", **options)
        body = self._post(image, model, query, "application/x-npz")[1]
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
        """A tensor through a model, by the KServe protocol with binary tensors.

        :param batch: (N, C, H, W) float32 normalised, or (N, H, W, C) uint8, RGB of 3 bands.
        :param sizes: for a detector, (N, 2) height and width of each image within its input.
        :returns: (N, classes, h, w) float32 logits, or (N, H, W) labels; of a detector, the
            output of its graph.
        """
        given, data = [], b""
        tensors = {"images": batch, **({} if sizes is None else {"sizes": np.float32(sizes)})}
        for name, tensor in tensors.items():
            array = np.ascontiguousarray(tensor)
            given.append(
                {
                    "name": name,
                    "datatype": {"float32": "FP32", "uint8": "UINT8"}.get(array.dtype.name, "?"),
                    "shape": list(array.shape),
                    "parameters": {"binary_data_size": array.nbytes},
                }
            )
            data += array.tobytes()
        wanted = {"name": output, "parameters": {"binary_data": True}}
        limit = {"timeout": int(self._timeout * 1e6)}
        head = json.dumps({"inputs": given, "outputs": [wanted], "parameters": limit}).encode()
        headers, body = self._ask(
            "POST",
            f"/v2/models/{quote(model, '')}/infer",
            head + data,
            {_HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"},
        )
        length = int(headers[_HEADER_LENGTH.lower()])
        (found,) = json.loads(body[:length])["outputs"]
        kind = {"FP32": "<f4", "UINT8": "u1", "UINT16": "<u2", "INT64": "<i8"}[found["datatype"]]
        return np.frombuffer(body, kind, offset=length).reshape(found["shape"])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _post(
        self, image: Image, model: str | None, query: str, accept: str
    ) -> tuple[dict[str, str], bytes]:
        path = "/v1/segment" if model is None else f"/v1/models/{quote(model, '')}/segment"
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept": accept,
            "X-Timeout-Ms": f"{self._timeout * 1e3:.0f}",
        }
        return self._ask("POST", f"{path}?{query}", _encoded(image), headers)

    def _ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[dict[str, str], bytes]:
        end = time.monotonic() + self._timeout
        for left in range(self._retries, -1, -1):
            try:
                return self._once(method, path, body, headers or {})
            except ServiceError as error:
                wait = getattr(error, "retry_after", 0.1)
                if not left or error.status not in (0, *_AGAIN) or time.monotonic() + wait > end:
                    raise
            time.sleep(wait)
        raise AssertionError("unreachable")

    def _once(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[dict[str, str], bytes]:
        try:
            self._connection.request(method, self._base + path, body, {**self._headers, **headers})
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
        failure = ServiceError(
            answer.status, _detail(answer.status, data), found.get("x-request-id", "")
        )
        failure.retry_after = _seconds(found.get("retry-after"))  # type: ignore[attr-defined]
        raise failure


def _query(classes: Sequence[str | int] | None, **options: Any) -> str:
    pairs = [(name, value) for name, value in options.items() if value is not None]
    return urlencode([*pairs, *(("classes", kept) for kept in classes or ())])


def _encoded(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        from PIL import Image as Pictures

        if image.ndim not in (2, 3) or image.dtype.kind not in "uif":
            raise ServiceError(
                0, f"An image is (H, W, C) real numbers, not {image.shape} {image.dtype}."
            )
        buffer = io.BytesIO()
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            np.save(buffer, image, allow_pickle=False)
            return buffer.getvalue()
        Pictures.fromarray(image).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    return Path(image).read_bytes()


def _detail(status: int, body: bytes) -> str:
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return f"The service answered with status {status}."


def _seconds(text: str | None) -> float:
    return float(text) if text and text.isdigit() else 0.1
