"""How far two bundles of one network drift apart, layer by layer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from fdconv_deploy.errors import BundleError
from fdconv_deploy.profiling.divergence import Answers, Divergence, Point, points_of, save_exposed
from fdconv_deploy.profiling.layer_names import fdconv_layers
from fdconv_deploy.runtime.bundle import Bundle


def compare_bundles(
    first: Bundle, second: Bundle, batch: int, feeds: dict[str, NDArray[np.generic]]
) -> list[Divergence]:
    """``second`` beside ``first`` at every layer that both have, on the same inputs.

    In ONNX Runtime's CPU provider. What both graphs answer at a layer is kept on the disk
    meanwhile: some gigabytes for a large network.

    :param batch: a batch size of both.
    :param feeds: inputs of that batch size, by name.
    :raises BundleError: they take other inputs, or have no layer in common.
    """
    mine, others = first.manifest.inputs[batch], second.manifest.inputs[batch]
    if mine != others:
        raise BundleError(
            f"{second.path.name} takes {_inputs(second, batch)}, {first.path.name} "
            f"{_inputs(first, batch)}: layers can be compared on equal inputs only."
        )
    with tempfile.TemporaryDirectory(prefix="fdconv-divergence-") as name:
        folder = Path(name)
        points = [_exposed(bundle, batch, folder / f"{n}.onnx")
                  for n, bundle in enumerate((first, second))]  # fmt: skip
        common = [name for name in points[0] if name in points[1]]
        if not common:
            raise BundleError(
                f"{first.path.name} and {second.path.name} have no layer's name in common: they "
                "are of different networks."
            )
        exact, found = (
            [Point(name, of[name]) for name in common] for of in points
        )  # the same layers, whatever either graph calls their tensors
        answers = Answers(folder / "0.onnx", exact, feeds, folder)
        return answers.divergences(folder / "1.onnx", feeds, found)


def _exposed(bundle: Bundle, batch: int, path: Path) -> dict[str, str]:
    """Write the bundle's graph with every point among its outputs; tensors by layer."""
    model = onnx.load(str(bundle.model_path(batch)))
    points = points_of(model, fdconv_layers(model))
    save_exposed(model, [point.tensor for point in points], path)
    return {point.name: point.tensor for point in points}


def _inputs(bundle: Bundle, batch: int) -> str:
    specs = bundle.manifest.inputs[batch]
    return ", ".join(f"{spec.name} {spec.shape} {spec.dtype}" for spec in specs)
