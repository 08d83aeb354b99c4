"""The models being served: loaded, changed under way, and unloaded, without losing a request.

A request holds a lease on one :class:`Version` of its model from decoding to encoding. A
model that was replaced or evicted takes no new leases and is closed when the last one ends.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from fdconv_deploy.errors import BundleError, FDConvError
from fdconv_deploy.runtime import Bundle, Session
from fdconv_deploy.runtime.batching import least_seconds
from fdconv_deploy.runtime.bundle import bundle_root
from fdconv_deploy.runtime.manifest import MANIFEST_NAME, Manifest
from fdconv_deploy.runtime.preprocessing import published_size
from fdconv_deploy.serve.batching import DeadlineError, Lane
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.model_cards import Benchmark, ModelCard, model_card, model_name
from fdconv_deploy.serve.settings import Settings

log = logging.getLogger("fdconv.serve")
# What timing may add to a model's loading, in seconds, beyond one run of each batch size.
_TIMING = 1.0


@dataclass(eq=False)
class Version:
    """One opened state of a model's bundle; ``owned`` sessions are closed with it."""

    name: str
    session: Session
    card: ModelCard
    owned: bool
    leases: int = 1  # its model's own while it is loaded, and one for each request
    lanes: dict[tuple[int, ...], Lane] = field(default_factory=dict)  # by (height, width)

    @cached_property
    def tensor_bytes(self) -> int:
        """Memory that one image's inputs and outputs of the network take, at its largest."""
        manifest = self.session.bundle.manifest
        batch, found = min(manifest.models), []
        for each in map(manifest.at, manifest.sizes):
            specs = (*each.inputs[batch], *each.outputs[batch])
            found.append(sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in specs))
        return max(found) // batch

    def slide_bytes(self, size: tuple[int, int]) -> int:
        """Memory that mode 'slide' takes for an image of (H, W), beside its pixels.

        Those are the outputs of two rows of crops, and what is averaged of a block of rows.
        """
        session, card = self.session, self.card
        assert card.output is not None
        height, width = published_size(*size, session.preprocessing)
        architecture = session.bundle.manifest.architecture
        assert architecture is not None
        stride = architecture.test.stride or session.input_size
        crops = 2 * (width // stride[1] + 1) + max(session.batch_sizes)
        averaged = 4 * max(16 << 20, 8 * 4 * card.output.channels * width)
        colors = session.preprocessing.loading == "color" and not session.preprocessing.to_float32
        resized = height * width * session.preprocessing.channels * (1 if colors else 4)
        return crops * self.tensor_bytes + averaged + resized


@dataclass(eq=False)
class Model:
    """A name, the bundle behind it, and the version that is loaded, if one is."""

    name: str
    path: Path
    card: ModelCard  # of the bundle, not loaded
    session: Session | None = None  # the caller's own, already open
    opened: Session | None = None  # by the service, and not loaded yet
    fingerprint: tuple[int, int, int] | None = None
    version: Version | None = None
    loading: asyncio.Task[Version] | None = None
    generation: int = 0
    manifest: Manifest | None = None  # of the version that was loaded last
    last_used: float = 0.0
    error: str | None = None
    wanted: bool = True  # False once it was unloaded by hand

    @property
    def current_card(self) -> ModelCard:
        """Its card as of now."""
        if self.version is not None:
            return self.version.card
        state = "failed" if self.error else "loading" if self.loading else "unloaded"
        return self.card.model_copy(update={"state": state})


class Repository:
    """Every served model, the first being the default. Used from one event loop.

    ``open_version`` opens a bundle's session, on a loader thread; ``on_load`` is called with each
    new version before it takes requests, ``on_close`` before the session of one is closed.
    """

    def __init__(
        self,
        sources: Sequence[Path | str | Session],
        settings: Settings,
        *,
        open_version: Callable[[Bundle], Session],
        on_load: Callable[[Version], None],
        on_close: Callable[[Version], None],
    ) -> None:
        if not sources:
            raise BundleError("There is nothing to serve: name one bundle or more.")
        self._settings = settings
        self._open_version = open_version
        self._on_load, self._on_close = on_load, on_close
        self._models: dict[str, Model] = {}
        self._default = ""
        self._folders: list[Path] = []
        self._not_served: dict[Path, str] = {}  # what came and could not be opened, and why
        self._loader = ThreadPoolExecutor(1, "loader")
        try:
            for source in sources:
                self._add_source(source)
        except BaseException:
            self._close_opened()
            raise
        if not self._models:
            raise BundleError(f"There is no bundle in {', '.join(map(str, self._folders))}.")

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    @property
    def default(self) -> Model:
        """The model that /v1/segment uses: the first at the start, and never another."""
        if self._default not in self._models:
            raise self._unavailable(
                f"The default model {self._default!r} is gone; there are "
                f"{', '.join(self._models)}. Name one: /v1/models/NAME/segment."
            )
        return self._models[self._default]

    def is_ready(self, name: str, version: str = "") -> bool:
        """Whether there is a model of that name, loaded, and of this version if one is given."""
        found = self._models[name].version if name in self._models else None
        return found is not None and version in ("", found.card.version)

    def get(self, name: str, version: str = "") -> Model:
        """The model called ``name``; refused with 404 if none is, or not of this version."""
        if name not in self._models:
            raise RefusedError(
                404, f"There is no model of that name; there are {', '.join(self._models)}."
            )
        if version and not self.is_ready(name, version):
            raise RefusedError(
                404,
                f"The model {name!r} has no version {version[:40]!r}; only the one that was "
                "loaded last is served. Leave the version out.",
            )
        return self._models[name]

    def loaded_bytes(self) -> int:
        """What the loaded models hold, as their cards estimate it."""
        return sum(m.version.card.bytes for m in self if m.version)

    async def start(self) -> None:
        """Load what is loaded at the start."""
        for model in list(self):
            if self._settings.load == "start" or model.session is not None:
                await self._loaded(model)

    async def lease(self, model: Model, deadline: float) -> AbstractContextManager[Version]:
        """A ``with`` block that holds the model's version, which is loaded first where it is not.

        Refused with 503 if it cannot be; past the deadline, loading goes on for the next request.
        """
        while model.version is None:  # once loaded, it may be unloaded before this goes on
            if not model.wanted:
                raise self._unavailable(f"The model {model.name!r} is unloaded.")
            try:
                left = max(deadline - time.perf_counter(), 0.0)
                await asyncio.wait_for(self._loaded(model), left)
            except asyncio.TimeoutError:
                raise DeadlineError from None
            except (FDConvError, OSError) as error:
                raise self._unavailable(
                    f"The model {model.name!r} cannot be loaded; the server's log says why."
                ) from error
        model.last_used = time.monotonic()
        return self._leased(model.version)

    @contextmanager
    def _leased(self, version: Version) -> Iterator[Version]:
        version.leases += 1
        try:
            yield version
        finally:
            self._release(version)

    def _release(self, version: Version) -> None:
        version.leases -= 1
        if not version.leases:
            self._on_close(version)
            if version.owned:
                version.session.close()

    def _retire(self, model: Model) -> None:
        version, model.version = model.version, None
        if version is not None:
            self._release(version)

    async def load(self, model: Model) -> None:
        """Load a model, or again if its bundle has changed; if it fails, what there was stays."""
        model.wanted = True
        unchanged = model.session is not None or fingerprint(model.path) == model.fingerprint
        await self._loaded(model, anew=not unchanged)

    async def unload(self, model: Model) -> None:
        """Let a model go until it is loaded by hand; one that is being loaded, once it is."""
        model.wanted = False
        self._retire(model)
        if model.loading is not None:
            await asyncio.wait([model.loading])

    async def poll(self) -> None:
        """Look once for bundles that changed, came or went, and follow them."""
        for folder in self._folders:
            for path in bundles_in(folder):
                if path.name not in self._models:
                    await self._found(path)
        for model in list(self):
            if model.session is not None:
                continue
            found = fingerprint(model.path)
            if found is None:
                if model.path.parent in self._folders and len(self._models) > 1:
                    log.info("%s: gone", model.name)
                    model.wanted = False
                    self._retire(model)
                    del self._models[model.name]
            elif found != model.fingerprint and model.wanted:
                await self._follow(model)

    async def close(self) -> None:
        """Close every version, leased or not."""
        for model in self:
            if model.loading is not None:
                await asyncio.wait([model.loading])
            if model.version is not None:
                model.version.leases = 1
                self._retire(model)
        self._loader.shutdown(wait=True)
        self._close_opened()

    def _close_opened(self) -> None:
        for model in self:
            if model.opened is not None:
                model.opened.close()

    async def _found(self, path: Path) -> None:
        """Serve a bundle that has come, as ``load`` says; half-copied, the next look decides."""
        model = None
        try:
            model = self._add(path)
            if self._settings.load == "start":
                await self._loaded(model)
            log.info("%s: found", model.name)
        except (FDConvError, OSError) as error:
            if model is not None:
                del self._models[model.name]
            if self._not_served.get(path) != str(error):  # said once, and not at every look
                log.warning("%s is not served: %s", path, error)
            self._not_served[path] = str(error)
        else:
            self._not_served.pop(path, None)

    async def _follow(self, model: Model) -> None:
        try:
            if model.version is not None:
                await self._loaded(model, anew=True)
                log.info("%s: changed on disk; version %d serves", model.name, model.generation)
            else:
                found = fingerprint(model.path)
                bundle = Bundle.open(model.path, verify=False)
                model.card = model_card(model.name, bundle, default=model.card.default)
                model.fingerprint, model.error = found, None
                if self._settings.load == "start":
                    await self._loaded(model)
        except (FDConvError, OSError) as error:
            # Half-copied, perhaps: what is loaded goes on serving, and the next look decides.
            self._failed(model, error)

    def _failed(self, model: Model, error: Exception) -> None:
        text = str(error)
        if model.version is not None:
            text += f" Version {model.version.card.version}, loaded before, goes on serving."
        if text != model.error:  # said once, and not at every look
            log.error("%s: does not load: %s", model.name, text)
        model.error = text

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
            self._failed(model, error)
            raise
        finally:
            model.loading = None
        self._on_load(version)
        before, model.version, model.error = model.version, version, None
        if before is not None:
            self._release(before)
        if not model.wanted:  # unloaded in the meantime, or gone
            self._retire(model)
        model.last_used = time.monotonic()
        self._evict(keep=model)
        return version

    def _open(self, model: Model) -> Version:
        # On the loader thread.
        before = fingerprint(model.path)
        session, model.opened = model.session or model.opened, None
        if session is None:
            # All of it is read here and now: what is copied over it later is another version.
            bundle = Bundle.open(model.path, verify=self._settings.verify, hold=True)
            session = self._open_version(bundle)
        try:
            card = model_card(model.name, session.bundle, default=model.card.default)
            seconds = session.warm_up()
            benchmark = timed_runs(session)
        except BaseException:
            if model.session is None:
                session.close()
            raise
        # Unloaded or evicted, and loaded again, it is the version that clients may have pinned.
        if session.bundle.manifest != model.manifest:
            model.generation += 1
        model.manifest = session.bundle.manifest
        model.fingerprint = before
        model.card = card
        using = f" With {session.operators}." if session.operators else ""
        log.info("%s: ready in %.1f s. %s%s", model.name, seconds, session.choice, using)
        if len(session.runner.ways) > 1:
            ways = "; ".join(f"{batch} by {way}" for batch, way in session.runner.ways.items())
            log.info("%s: batches of %s.", model.name, ways)
        own = {"version": str(model.generation), "backend": session.backend}
        loaded = card.model_copy(update={**own, "state": "ready", "benchmark": benchmark})
        return Version(model.name, session, loaded, owned=model.session is None)

    def _evict(self, keep: Model, coming: int = 0) -> None:
        budget = self._settings.memory_budget_bytes
        if budget is None:
            return
        idle = [m for m in self if m.version and m.version.owned and m is not keep]
        for model in sorted(idle, key=lambda m: m.last_used):
            if self.loaded_bytes() + coming <= budget:
                return
            log.info("%s: unloaded to stay within the memory budget", model.name)
            self._retire(model)
        if not coming and self.loaded_bytes() > budget:
            log.warning("%s alone is larger than the memory budget", keep.name)

    def _add_source(self, source: Path | str | Session) -> None:
        if isinstance(source, Session):
            self._add(source)
            return
        path = bundle_root(Path(source))
        found = bundles_of(path)
        if found != [path]:
            self._folders.append(path)
        for bundle in found:
            self._add(bundle, opened=self._settings.load == "start")

    def _add(self, source: Path | Session, *, opened: bool = False) -> Model:
        """Serve a bundle, ``opened`` here so that a missing backend ends the start."""
        session = found = None
        if isinstance(source, Session):
            session, bundle = source, source.bundle
        else:
            found = fingerprint(source)
            bundle = Bundle.open(source, verify=self._settings.verify and opened)
        name = model_name(bundle.path.resolve())
        if name in self._models:
            raise BundleError(
                f"Two bundles are called {name!r}, and are served under that name. Rename "
                "one of their folders."
            )
        self._default = self._default or name
        card = model_card(name, bundle, default=name == self._default)
        # The path as given, not resolved: replacing a link is a change to follow.
        model = Model(name, bundle.path, card, session, fingerprint=found)
        if opened:
            model.opened = self._open_version(bundle)
        self._models[name] = model
        return model

    def _unavailable(self, detail: str) -> RefusedError:
        return RefusedError(503, detail, {"Retry-After": str(self._settings.retry_after_seconds)})


def fingerprint(path: Path) -> tuple[int, int, int] | None:
    """What changes when a bundle is written anew; None when there is no bundle."""
    try:
        found = (path / MANIFEST_NAME).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def bundles_of(path: Path) -> list[Path]:
    """The bundle at ``path``, or, if that is a folder of them, the bundles in it."""
    path = bundle_root(path)
    if path.is_dir() and not (path / MANIFEST_NAME).exists():
        return bundles_in(path) or [path]
    return [path]


def bundles_in(folder: Path) -> list[Path]:
    """The bundles right inside a folder, by name; hidden ones are not looked at."""
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and (path / MANIFEST_NAME).is_file()
    )


def timed_runs(session: Session) -> list[Benchmark]:
    """The least time of a few runs of each batch size of a session that is warmed up."""
    runs = {
        batch: partial(session.run_batches, {s.name: np.zeros(s.shape, s.dtype) for s in specs})
        for batch, specs in session.bundle.manifest.inputs.items()
    }
    return [
        Benchmark(batch=batch, milliseconds=round(seconds * 1e3, 3))
        for batch, seconds in sorted(least_seconds(runs, seconds=_TIMING).items())
    ]
