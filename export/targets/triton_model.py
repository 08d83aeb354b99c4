"""A bundle as a model of Triton's Python backend: images in, masks out.

`export_triton` copies this file into the model repository as ``model.py``, beside ``bundle``. The
backend runs it in a Python in which ``fdconv-deploy[cpu]`` (or ``[gpu]``) must be installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

from fdconv_deploy.errors import FDConvError, ImageError
from fdconv_deploy.runtime import open_session
from fdconv_deploy.runtime.detection import Detection
from fdconv_deploy.runtime.panoptic import PanopticSegmentation


class TritonPythonModel:
    """What the backend calls.

    Parameters of config.pbtxt: ``backend`` and ``threads``, see `open_session`.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle beside this file and run every graph once."""
        _check_numpy()
        config = json.loads(args["model_config"])
        self._outputs = [output["name"] for output in config["output"]]
        given = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        threads = given.get("threads")
        try:
            self._session = open_session(
                Path(args["model_repository"], args["model_version"], "bundle"),
                given.get("backend", "auto"),
                threads=int(threads) if threads else None,
            )
            self._session.warm_up()
        except (FDConvError, ValueError) as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from error
        pb_utils.Logger.log_info(f"{self._session.backend}: {self._session.choice}")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests; the images of all of them run together, each of its own size."""
        prepared: list[Any] = []
        answers: list[Any] = []  # of each request: where its images are in `prepared`, or an error
        for request in requests:
            start = len(prepared)
            try:
                images = pb_utils.get_input_tensor_by_name(request, "images").as_numpy()
                prepared += [self._prepare(image) for image in images]
                answers.append(slice(start, len(prepared)))
            except ImageError as error:
                answers.append(
                    pb_utils.InferenceResponse(
                        error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                    )
                )
        found = self._session.finish_all(prepared) if not self._slides else prepared
        return [
            pb_utils.InferenceResponse(self._tensors(request, found[answer]))
            if isinstance(answer, slice)
            else answer
            for request, answer in zip(requests, answers, strict=True)
        ]

    def finalize(self) -> None:
        """Let go of the network."""
        self._session.close()

    @property
    def _slides(self) -> bool:
        return self._session.images.mode == "slide"

    def _prepare(self, image: np.ndarray[Any, Any]) -> Any:
        """An image's input; in sliding mode, its answer: an image's crops run together."""
        return self._session.segment(image) if self._slides else self._session.images.prepare(image)

    def _tensors(self, request: Any, found: list[Any]) -> list[Any]:
        """A request's output tensors, of the images' own sizes."""
        wanted = set(request.requested_output_names())
        rows = [self._row(answer) for answer in found]
        return [
            pb_utils.Tensor(name, np.stack([row[name] for row in rows]))
            for name in self._outputs
            if name in wanted
        ]

    def _row(self, answer: Any) -> dict[str, np.ndarray[Any, Any]]:
        if not isinstance(answer, Detection):
            row = {"labels": answer.labels}
            return row | ({"ids": answer.ids} if isinstance(answer, PanopticSegmentation) else {})
        detector = self._session.bundle.manifest.detector
        assert detector is not None
        most, count = detector.test.rcnn.max_per_img, len(answer)
        row = {"boxes": answer.boxes, "scores": answer.scores, "labels": answer.labels}
        if answer.mask_probabilities is not None:
            row["masks"] = answer.mask_probabilities
        row = {
            name: np.concatenate([value, np.zeros((most - count, *value.shape[1:]), value.dtype)])
            for name, value in row.items()
        }
        return row | {"count": np.array([count], np.int64)}


def _check_numpy() -> None:
    """Refuse a NumPy with which the backend's stub garbles tensors without saying so.

    The stub of Triton 2.51 reads NumPy 1's structures; with NumPy 2 inputs arrive wrong and outputs
    leave empty, with status 200.
    """
    given = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = pb_utils.Tensor.from_dlpack("check", pb_utils.Tensor("check", given).to_dlpack())
    if tensor.shape() != [2, 3] or not np.array_equal(tensor.as_numpy(), given):
        raise pb_utils.TritonModelException(
            f"NumPy {np.__version__} and this Python backend do not understand each other: tensors "
            'arrive garbled. Install "numpy<2" in the Python that the backend runs.'
        )
