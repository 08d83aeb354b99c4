"""Attention statistics that hold for more than the frames of training.

The attention of an FDConv layer normalises one pooled value per image and channel and squares
it. By the statistics of streets alone a blank or letterboxed frame lies tens of standard
deviations away, in the next layer hundreds, and the network amplifies rounding to the size of
its logits (docs/stability.md). Measured again over frames of many kinds and sizes, the
statistics are wide enough. No weight changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from examples.streets.scenes import draw_scene
from examples.training.layers import dynamic_layers
from examples.training.odd_frames import developed, flat, letterboxed, texture
from examples.training.scenes import TRAINING_SEEDS, normalise
from fdconv_deploy.config import Preprocessing

# From the least that is served to the largest that a few seconds allow.
SIZES = ((64, 64), (96, 128), (128, 256), (160, 224), (192, 256), (256, 256), (512, 512))
# Streets of each size, and as many odd frames.
FRAMES = 8
# Half of the odd frames are flat: what cameras and tests send most.
KINDS = (flat, texture, flat, letterboxed, flat, developed)
SWEEPS = 3


def frames(
    preprocessing: Preprocessing, sizes: Sequence[tuple[int, int]] = SIZES, seed: int = 0
) -> list[Tensor]:
    """Normalised batches ``(2 · FRAMES, 3, H, W)`` float32, one per size.

    Half of each are drawn training streets, half are odd, of `KINDS` in turn.
    """
    rng = np.random.default_rng(seed)
    seeds = iter(TRAINING_SEEDS)
    batches = []
    for size in sizes:
        images = [draw_scene(next(seeds), *size)[0].astype(np.float32) for _ in range(FRAMES)]
        odd = [KINDS[i % len(KINDS)](rng, image) for i, image in enumerate(images)]
        batch = np.stack([*images, *odd]).clip(0, 255).transpose(0, 3, 1, 2)
        batches.append(normalise(preprocessing, torch.from_numpy(batch.copy())))
    return batches


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Sequence[Tensor]) -> None:
    """Set the running statistics of every attention's BatchNorm anew.

    First by each batch's own statistics, layer after layer, so that no frame is far away; then
    in evaluation mode, `SWEEPS` times: the mean and the whole variance, between batches too,
    of what the network as it now is gives each attention.

    Args:
        network: in evaluation mode, in which it is left.
        batches: normalised ``(B, 3, H, W)`` float32, of several sizes.
    """
    norms = [layer.KSM_Global.bn for layer in dynamic_layers(network).values()]
    for norm in norms:
        norm.train()
        norm.momentum = None  # the plain average of all batches
        norm.reset_running_stats()
    for batch in batches:
        network(batch)
    for norm in norms:
        norm.eval()
        norm.momentum = 0.1
    for _ in range(SWEEPS):
        for norm, values in _normalised_values(network, norms, batches).items():
            pooled = torch.cat(values).double()
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(pooled.mean(0))
            norm.running_var.copy_(pooled.var(0))


def _normalised_values(
    network: nn.Module, norms: Sequence[nn.BatchNorm2d], batches: Sequence[Tensor]
) -> dict[nn.BatchNorm2d, list[Tensor]]:
    """What each BatchNorm is given, ``(B, channels)`` per batch."""
    seen: dict[nn.BatchNorm2d, list[Tensor]] = {norm: [] for norm in norms}

    def keep(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        seen[norm].append(inputs[0].flatten(1))

    hooks = [norm.register_forward_pre_hook(keep) for norm in norms]
    for batch in batches:
        network(batch)
    for hook in hooks:
        hook.remove()
    return seen
