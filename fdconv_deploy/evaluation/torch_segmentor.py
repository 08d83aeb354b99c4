"""A PyTorch network's side of an evaluation, with the same preprocessing as a bundle's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fdconv_deploy.errors import FDConvError
from fdconv_deploy.evaluation.compare import Labels
from fdconv_deploy.evaluation.interleaving import Answer, Side
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.preprocessing import check_image, published_size
from fdconv_deploy.runtime.segmentation import Mode, SegmentationPipeline, class_names


def torch_side(
    network: Segmentor,
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    mode: Mode | None = None,
    fit: Fit = "stretch",
) -> Side[Labels]:
    """The published network's side.

    :param network: in eval mode.
    :param path: where it comes from, for the report.
    :param size: (height, width) that images are brought to, a bundle's; when not given, each
        image is resized as the published pipeline does it, and ``slide`` uses the crop that
        the network was tested with.
    :param mode: "whole" or "slide"; the one the network was tested in when not given.
    :param fit: how images of other proportions are brought to ``size``.
    :raises FDConvError: ``slide`` is asked for, and neither ``size`` nor a crop is known.
    """
    architecture = network.architecture
    mode = mode or architecture.test.mode
    crop = size or architecture.test.crop_size
    if mode == "slide" and crop is None:
        raise FDConvError(
            "The network records no crop to slide. Give the config it was tested with: --config."
        )

    def run(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return network(torch.from_numpy(inputs)).numpy()

    def whole(image: NDArray[Any]) -> Answer[Labels]:
        height, width = check_image(image, architecture.preprocessing).shape[:2]
        target = size or published_size(height, width, architecture.preprocessing)
        pipeline = SegmentationPipeline(architecture, target, fit)
        prepared = pipeline.prepare(image)
        start = time.perf_counter()
        logits = run(prepared.inputs["images"][None])[0]
        spent = time.perf_counter() - start
        return Answer(pipeline.finish(prepared, {"logits": logits}).labels, spent)

    def sliding(image: NDArray[Any]) -> Answer[Labels]:
        assert crop is not None
        found = SegmentationPipeline(architecture, crop, fit).slide(image, run, batch=1)
        return Answer(found.labels, found.timings["inference"])

    fixed = crop if mode == "slide" else size
    details = {
        "kind": "checkpoint",
        "backend": "pytorch",
        "precision": "fp32",
        "mode": mode,
        "size": None if fixed is None else list(fixed),
    }
    answer = sliding if mode == "slide" else whole
    names = class_names(architecture)
    return Side(str(path), answer, names, details, architecture.preprocessing)
