"""The bundles being served, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime import Session, open_session
from fdconv_deploy.runtime.postprocessing import check_classes
from fdconv_deploy.runtime.tiling import slide_stride

from .problems import RefusedError
from .schemas import InputSize, ModelCard, ModelClass, OutputParity
from .settings import Settings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ServedModel:
    """A segmentor's session under its name, which is its bundle's folder name."""

    def __init__(self, name: str, session: Session, *, default: bool, owned: bool) -> None:
        self.name, self.session, self.owned = name, session, owned
        self.card = _card(name, session, default=default)

    def check_mode(self, mode: str | None) -> None:
        """Refuse a mode this model cannot run in.

        :raises RefusedError: 422.
        """
        if mode is not None and mode not in self.card.modes:
            raise RefusedError(
                422,
                f"The model {self.name!r} does not run in mode {mode!r}, only in "
                f"{', '.join(self.card.modes)}: its bundle records no stride that fits its input.",
            )


class Models:
    """Every served model. The first is the default."""

    def __init__(self, bundles: Sequence[Path | str | Session], settings: Settings) -> None:
        if not bundles:
            raise BundleError("There is nothing to serve: name one bundle or more.")
        self._models: dict[str, ServedModel] = {}
        try:
            for source in bundles:
                self._add(source, settings)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    @property
    def default(self) -> ServedModel:
        """The model that /v1/segment uses."""
        return next(iter(self._models.values()))

    def get(self, name: str) -> ServedModel:
        """The model called ``name``.

        :raises RefusedError: 404.
        """
        if name not in self._models:
            raise RefusedError(
                404, f"There is no model of that name; there are {', '.join(self._models)}."
            )
        return self._models[name]

    def close(self) -> None:
        """Close the sessions that were opened here."""
        for model in self._models.values():
            if model.owned:
                model.session.close()

    def _add(self, source: Path | str | Session, settings: Settings) -> None:
        owned = not isinstance(source, Session)
        session = (
            source
            if isinstance(source, Session)
            else open_session(
                source, settings.backend, threads=settings.threads, verify=settings.verify
            )
        )
        path = session.bundle.path.resolve()
        if not _NAME.fullmatch(path.name):
            raise BundleError(
                f"The bundle {path} is served under its folder's name, which may hold letters, "
                "digits, '.', '_' and '-' only. Rename the folder."
            )
        if path.name in self._models:
            raise BundleError(
                f"Two bundles are called {path.name!r}, and are served under that name. Rename "
                "one of their folders."
            )
        default = not self._models
        self._models[path.name] = ServedModel(path.name, session, default=default, owned=owned)


def _card(name: str, session: Session, *, default: bool) -> ModelCard:
    manifest = session.bundle.manifest
    names, colours = session.classes, session.palette  # a BundleError for a module's bundle
    check_classes(len(names))
    height, width = session.input_size
    modes: list[Literal["whole", "slide"]] = ["whole"]
    assert manifest.architecture is not None
    if session.mode == "slide" or manifest.architecture.test.stride is not None:
        try:
            slide_stride(manifest.architecture.test, (height, width))
            modes.append("slide")
        except BundleError:
            if session.mode == "slide":
                raise
    parity = manifest.parity.batches if manifest.parity else {}
    return ModelCard(
        name=name,
        default=default,
        classes=[
            ModelClass(id=number, name=label, color=colour)
            for number, (label, colour) in enumerate(zip(names, colours, strict=True))
        ],
        input=InputSize(height=height, width=width),
        batch_sizes=list(session.batch_sizes),
        mode=session.mode,
        modes=modes,
        fit=manifest.fit,
        precision=manifest.precision,
        backend=session.backend,
        checkpoint=Path(manifest.checkpoint.name).name if manifest.checkpoint else None,
        checkpoint_sha256=manifest.checkpoint.sha256 if manifest.checkpoint else None,
        parity=[
            OutputParity(batch=batch, **output.model_dump())
            for batch, outputs in parity.items()
            for output in outputs
        ],
        created_at=manifest.created_at,
        created_by=manifest.created_by,
    )
