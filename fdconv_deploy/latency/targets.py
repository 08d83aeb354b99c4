"""What is timed: paths and services × backends × batch sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.runtime import BACKENDS, Bundle
from fdconv_deploy.runtime.bundle_checks import bundle_root

Kind = Literal["bundle", "checkpoint", "service", "call"]
TORCH_BACKENDS = {
    "eager": "the published network",
    "compile": "the published network through torch.compile",
    "folded": "the folded network",
    "fused": "the folded network in this package's GPU kernels",
}
ALL, CPU = "all", "onnxruntime-cpu"
DEFAULTS: dict[Kind, str] = {"bundle": "auto", "checkpoint": "eager"}


class UnavailableError(FDConvError):
    """A side cannot be had here; left out where nobody asked for it by name."""


@dataclass(frozen=True)
class Side:
    """One thing to time.

    Attributes:
        source: a bundle's or checkpoint's path, a service's address, or for scripts
            "module:function", which makes a `work.Work` of the side.
        backend: of ``BACKENDS``, "auto", of ``TORCH_BACKENDS``, or "http".
        named: whether this backend was asked for, rather than every one there is.
        native: whether a bundle's ``fdconv`` operators run in C on a CPU; where they are built
            when None.
        size: (height, width) of a checkpoint's input; a bundle knows its own.
        whole: time a request from decoded pixels to labels, not the network alone.
        image: file that is run; drawn scenes when not given.
        model: of a service; its first when not given.
        config, overrides, weights: what a checkpoint does not tell; of a call, whatever it takes.
    """

    kind: Kind
    source: str
    backend: str
    batch: int
    precision: str
    threads: int
    named: bool = True
    native: bool | None = None
    size: tuple[int, int] | None = None
    whole: bool = False
    image: str | None = None
    model: str | None = None
    config: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None

    @property
    def name(self) -> str:
        """For people: source, backend, precision and batch size."""
        short = self.source if self.kind == "service" else Path(self.source).name
        how = {None: "", True: ", native", False: ", portable"}[self.native]
        return f"{short}, {self.backend}{how}, {self.precision}, batch {self.batch}"

    def as_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Side:
        """See `as_json`."""
        given = json.loads(text)
        size = given.pop("size")
        return cls(**given, size=None if size is None else tuple(size))


@dataclass(frozen=True)
class Skipped:
    """Something that was not timed, and why, as a sentence."""

    what: str
    why: str


@dataclass(frozen=True)
class Plan:
    """The sides in order, and what is left out from the start."""

    sides: tuple[Side, ...]
    skipped: tuple[Skipped, ...]


def plan(
    paths: Sequence[Path],
    *,
    urls: Sequence[str] = (),
    backends: Sequence[str] = (),
    batches: Sequence[int] = (),
    native: Sequence[bool] = (),
    threads: int,
    size: tuple[int, int] | None = None,
    whole: bool = False,
    image: Path | None = None,
    model: str | None = None,
    config: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
) -> Plan:
    """Every combination that means something.

    :param paths: bundles' folders and checkpoint files.
    :param urls: of running services.
    :param backends: names, or "all"; the best one for bundles and the published network for
        checkpoints when not given.
    :param batches: batch sizes; those of the bundles when not given.
    :param native: run bundles with operators in C, without, or both, on a CPU.
    :param threads: CPU threads of every side.
    :param size: (height, width) of checkpoints' inputs; the first bundle's when not given.
    :param whole: see `Side`; batches of one image only.
    :raises FDConvError: nothing can be timed, or an option fits nothing here.
    """
    _check_backends(backends)
    paths = [bundle_root(path) for path in paths]
    for path in paths:
        if not path.exists():
            raise FDConvError(f"{path} does not exist. Give a bundle's folder or a checkpoint.")
    bundles = {path: Bundle.open(path, verify=False) for path in paths if path.is_dir()}
    known = sorted({size for bundle in bundles.values() for size in bundle.batch_sizes}) or [1]
    wanted = [1] if whole and not batches else list(dict.fromkeys(batches)) or known
    if whole and wanted != [1]:
        raise FDConvError(
            "A whole request is one image's: --end-to-end goes without --batch, or with --batch 1."
        )
    base = Side(
        "bundle", "", "", 1, "fp32", threads,
        whole=whole, image=str(image) if image else None, model=model,
        config=str(config) if config else None, overrides=dict(overrides or {}),
        weights=weights,
    )  # fmt: skip
    size = size or next((s for b in bundles.values() if (s := _input_size(b))), None)
    sides: list[Side] = []
    skipped: list[Skipped] = []
    for path in paths:
        bundle = bundles.get(path)
        made = replace(base, kind="checkpoint" if bundle is None else "bundle", source=str(path))
        if bundle is None:
            made = replace(made, size=size)
        else:
            made = replace(made, precision=bundle.manifest.precision)
        for batch in wanted:
            if bundle is not None and batch not in bundle.batch_sizes:
                has = ", ".join(map(str, bundle.batch_sizes))
                skipped.append(Skipped(f"{path.name}, batch {batch}", f"It has graphs of {has}."))
                continue
            for side in _in_backends(replace(made, batch=batch), backends):
                sides += _in_operators(side, native)
    sides += [replace(base, kind="service", source=url, backend="http") for url in urls]
    _check_used(sides, skipped, backends, wanted)
    if native and all(side.native is None for side in sides):
        raise FDConvError("Native operators run bundles in 'onnxruntime-cpu': there is none here.")
    return Plan(tuple(sides), tuple(skipped))


def _in_backends(side: Side, backends: Sequence[str]) -> Iterator[Side]:
    of_kind = list(TORCH_BACKENDS) if side.kind == "checkpoint" else list(BACKENDS)
    if not backends:
        yield replace(side, backend=DEFAULTS[side.kind])
    for name in dict.fromkeys(backends):
        if name == ALL:
            yield from (replace(side, backend=n, named=False) for n in of_kind if n not in backends)
        elif name in of_kind or (name == "auto" and side.kind == "bundle"):
            yield replace(side, backend=name)


def _in_operators(side: Side, native: Sequence[bool]) -> list[Side]:
    if not native or side.kind != "bundle" or side.backend not in ("auto", CPU):
        return [side]
    return [replace(side, backend=CPU, native=one) for one in native]


def _check_backends(backends: Sequence[str]) -> None:
    known = (ALL, "auto", *BACKENDS, *TORCH_BACKENDS)
    for name in backends:
        if name not in known:
            raise FDConvError(f"There is no backend {name!r}; there are {', '.join(known)}.")


def _check_used(
    sides: Sequence[Side], skipped: Sequence[Skipped], backends: Sequence[str], batches: list[int]
) -> None:
    if not sides and skipped:
        raise FDConvError(f"Nothing can be timed. {skipped[0].what}: {skipped[0].why}")
    for batch in batches:
        if all(side.batch != batch for side in sides if side.kind != "service") and skipped:
            raise FDConvError(
                f"No bundle has a graph of batch {batch}. {skipped[0].why} Export again with "
                f"--batch {batch}, or ask for another."
            )
    for name in backends:
        if name != ALL and all(side.backend != name for side in sides):
            kind = "checkpoints" if name in TORCH_BACKENDS else "bundles (fdconv export)"
            raise FDConvError(f"Backend {name!r} runs {kind}, and none was given.")
    if not sides:
        raise FDConvError("Give a bundle's folder, a checkpoint, or --url of a running service.")


def _input_size(bundle: Bundle) -> tuple[int, int] | None:
    size = bundle.manifest.input
    return None if size is None else (size.height, size.width)
