"""``fdconv segment --ray``: many images by Ray Data, from folders or object stores.

The driver lists images and results, Ray's workers open the bundle once each, answer, and write each
image's results whole. What lies where, and how Ray is joined, is decided here; how an image is
answered, named and encoded is `result_files`'.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, cast

import numpy as np

from fdconv_deploy.environment import needed_by
from fdconv_deploy.errors import FDConvError, ImageError
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.graph_runner import Runner
from fdconv_deploy.runtime.images import ImageFile
from fdconv_deploy.runtime.input_files import (
    CLASSES_NAME,
    LEGEND_NAME,
    Source,
    sources_at,
    sources_below,
)
from fdconv_deploy.runtime.result_files import (
    Failure,
    Result,
    ResultFolder,
    ResultOptions,
    image_results,
    legends_of,
    places_of,
)
from fdconv_deploy.runtime.session import Session, open_session

# Stores in which an object appears when all of it was sent; elsewhere a file is renamed.
_OBJECT_STORES = ("s3", "gcs", "abfs")
# Images of one Ray task: what a worker that dies has to do again, and how often results are told.
_TASK_IMAGES = 8
_READERS = 8
_CONNECT_SECONDS = 5
# What a gRPC client sends first, of HTTP/2, and the kind of frame that a server answers with. Ray
# tries forever to join what takes its connections and is no Ray.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = 4
# Of a Ray that is started here: paths and lines go through it, no pictures.
_STORE_BYTES = 128 << 20


class Location(PurePosixPath):
    """Where an object lies, ``s3://bucket/photos/1.jpg``, without credentials and options."""

    def __str__(self) -> str:
        scheme, slash, rest = super().__str__().partition("/")
        return f"{scheme}//{rest}" if scheme.endswith(":") else f"{scheme}{slash}{rest}"


class Store(ResultFolder):
    """A folder or an object of an object store, as pyarrow reads and writes it.

    Args:
        url: as `pyarrow.fs.FileSystem.from_uri` takes it; ``ImageError`` where it knows none.

    Attributes:
        root: what it is called, a `Location`.
    """

    def __init__(self, url: str) -> None:
        with needed_by(f"Reading {url.partition(':')[0]}://", "ray"):
            import ray  # noqa: F401 - which brings pyarrow, and is what to install
            from pyarrow import fs
        try:
            self._files, self._base = fs.FileSystem.from_uri(url)
        except (ValueError, OSError, ImportError) as error:
            shown = re.sub("//[^/]*@", "//", url.partition("?")[0])  # without credentials
            raise ImageError(
                f"{shown} is no place that can be read: {error}. Give a folder, or a URL such as "
                "s3://bucket/photos, gs:// or abfs://."
            ) from None
        self._base = self._base.rstrip("/")
        self.root = Location(f"{url.partition(':')[0]}:", self._base.lstrip("/"))

    def sizes(self) -> dict[PurePath, int]:
        """The bytes of each object in it, or of itself where it is one; empty if it is missing."""
        from pyarrow import fs

        try:
            found = self._files.get_file_info([self._base])
            if not found[0].is_file:
                selector = fs.FileSelector(self._base, allow_not_found=True, recursive=True)
                found = self._files.get_file_info(selector)
        except OSError as error:
            raise ImageError(f"{self.root} cannot be listed: {error}.") from None
        below = len(self._base)
        return {self.root / i.path[below:].lstrip("/"): i.size for i in found if i.is_file}

    def read(self, path: PurePath) -> bytes:
        """An object's bytes; ``ImageError`` where it cannot be read."""
        try:
            with self._files.open_input_stream(self._at(path)) as stream:
                return stream.read()
        except OSError as error:
            raise ImageError(f"The image {path} cannot be read: {error}.") from None

    def write(self, path: PurePath, data: bytes) -> None:
        """Write or replace an object, whole or not at all."""
        at = final = self._at(path)
        if self._files.type_name not in _OBJECT_STORES:
            folder, _, name = final.rpartition("/")
            self._files.create_dir(folder)
            at = f"{folder}/.{name}.{secrets.token_hex(4)}"
        with self._files.open_output_stream(at) as stream:
            stream.write(data)
        if at != final:
            self._files.move(at, final)

    def size_of(self, path: PurePath) -> int | None:
        """An object's bytes; None where there is none."""
        (found,) = self._files.get_file_info([self._at(path)])
        return found.size if found.is_file else None

    def _at(self, path: PurePath) -> str:
        return "/".join((self._base, *path.relative_to(self.root).parts))


def is_url(text: str) -> bool:
    """Whether a name is a URL, of an object store; ``file://`` is a local path's."""
    return "://" in text and not text.startswith("file://")


def local_path(text: str) -> Path:
    """The path that a name without, or with, ``file://`` stands for."""
    return Path(text.removeprefix("file://"))


def _folder_at(place: str) -> ResultFolder:
    return Store(place) if is_url(place) else ResultFolder(local_path(place).absolute())


class RaySegmentation:
    """A run of ``fdconv segment`` on Ray: what it will do, checked before Ray is joined.

    Args:
        bundle: the bundle's folder, which every worker sees under this path.
        inputs: as `sources_at`, and URLs of folders or objects.
        output: a folder that every worker sees, or the URL of one.

    Attributes:
        session: tells what the bundle is; it runs nothing.
        sources: images and videos found, with absolute paths.
        folder: where results go.

    Raises:
        BundleError, ImageError: as `open_session` and `sources_at`.
    """

    def __init__(self, bundle: Path, inputs: Sequence[str], output: str) -> None:
        self.session = Session(Bundle.open(bundle.absolute()), cast(Runner, None))
        self._stores = [text for text in inputs if is_url(text)]
        self._output, self._results = output, _folder_at(output)
        self.folder = self._results.root
        self.sources: list[Source] = []
        for text in inputs:
            if is_url(text):
                self.sources += self._stored(Store(text))
            else:
                found = sources_at([local_path(text)], Path(self.folder))
                self.sources += [Source(Path(one.path).absolute(), one.name) for one in found]

    def _stored(self, store: Store) -> list[Source]:
        """An object, or the images of a folder of a store, by the rules of a local folder."""
        files, root = list(store.sizes()), store.root
        if files == [root]:
            return [Source(root, PurePath(root.stem))]
        if not files:
            raise ImageError(f"{root} does not exist or is empty. Check the URL.")
        legends = {file.parent for file in files if file.name == LEGEND_NAME}
        results = {file.parent for file in files if file.name == CLASSES_NAME} & legends - {root}
        left_out = {self.folder, *results} - {root}
        shown = [
            file
            for file in files
            if not left_out & {*file.parents}
            and not any(part.startswith(".") for part in file.relative_to(root).parts)
        ]
        return sources_below(root, sorted(shown), "folder")

    def run(
        self,
        address: str,
        backend: str,
        options: ResultOptions,
        cpus: int | None,
        skipped: Callable[[PurePath], None],
    ) -> Iterator[Result | Failure]:
        """Answer the images and write their results, in whatever order workers are done.

        As `segment_files`, but that videos fail; ``FDConvError`` also where Ray cannot be joined,
        as `join_ray` says of ``address``, or ended the run. Workers of a cluster with GPUs have one
        each, unless ``backend`` is a CPU's. ``cpus`` are each worker's, and threads of its session;
        by default 4, or what the largest machine has.
        """
        results = self._results
        size_of = results.sizes().get if isinstance(results, Store) else results.size_of
        places = places_of(self.session, self.sources, self.folder, options, skipped, size_of)
        legends = legends_of(self.session, results, options.overwrite)
        for source in [source for source in places if source.is_video]:
            del places[source]
            error = ImageError(f"{source.path} is a video. Segment videos without --ray.")
            yield Failure(source.path, error)
        if not places:
            return
        join_ray(address, include_dashboard=False, object_store_memory=_STORE_BYTES)
        with needed_by("--ray", "ray"):
            import ray.data
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            for path, data in legends.items():
                results.write(path, data)
            alive = (node["Resources"] for node in ray.nodes() if node["Alive"])
            largest = max((resources.get("CPU", 0) for resources in alive), default=0)
            cpus = cpus or int(min(4, largest or 4))
            on_cpu = backend.startswith(("onnxruntime-cpu", "openvino"))
            on_gpu = not on_cpu and ray.cluster_resources().get("GPU", 0) > 0
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = context.print_on_execution_start = False
            batch = self.session.batch_sizes[-1]
            rows = batch * -(-_TASK_IMAGES // batch)
            bundle = str(self.session.bundle.path)
            answers = ray.data.from_items(
                [{"work": one} for one in places.items()],
                override_num_blocks=-(-len(places) // rows),
            ).map_batches(
                _Worker,
                fn_constructor_args=(bundle, backend, options, cpus, self._stores, self._output),
                batch_size=rows,
                num_cpus=None if on_gpu else cpus,
                num_gpus=1 if on_gpu else None,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=None),
            )
            for row in answers.iter_rows():
                if isinstance(row["answer"], Exception):
                    raise row["answer"]
                yield row["answer"]
        finally:
            ray.shutdown()


@dataclass(eq=False)
class _Worker:
    """A Ray actor: a session, opened once, and the results of the images it is given.

    Errors are answers, so that they arrive as they were raised.
    """

    bundle: str
    backend: str
    options: ResultOptions
    threads: int
    stores: Sequence[str]
    output: str

    @cached_property
    def _opened(self) -> tuple[Session, list[Store], ResultFolder, ThreadPoolExecutor]:
        session = open_session(self.bundle, self.backend, threads=self.threads)
        stores = [Store(url) for url in self.stores]
        return session, stores, _folder_at(self.output), ThreadPoolExecutor(_READERS)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """``work``, (N,) of sources and places; gives ``answer``, as many results or errors."""
        answers: list[Any] = []
        try:
            answers.extend(self._answers(dict(map(tuple, batch["work"]))))
        except (FDConvError, OSError) as error:
            answers.append(error)
        column = np.empty(len(answers), object)
        column[:] = answers
        return {"answer": column}

    def _answers(self, images: dict[Source, dict[str, PurePath]]) -> Iterator[Any]:
        session, stores, folder, readers = self._opened
        ahead = {
            source: readers.submit(store.read, source.path)
            for source in images
            for store in stores
            if isinstance(source.path, Location) and source.path.is_relative_to(store.root)
        }

        def read(source: Source) -> Any:
            if source not in ahead:
                return session.read_image(Path(source.path))
            data = ahead[source].result()
            if not data:
                raise ImageError(f"The image {source.path} is an empty file.")
            name = f"The image {source.path}"
            return session.read_image(ImageFile(data, name, data[:32]))

        for answer in image_results(session, images, self.options, read):
            if isinstance(answer, Failure):
                yield answer
                continue
            result, contents = answer
            # A task is done again when its worker dies: what it has written stays.
            if self.options.overwrite or not all(map(folder.size_of, result.places.values())):
                for path, data in contents:
                    folder.write(path, data)
            yield result


def join_ray(address: str, **local: Any) -> None:
    """Connect to a cluster, or start Ray on this machine; ``FDConvError`` if there is none.

    Args:
        address: ``HOST:PORT``, "auto", or "local" for a Ray of one's own, with ``ray.init``'s
            arguments in ``local``.
    """
    named = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    host, colon, port = named.rpartition(":")
    if named.startswith("ray://"):
        raise FDConvError(
            f"{named} is an address of Ray Client, by which this does not run. Run the command on "
            "a machine of the cluster with --ray auto, e.g. by `ray job submit`."
        )
    if named not in ("auto", "local"):
        advice = "Give --ray local, auto or HOST:PORT."
        if not (colon and host and port.isdecimal()):
            raise FDConvError(f"{named!r} is no address of a Ray cluster. {advice}")
        try:
            at = (host.strip("[]"), int(port))
            with socket.create_connection(at, _CONNECT_SECONDS) as connection:
                if os.environ.get("RAY_USE_TLS", "0") == "0":
                    connection.sendall(_GREETING)
                    if connection.recv(4)[3:] != bytes([_SETTINGS]):
                        raise OSError("what listens there is no gRPC server")
        except (OSError, OverflowError) as error:
            raise FDConvError(f"No Ray cluster answers at {named}: {error}. {advice}") from None
    # As ONNX Runtime's: nothing is sent anywhere unless the variable says so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it writes to the standard error
    with needed_by("--ray", "ray"):
        import ray
        from ray.exceptions import AuthenticationError
    own = local if named == "local" else {}
    try:
        ray.init(named, log_to_driver=False, logging_level="ERROR", **own)
    except (
        AuthenticationError, ConnectionError, RuntimeError, TimeoutError, ValueError
    ) as error:  # fmt: skip
        if "AuthenticationError" in f"{error!r} {error.__cause__}":
            raise FDConvError(
                f"The Ray cluster at {named} wants a token. Set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH where it is not that of ~/.ray/auth_token."
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise FDConvError(
            f"Ray cannot be joined at {named}: {reason.rstrip('.')}. Start a cluster with `ray "
            "start --head`, or give --ray local."
        ) from None
    # Ray's own handler aborts the process with a trace of its stack, and leaves a cluster behind.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
