"""A finished bundle against the PyTorch network, on real images or made-up ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from export.inputs import made_up_images
from export.parity import compare
from fdconv_deploy.errors import ExportError
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime import Session
from fdconv_deploy.runtime.manifest import OutputParity


@dataclass(frozen=True)
class Verified:
    """One comparison: what went in, at which batch size, and how far the answers are apart."""

    source: str
    batch: int
    parity: OutputParity


def verify_bundle(
    session: Session, network: Segmentor, images: Sequence[tuple[str, np.ndarray]] = ()
) -> list[Verified]:
    """Compare logits on each image, or on made-up inputs at every batch size.

    Args:
        session: on the bundle.
        network: the segmentor it was exported from, in eval mode.
        images: (name, HxWx3 uint8 RGB); each is brought to the bundle's size as `segment`
            does it, and both sides get the same tensor.

    Raises:
        ExportError: the bundle is of another network.
    """
    theirs, ours = session.bundle.manifest.architecture, network.architecture
    if theirs is None:
        raise ExportError(
            "the bundle is of a module, not of a segmentor that a checkpoint could be compared "
            "with. Its own parity report is in its manifest.json."
        )
    if theirs != ours:
        fields = type(theirs).model_fields
        other = [name for name in fields if getattr(theirs, name) != getattr(ours, name)]
        raise ExportError(
            f"the bundle was exported from another network than this checkpoint's: they differ "
            f"in {', '.join(other)}. If it was exported with --config or --set, give the same."
        )
    if images:
        inputs = [(name, session.prepare(image).input[None]) for name, image in images]
    else:
        made_up = partial(
            made_up_images,
            size=session.input_size,
            preprocessing=ours.preprocessing,
            channels=ours.backbone.in_channels,
        )
        inputs = [
            (f"made-up images, batch {batch}", made_up(batch).numpy())
            for batch in session.batch_sizes
        ]
    results = []
    for name, tensor in inputs:
        with torch.no_grad():
            expected = network(torch.from_numpy(tensor)).numpy()
        parity = compare("logits", session.run(tensor), expected, classes=True)
        results.append(Verified(name, len(tensor), parity))
    return results
