"""The frequency order of a checkpoint, which few have written in them: what tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fdconv_deploy.checkpoints.frequency_order.choose import saved_order
from fdconv_deploy.checkpoints.frequency_order.from_images import ImageEvidence, order_of_statistics
from fdconv_deploy.checkpoints.frequency_order.from_weights import (
    CANDIDATES,
    NamedOrder,
    WeightEvidence,
    order_of_weights,
)
from fdconv_deploy.checkpoints.infer_layers import Shapes, backbone_prefix, part
from fdconv_deploy.config import BackboneConfig, Preprocessing
from fdconv_deploy.errors import ImageError
from fdconv_deploy.nn import ResNet
from fdconv_deploy.nn.spectrum import FrequencyOrder
from fdconv_deploy.runtime.preprocessing import check_image, normalise, published_size, resize

# More than this change the verdict no more, and each takes seconds of a large network.
MOST_IMAGES = 32


class OrderReport(BaseModel):
    """Which order the network was trained with, or None: it cannot be told.

    ``saved`` says what indices the file holds, which then decide; empty if it holds none.
    ``images`` is None where none were given.
    """

    model_config = ConfigDict(frozen=True)

    order: NamedOrder | None
    weights: WeightEvidence
    saved: str = ""
    images: ImageEvidence | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """In a sentence each."""
        found = (self.saved, self.weights.reason, self.images.reason if self.images else "")
        return tuple(reason for reason in found if reason)


def tell_order(
    state: Shapes,
    backbone: BackboneConfig | None = None,
    preprocessing: Preprocessing | None = None,
    images: Sequence[NDArray[Any]] = (),
    progress: Callable[[str], None] | None = None,
) -> OrderReport:
    """Tell the order by the weights, and by images if there are some.

    Where both tell and contradict each other, neither is believed.

    Args:
        state: a checkpoint's tensors.
        backbone: of the network; images are run through it alone.
        preprocessing: of the network's images; the published one if not given.
        images: as `check_image` takes them, of the kind the network was trained on; the first
            32 are used.
        progress: told of each step.

    Raises:
        ImageError: there are images, but too few.
        CheckpointError: the file saves indices that are none.
    """
    weights = order_of_weights(state)
    saved = saved_order(state)
    if saved is not None:
        return OrderReport(order=saved.name, weights=weights, saved=saved.reason)
    if not len(images) or backbone is None:
        return OrderReport(order=weights.order, weights=weights)
    how = preprocessing or Preprocessing()
    if backbone.in_channels != how.channels:
        raise ImageError(
            f"This network takes {backbone.in_channels} channels, so RGB images do not tell its "
            "order. Leave --images out."
        )
    networks = {name: _backbone(state, backbone, name) for name in CANDIDATES}
    inputs = _inputs(images, how, progress or (lambda _: None))
    statistics = order_of_statistics(networks, inputs)
    told = {found for found in (weights.order, statistics.order) if found is not None}
    return OrderReport(
        order=told.pop() if len(told) == 1 else None, weights=weights, images=statistics
    )


def _backbone(state: Shapes, config: BackboneConfig, order: FrequencyOrder) -> ResNet:
    with torch.device("meta"):
        network = ResNet(config, order)
    given = part(state, backbone_prefix(state))
    own: Mapping[str, Tensor] = {
        key: given[key].to(value.dtype) if key in given else torch.zeros(value.shape)
        for key, value in network.state_dict().items()
        if key in given or key.endswith(".num_batches_tracked")
    }
    network.load_state_dict(own, strict=True, assign=True)
    return network.eval()


def _inputs(
    images: Sequence[NDArray[Any]],
    preprocessing: Preprocessing,
    progress: Callable[[str], None],
) -> Iterator[Tensor]:
    count = min(len(images), MOST_IMAGES)
    for index in range(count):
        progress(f"image {index + 1} of {count}, in the orders {', '.join(CANDIDATES)}")
        image = check_image(images[index], preprocessing)
        size = published_size(image.shape[0], image.shape[1], preprocessing)
        yield torch.from_numpy(normalise(resize(image, *size), preprocessing))[None]
