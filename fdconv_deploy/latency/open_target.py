"""A side, opened: something that answers one request after another."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import FDConvError
from fdconv_deploy.latency.images import feeds, picture
from fdconv_deploy.latency.targets import Side
from fdconv_deploy.runtime import Bundle, GraphRunner, Session
from fdconv_deploy.runtime.backends import BackendOptions, select


@dataclass(frozen=True)
class Work:
    """``run``: one request; may be called from several threads at once.

    ``device``: "cpu", "cuda" or "service". ``details``: what turned out, for the report: the
    backend in use and why, the input's size.
    """

    run: Callable[[], Any]
    device: str
    details: dict[str, Any]
    close: Callable[[], None] = lambda: None


def open_work(side: Side) -> Work:
    """Load everything the side needs; nothing has been run then.

    :raises FDConvError: it cannot be had.
    """
    if side.kind == "bundle":
        return _bundle(side)
    if side.kind == "service":
        return _service(side)
    if side.kind == "call":
        module, _, function = side.source.partition(":")
        made: Work = getattr(import_module(module), function)(side)
        return made
    from fdconv_deploy.latency.torch_targets import open_checkpoint

    run, device, details = open_checkpoint(side)
    return Work(run, device, details)


def _bundle(side: Side) -> Work:
    bundle = Bundle.open(side.source)
    options = BackendOptions(threads=side.threads, native=side.native)
    backend, choice, graphs = select(bundle, side.backend, options)
    graphs = {side.batch: graphs.get(side.batch) or backend.load(bundle, side.batch)}
    session = Session(bundle, GraphRunner(bundle, backend, choice, graphs))
    specs = bundle.manifest.inputs[side.batch]
    size = next((list(spec.shape[2:]) for spec in specs if len(spec.shape) == 4), None)
    details = {
        "backend": session.backend, "choice": choice, "operators": backend.operators, "size": size
    }  # fmt: skip
    if side.whole:
        image = picture(session.input_size, session.preprocessing, side.image)
        ask = session.detect if session.detects else session.segment
        return Work(lambda: ask(image), backend.device, details, session.close)
    inputs = inputs_of(bundle, side)
    return Work(lambda: session.run_raw(inputs), backend.device, details, session.close)


def inputs_of(bundle: Bundle, side: Side, batch: int | None = None) -> dict[str, NDArray[Any]]:
    """What the bundle's graph of the side's batch size, or another, is run on."""
    described = bundle.manifest.architecture or bundle.manifest.detector
    specs = bundle.manifest.inputs[batch or side.batch]
    return feeds(specs, described.preprocessing if described else None, side.image)


def _npy(image: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image, allow_pickle=False)
    return buffer.getvalue()


def _service(side: Side) -> Work:
    from fdconv_deploy.client import Client

    with Client(side.source) as client:
        cards = client.models()
    names = [card["name"] for card in cards]
    if not cards or (side.model is not None and side.model not in names):
        raise FDConvError(
            f"The service at {side.source} has the models {', '.join(names) or 'none'}"
            + (f", not {side.model!r}." if side.model else ".")
        )
    card = next((card for card in cards if card["name"] == side.model), cards[0])
    size = card["input"]["height"], card["input"]["width"]
    if side.image:
        body = Path(side.image).read_bytes()
    else:
        from fdconv_deploy.runtime.visualization import encode

        how = Preprocessing.model_validate(card.get("preprocessing", {}))
        body = encode(picture(size), "JPEG") if how.loading == "color" else _npy(picture(size, how))
    name, detects = card["name"], card.get("kind") == "detector"
    of_thread = threading.local()

    def run() -> Any:
        client = getattr(of_thread, "client", None)
        if client is None:
            # A refusal is part of what a client sees, so it is not asked again in silence.
            client = of_thread.client = Client(side.source, retries=0)
        return client.detect(body, name) if detects else client.mask(body, name)

    details = {
        "backend": "http",
        "choice": f"model {name}, {card.get('backend') or 'not loaded yet'}",
        "size": list(size),
        "precision": card.get("precision", "?"),
    }
    return Work(run, "service", details)
