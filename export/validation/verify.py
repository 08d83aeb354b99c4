"""A finished bundle against the PyTorch network, on real images or made-up ones."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fdconv_deploy.export.options import TOLERANCES
from fdconv_deploy.export.source_network import Precision, Source
from fdconv_deploy.export.validation.comparison import Arrays, Rule
from fdconv_deploy.export.validation.input_sources import drawn
from fdconv_deploy.export.validation.judge import Judge, Subject
from fdconv_deploy.export.validation.verdict import Verdict
from numpy.typing import NDArray
from torch import Tensor

from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.checkpoints.loading import recorded_weights
from fdconv_deploy.config import Frozen
from fdconv_deploy.errors import ExportError
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.runtime import Session, open_session
from fdconv_deploy.runtime.manifest import CheckpointInfo

Pictures = Sequence[tuple[str, NDArray[np.uint8]]]


def verify_bundle(
    session: Session,
    network: Segmentor | Detector,
    images: Pictures = (),
    *,
    tolerance: float | None = None,
) -> list[Verdict]:
    """Judge a bundle as an export judges its graphs.

    The whole is run by the session. The layers of a float32 graph are run by ONNX Runtime on
    the CPU, in a process of their own, with native operators where the session has them.

    Args:
        session: on the bundle.
        network: what it was exported from, in eval mode.
        images: (name, HxWx3 uint8 RGB); each is brought to the bundle's size as the runtime
            does it, and both sides get the same tensor. Drawn street scenes if none are given,
            and where these images cannot tell.
        tolerance: what export allows at the bundle's precision if not given.

    Returns:
        One verdict on all images, or one per batch size on drawn scenes.

    Raises:
        ExportError: the bundle is of another network, or its answers have another form.
    """
    manifest = session.bundle.manifest
    theirs: Frozen | None = manifest.architecture or manifest.detector
    _check_same(theirs, network.architecture)
    spares = drawn(network, session.input_size)
    sources = [_source(session, name, image) for name, image in images]
    jobs = [(session.batch_sizes[0], sources, spares)]
    if not images:
        jobs = [(batch, spares[:1], spares[1:]) for batch in session.batch_sizes]
    allowed = TOLERANCES[manifest.precision] if tolerance is None else tolerance
    precision = Precision(manifest.precision, allowed)
    native = session.operators.startswith("native")
    detects = isinstance(network, Detector)
    with tempfile.TemporaryDirectory(prefix="fdconv-verify-") as folder:
        judge = Judge(
            network,
            Rule("detections", network.architecture.test.rcnn.score_thr)
            if isinstance(network, Detector)
            else Rule("classes", threshold=network.architecture.decode_head.label_threshold),
            ["images", "sizes"] if detects else ["images"],
            network.output_names if isinstance(network, Detector) else ["logits"],
            Path(folder),
            independent=True,
        )

        def run(feed: Mapping[str, NDArray]) -> Arrays:
            return session.run_batches(feed)

        return [
            judge.judge(
                Subject(
                    batch,
                    run,
                    allowed,
                    session.bundle.model_path(batch) if manifest.precision == "fp32" else None,
                    native_library(native)[0] if native else None,
                    precision.distance,
                ),
                first,
                more,
            )
            for batch, first, more in jobs
        ]


def _source(session: Session, name: str, image: NDArray[np.uint8]) -> Source:
    """An image as often as a batch needs it."""

    def rows(batch: int) -> tuple[Tensor, ...]:
        inputs = session.images.prepare(image).inputs
        one = [torch.from_numpy(value[None]) for value in inputs.values()]
        return tuple(tensor.repeat(batch, *[1] * (tensor.ndim - 1)) for tensor in one)

    return Source(name, rows)


def _check_same(theirs: Frozen | None, ours: Frozen) -> None:
    if theirs is None:
        raise ExportError(
            "the bundle is of a module, not of a network that a checkpoint could be compared "
            "with. Its own parity report is in its manifest.json."
        )
    if type(theirs) is not type(ours):
        raise ExportError(
            "one of the bundle and the checkpoint is of a detector, the other of a segmentation "
            "network. Give the checkpoint the bundle was exported from."
        )
    if theirs != ours:
        fields = type(theirs).model_fields
        other = [name for name in fields if getattr(theirs, name) != getattr(ours, name)]
        raise ExportError(
            f"the bundle was exported from another network than this checkpoint's: they differ "
            f"in {', '.join(other)}. If it was exported with --config or --set, give the same."
        )


@dataclass(frozen=True)
class Verified:
    """What `verify_files` found.

    ran, how: what ran the bundle, as a sentence and by name. weights: those of several in the
    checkpoint that were taken.
    """

    verdicts: list[Verdict]
    ran: str
    how: dict[str, str]
    digest: str
    checkpoint: CheckpointInfo | None
    weights: str | None = None


def verify_files(
    bundle: Path,
    checkpoint: Path,
    images: Sequence[Path] = (),
    *,
    config: Path | None = None,
    overrides: dict[str, Any] | None = None,
    weights: str | None = None,
    tolerance: float | None = None,
    backend: str = "auto",
) -> Verified:
    """`verify_bundle` on files: the checkpoint is read as the export read it."""
    from fdconv_deploy.cli.options import how_it_ran, ran_by

    with open_session(bundle, backend) as session:
        manifest = session.bundle.manifest
        # Which weights, and in which order, was decided at export, maybe by the user.
        order = manifest.graph.get("frequency_order")
        network = load_checkpoint(
            checkpoint,
            config=config,
            overrides=overrides,
            weights=weights or recorded_weights(manifest, checkpoint),
            frequency_order=order if order in ("torch", "stable") else "auto",
            require_fdconv=False,
        )
        pictures = [(path.name, session.read_image(path)) for path in images]
        verdicts = verify_bundle(session, network, pictures, tolerance=tolerance)
        ran, how, digest = ran_by(session), how_it_ran(session), session.bundle.digest
        return Verified(verdicts, ran, how, digest, manifest.checkpoint, network.weights)
