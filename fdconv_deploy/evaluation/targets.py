"""Bundles and checkpoints, opened as the sides of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.evaluation.compare import Labels, bundle_side
from fdconv_deploy.evaluation.compare_detectors import bundle_side as detector_side
from fdconv_deploy.evaluation.interleaving import Side
from fdconv_deploy.runtime import Detection, Session, open_session
from fdconv_deploy.runtime.bundle_checks import bundle_root
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.segmentation import Mode


@contextmanager
def open_sides(
    paths: Sequence[Path],
    *,
    mode: Mode | None = None,
    fit: Fit | None = None,
    backend: str | None = None,
    threads: int | None = None,
    config: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
) -> Iterator[list[Side[Labels]]]:
    """The sides, in order, while the context lasts.

    Checkpoints run in PyTorch, which is not imported where there are none. Beside a bundle
    they see images at the first bundle's size, fitted as it fits them, so that only the way
    of computing differs; alone, they see them as the published pipeline resizes them.

    :param paths: bundles' folders and checkpoint files.
    :param mode: "whole" or "slide"; the one each network was tested in when not given.
    :param fit: of bundles, and of checkpoints beside them; the first bundle's own when not
        given.
    :param backend: of bundles; "auto" when not given.
    :param threads: CPU threads of every side.
    :param config: the checkpoints' config.
    :param overrides: what the checkpoints do not tell.
    :param weights: which weights of each checkpoint, see `read_checkpoint`.
    :raises FDConvError: a path is missing, cannot be opened, or an option is of no use here.
    """
    paths = [bundle_root(path) for path in paths]
    with _sessions(paths, backend, threads, fit) as sessions:
        for path, session in sessions.items():
            if session.detects:
                raise FDConvError(
                    f"The bundle {path} is of a detector, which is scored on objects annotated as "
                    "COCO's: give --annotations and --images, or a --data folder of COCO's layout."
                )
        first = next(iter(sessions.values()), None)
        sides = []
        for path in paths:
            if path in sessions:
                sides.append(bundle_side(sessions[path], mode=mode, fit=fit))
            else:
                sides.append(
                    _checkpoint(
                        path,
                        first,
                        mode,
                        fit,
                        threads,
                        config,
                        overrides,
                        weights or _recorded(path, first),
                    )
                )
        yield sides


@contextmanager
def open_detection_sides(
    paths: Sequence[Path],
    *,
    backend: str | None = None,
    threads: int | None = None,
    config: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
) -> Iterator[list[Side[Detection]]]:
    """As :func:`open_sides`, of detectors.

    Beside a bundle, checkpoints see images at the first bundle's size; alone, as the published
    pipeline resizes and pads them.
    """
    paths = [bundle_root(path) for path in paths]
    with _sessions(paths, backend, threads) as sessions:
        for path, session in sessions.items():
            if not session.detects:
                raise FDConvError(
                    f"The bundle {path} is of a {session.bundle.manifest.kind}, not of a detector, "
                    "which alone is scored on annotated objects. Give --images and --masks."
                )
        first = next(iter(sessions.values()), None)
        size = first.input_size if first else None
        sides = []
        for path in paths:
            if path in sessions:
                sides.append(detector_side(sessions[path]))
            else:
                chosen = weights or _recorded(path, first)
                sides.append(_detector_checkpoint(path, size, threads, config, overrides, chosen))
        yield sides


@contextmanager
def _sessions(
    paths: Sequence[Path], backend: str | None, threads: int | None, fit: Fit | None = None
) -> Iterator[dict[Path, Session]]:
    """Those of the paths that are bundles, opened."""
    for path in paths:
        if not path.exists():
            raise FDConvError(f"{path} does not exist. Give a bundle's folder or a checkpoint.")
    bundles = [path for path in paths if path.is_dir()]
    if not bundles and (fit or backend):
        raise FDConvError(
            "A fit and a backend are a bundle's, and there is none here: checkpoints run in "
            "PyTorch, with images as the published pipeline resizes them."
        )
    with ExitStack() as stack:
        yield {
            path: stack.enter_context(open_session(path, backend or "auto", threads=threads))
            for path in bundles
        }


def _recorded(path: Path, beside: Session | None) -> str | None:
    """The weights that the bundle beside a checkpoint was exported from, where it is that file."""
    from fdconv_deploy.checkpoints.loading import recorded_weights

    return None if beside is None else recorded_weights(beside.bundle.manifest, path)


def _detector_checkpoint(
    path: Path,
    size: tuple[int, int] | None,
    threads: int | None,
    config: Path | None,
    overrides: Mapping[str, Any] | None,
    weights: str | None,
) -> Side[Detection]:
    import torch

    from fdconv_deploy.checkpoints import load_detector
    from fdconv_deploy.evaluation.torch_detector import torch_side

    if threads is not None:
        torch.set_num_threads(threads)
    network = load_detector(
        path, config=config, overrides=overrides, weights=weights, require_fdconv=False
    )
    return torch_side(network, path, size=size)


def _checkpoint(
    path: Path,
    beside: Session | None,
    mode: Mode | None,
    fit: Fit | None,
    threads: int | None,
    config: Path | None,
    overrides: Mapping[str, Any] | None,
    weights: str | None,
) -> Side[Labels]:
    import torch

    from fdconv_deploy.checkpoints import load_segmentor
    from fdconv_deploy.evaluation.torch_segmentor import torch_side

    if threads is not None:
        torch.set_num_threads(threads)
    network = load_segmentor(
        path, config=config, overrides=overrides, weights=weights, require_fdconv=False
    )
    if beside is None:
        return torch_side(network, path, mode=mode)
    fit = fit or beside.bundle.manifest.fit
    return torch_side(network, path, size=beside.input_size, mode=mode, fit=fit)
