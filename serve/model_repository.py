"""The models being served: loaded, changed under way, and unloaded, without losing a request.

A request holds a lease on one :class:`Version` of its model from decoding to encoding. A
model that was replaced or evicted takes no new leases and is closed when the last one ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.model_cards import model_card, model_name
from fdconv_deploy.serve.model_versions import Model, Version, bundles_in, fingerprint, timed_runs
from fdconv_deploy.serve.schemas import ModelCard
from fdconv_deploy.serve.settings import Settings

from fdconv_deploy.errors import BundleError, FDConvError
from fdconv_deploy.runtime import Bundle, Session
from fdconv_deploy.runtime.bundle import MANIFEST_NAME
from fdconv_deploy.runtime.bundle_checks import bundle_root

log = logging.getLogger("fdconv.serve")


class Repository:
    """Every served model, the first being the default. Used from one event loop.

    :param open_version: opens a bundle's session (on a loader thread).
    :param on_load: told of each new version before it takes requests.
    :param on_close: told of each version that has ended, before its session is closed.
    """

    def __init__(
        self,
        sources: Sequence[Path | str | Session],
        settings: Settings,
        *,
        open_version: Callable[[Bundle], Session],
        on_load: Callable[[Version], None] = lambda _: None,
        on_close: Callable[[Version], None] = lambda _: None,
    ) -> None:
        if not sources:
            raise BundleError("There is nothing to serve: name one bundle or more.")
        self._settings = settings
        self._open_version = open_version
        self._on_load, self._on_close = on_load, on_close
        self._models: dict[str, Model] = {}
        self._folders: list[Path] = []
        self._loader = ThreadPoolExecutor(1, "loader")
        self._opened: dict[str, Session] = {}
        try:
            for source in sources:
                self._add_source(source)
        except BaseException:
            for session in self._opened.values():
                session.close()
            raise
        if not self._models:
            raise BundleError(f"There is no bundle in {', '.join(map(str, self._folders))}.")

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    @property
    def default(self) -> Model:
        """The model that /v1/segment uses."""
        return next(iter(self._models.values()))

    def get(self, name: str) -> Model:
        """The model called ``name``.

        :raises RefusedError: 404.
        """
        if name not in self._models:
            raise RefusedError(
                404, f"There is no model of that name; there are {', '.join(self._models)}."
            )
        return self._models[name]

    def get_version(self, name: str, version: str | None) -> Model:
        """As :meth:`get`, and of this version where one is given.

        :raises RefusedError: 404.
        """
        model = self.get(name)
        if version and (model.version is None or model.version.card.version != version):
            raise RefusedError(
                404,
                f"The model {name!r} has no version {version[:40]!r}; only the one that was "
                "loaded last is served. Leave the version out.",
            )
        return model

    def card(self, model: Model) -> ModelCard:
        """A model's card as of now."""
        if model.version is not None:
            return model.version.card
        state = "failed" if model.error else "loading" if model.loading else "unloaded"
        return model.card.model_copy(update={"state": state})

    def loaded_bytes(self) -> int:
        """What the loaded models hold, as their cards estimate it."""
        return sum(m.version.card.bytes for m in self._models.values() if m.version)

    async def start(self) -> None:
        """Load what is loaded at the start.

        :raises FDConvError: a model does not load.
        """
        for model in list(self._models.values()):
            if self._settings.load == "start" or model.session is not None:
                await self._loaded(model)

    @asynccontextmanager
    async def lease(self, model: Model) -> AsyncIterator[Version]:
        """Hold the model's version, loading it first where it is not.

        :raises RefusedError: 503, it cannot be loaded, or was unloaded by hand.
        """
        version = model.version
        if version is None:
            if not model.wanted:
                raise self._unavailable(f"The model {model.name!r} is unloaded.")
            try:
                version = await self._loaded(model)
            except (FDConvError, OSError) as error:
                raise self._unavailable(
                    f"The model {model.name!r} cannot be loaded; the server's log says why."
                ) from error
        version.leases += 1
        model.last_used = time.monotonic()
        try:
            yield version
        finally:
            version.leases -= 1
            self._close_if_done(version)

    async def load(self, model: Model) -> None:
        """Load a model anew, replacing the version there is.

        :raises FDConvError: it does not load; the version there was stays.
        """
        model.wanted = True
        await self._loaded(model, anew=True)

    async def unload(self, model: Model) -> None:
        """Let a model go until it is loaded by hand."""
        model.wanted = False
        if model.version is not None:
            self._retire(model)

    async def poll(self) -> None:
        """Look once for bundles that changed, came or went, and follow them."""
        for folder in self._folders:
            for path in bundles_in(folder):
                if path.name not in self._models:
                    try:
                        self._add_path(path)
                        log.info("%s: found", path.name)
                    except FDConvError as error:
                        log.warning("%s is not served: %s", path, error)
        for model in list(self._models.values()):
            if model.session is not None:
                continue
            found = fingerprint(model.path)
            if found is None:
                if model.path.parent in self._folders and len(self._models) > 1:
                    log.info("%s: gone", model.name)
                    if model.version is not None:
                        self._retire(model)
                    del self._models[model.name]
            elif found != model.fingerprint and model.wanted:
                await self._follow(model)

    async def close(self) -> None:
        """Close every version, leased or not."""
        for model in self._models.values():
            if model.loading is not None:
                await asyncio.wait([model.loading])
            if model.version is not None:
                version, model.version = model.version, None
                version.retired, version.leases = True, 0
                self._close_if_done(version)
        self._loader.shutdown(wait=True)
        for session in self._opened.values():
            session.close()

    async def _follow(self, model: Model) -> None:
        try:
            if model.version is not None:
                await self._loaded(model, anew=True)
                log.info("%s: changed on disk; version %d serves", model.name, model.generation)
            else:
                found = fingerprint(model.path)
                self._describe(model, Bundle.open(model.path, verify=False))
                model.fingerprint = found
                model.error = None
                if self._settings.load == "start":
                    await self._loaded(model)
        except (FDConvError, OSError) as error:
            # Half-copied, perhaps: what is loaded goes on serving, and the next look decides.
            log.warning("%s: changed, but does not load: %s", model.name, error)
            model.error = str(error)

    async def _loaded(self, model: Model, *, anew: bool = False) -> Version:
        if model.version is not None and not anew:
            return model.version
        if model.loading is None:
            model.loading = asyncio.create_task(self._load(model))
        # Shielded: a client that leaves does not stop the load others wait for.
        return await asyncio.shield(model.loading)

    async def _load(self, model: Model) -> Version:
        if model.version is None:
            # Before, not after: both together may be more than there is.
            self._evict(keep=model, coming=model.card.bytes)
        try:
            version = await asyncio.get_running_loop().run_in_executor(
                self._loader, self._open, model
            )
        except Exception as error:
            model.error = str(error)
            log.error("%s: does not load: %s", model.name, error)
            raise
        finally:
            model.loading = None
        self._on_load(version)
        if model.version is not None:
            self._retire(model)
        model.version, model.error = version, None
        model.last_used = time.monotonic()
        self._evict(keep=model)
        return version

    def _open(self, model: Model) -> Version:
        # On the loader thread.
        before = fingerprint(model.path)
        session = model.session or self._opened.pop(model.name, None)
        if session is None:
            session = self._open_version(Bundle.open(model.path, verify=self._settings.verify))
        try:
            card = model_card(model.name, session.bundle, default=model.card.default)
            seconds = session.warm_up()
            benchmark = timed_runs(session)
        except BaseException:
            if model.session is None:
                session.close()
            raise
        model.generation += 1
        model.fingerprint = before
        model.card = card
        using = f" With {session.operators}." if session.operators else ""
        log.info("%s: ready in %.1f s. %s%s", model.name, seconds, session.choice, using)
        if len(session.ways) > 1:
            ways = "; ".join(f"{batch} by {way}" for batch, way in session.ways.items())
            log.info("%s: batches of %s.", model.name, ways)
        loaded = card.model_copy(
            update={
                "state": "ready",
                "version": str(model.generation),
                "backend": session.backend,
                "benchmark": benchmark,
            }
        )
        return Version(model.name, session, loaded, owned=model.session is None)

    def _evict(self, keep: Model, coming: int = 0) -> None:
        budget = self._settings.memory_budget_bytes
        if budget is None:
            return
        idle = sorted(
            (m for m in self._models.values() if m.version and m.version.owned and m is not keep),
            key=lambda m: m.last_used,
        )
        for model in idle:
            if self.loaded_bytes() + coming <= budget:
                return
            log.info("%s: unloaded to stay within the memory budget", model.name)
            self._retire(model)
        if not coming and self.loaded_bytes() > budget:
            log.warning("%s alone is larger than the memory budget", keep.name)

    def _retire(self, model: Model) -> None:
        version, model.version = model.version, None
        assert version is not None
        version.retired = True
        self._close_if_done(version)

    def _close_if_done(self, version: Version) -> None:
        if version.retired and not version.leases:
            self._on_close(version)
            if version.owned:
                version.session.close()

    def _add_source(self, source: Path | str | Session) -> None:
        if isinstance(source, Session):
            self._add(source.bundle, session=source)
            return
        path = bundle_root(Path(source))
        if path.is_dir() and not (path / MANIFEST_NAME).exists():
            found = bundles_in(path)
            if found:
                self._folders.append(path)
                for bundle in found:
                    self._add_path(bundle)
                return
        self._add_path(path)

    def _add_path(self, path: Path) -> None:
        found = fingerprint(path)
        at_start = self._settings.load == "start"
        bundle = Bundle.open(path, verify=self._settings.verify and at_start)
        model = self._add(bundle)
        model.fingerprint = found

    def _add(self, bundle: Bundle, session: Session | None = None) -> Model:
        path = bundle.path.resolve()
        name = model_name(path)
        if name in self._models:
            raise BundleError(
                f"Two bundles are called {name!r}, and are served under that name. Rename "
                "one of their folders."
            )
        # The path as given, not resolved: replacing a link is a change to follow.
        model = Model(
            name,
            bundle.path,
            model_card(name, bundle, default=not self._models),
            session=session,
        )
        if session is None and self._settings.load == "start":
            # Opened here so that a missing backend ends the start, not the first request.
            self._opened[name] = self._open_version(bundle)
        self._models[name] = model
        return model

    def _describe(self, model: Model, bundle: Bundle) -> None:
        model.card = model_card(model.name, bundle, default=model.card.default)

    def _unavailable(self, detail: str) -> RefusedError:
        return RefusedError(503, detail, {"Retry-After": str(self._settings.retry_after_seconds)})
