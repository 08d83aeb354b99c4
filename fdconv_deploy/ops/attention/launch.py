"""Launches of the pooling, finishing and gates kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdconv_deploy.ops.launch import FLOAT_TYPES, KernelLaunch, power_of_two

if TYPE_CHECKING:  # it imports torch, which compiling kernels does without
    from fdconv_deploy.folding.modulation import FoldedLocal, FoldedModulation

F32 = "*fp32"
TILE_PIXELS, TILE_CHANNELS = 32, 64
# Some four programs to each multiprocessor of a large GPU: a pass over a feature map.
PROGRAMS = 512
# Where pooled, about one, of as many threads together: their parts are added up afterwards, by
# every program that needs the hidden layer.
POOLING_PROGRAMS, MOST_PIXELS = 128, 128
# Of parts, numbers that each of those adds up.
PARTS = 8192


@dataclass(frozen=True)
class Pooling:
    """How an input's average is divided among programs. units: of the hidden layer."""

    channels: int
    pixels: int
    units: int

    @property
    def channel_block(self) -> int:
        """Channels per program."""
        return min(TILE_CHANNELS, power_of_two(self.channels))

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return -(-self.channels // self.channel_block)

    @property
    def pixel_block(self) -> int:
        """Pixels of a tile."""
        block = TILE_PIXELS
        while (
            self.units
            and block < MOST_PIXELS
            and -(-self.pixels // block) * self.blocks > POOLING_PROGRAMS
        ):
            block *= 2
        return block

    @property
    def steps(self) -> int:
        """Tiles of pixels per program."""
        tiles = -(-self.pixels // self.pixel_block)
        most = min(POOLING_PROGRAMS, PARTS // self.units) if self.units else PROGRAMS
        return -(-tiles // max(1, most // self.blocks))

    @property
    def splits(self) -> int:
        """Programs along the pixels."""
        return -(-self.pixels // (self.pixel_block * self.steps))

    @property
    def parts(self) -> int:
        """Vectors whose sum is the hidden layer of an image."""
        return self.splits * self.blocks

    @property
    def warps(self) -> int:
        """Warps per program."""
        return max(4, self.pixel_block * self.channel_block // 512)

    @property
    def shape(self) -> tuple[int, int]:
        """Of an image's parts: hidden layer by blocks, then averages, for each split."""
        return self.splits, self.blocks * self.units + self.channels

    def constants(self, channels_last: bool) -> dict[str, int | bool | float]:
        """Of both kernels that pool."""
        block = power_of_two(max(1, min(self.units, 1024 // self.channel_block)))
        return {
            "channels": self.channels,
            "pixels": self.pixels,
            "units": self.units,
            "unit_block": block,
            "pixel_block": self.pixel_block,
            "channel_block": self.channel_block,
            "steps": self.steps,
            "channels_last": channels_last,
            "dependent": False,
        }


def pool_launch(pooling: Pooling, channels_last: bool, dtype: str = "float32") -> KernelLaunch:
    """Of pooling alone, for inputs of a type."""
    arguments = ("x", "*" + FLOAT_TYPES[dtype]), ("hidden_weight", F32), ("partial", F32)
    blocks = pooling.blocks, pooling.splits
    return KernelLaunch("pool_kernel", arguments, pooling.constants(channels_last), blocks,
                        pooling.warps)  # fmt: skip


def finish_launch(
    pooling: Pooling,
    channels_last: bool,
    dtype: str = "float32",
    *,
    biased: bool,
    added: bool,
    relu: bool,
    pooled: bool,
) -> KernelLaunch:
    """Of a convolution's end; ``pooling`` has no units where it is not pooled."""
    feature = "*" + FLOAT_TYPES[dtype]
    arguments = (
        ("x", feature),
        ("bias", F32),
        ("shortcut", feature),
        ("hidden_weight", F32),
        ("partial", F32),
        ("y", feature),
    )
    constants = pooling.constants(channels_last) | {
        "biased": biased, "added": added, "relu": relu, "pooled": pooled,
    }  # fmt: skip
    blocks = pooling.blocks, pooling.splits
    return KernelLaunch("finish_kernel", arguments, constants, blocks, pooling.warps)


@dataclass(frozen=True)
class GateSizes:
    """Of a layer's attentions: what the gates kernel is specialised to, but for the pooling."""

    count: int
    normed: bool
    centred: bool
    epsilon: float
    squared: bool
    sigmoid: bool
    averaged: bool
    average_epsilon: float

    @classmethod
    def of(cls, modulation: FoldedModulation, local: FoldedLocal | None) -> GateSizes:
        """The sizes of a folded layer."""
        norm = modulation.norm
        return cls(
            len(modulation.heads),
            norm is not None,
            norm is not None and norm.bias is not None,
            0.0 if norm is None else norm.epsilon,
            modulation.squared,
            not modulation.softmax,
            local is not None,
            0.0 if local is None else local.epsilon,
        )


def gates_launch(pooling: Pooling, sizes: GateSizes) -> KernelLaunch:
    """The launch of the gates kernel, on what `pool_launch` or `finish_launch` pooled."""
    names = (
        "partial hidden_bias norm_weight norm_bias heads head_bias average_weight average_bias "
        "average gates"
    )
    arguments = tuple((name, F32) for name in names.split())
    unit_pad, channel_pad = power_of_two(pooling.units), power_of_two(pooling.channels)
    head_block = max(1, min(64, 8192 // unit_pad, power_of_two(sizes.count)))
    constants: dict[str, int | bool | float] = {
        "splits": pooling.splits,
        "blocks": pooling.blocks,
        "channels": pooling.channels,
        "channel_pad": channel_pad,
        "split_block": max(1, min(power_of_two(pooling.splits), 4096 // channel_pad)),
        "units": pooling.units,
        "unit_pad": unit_pad,
        "part_block": max(1, min(power_of_two(pooling.parts), 2048 // unit_pad)),
        "count": sizes.count,
        "head_block": head_block,
        "normed": sizes.normed,
        "centred": sizes.centred,
        "epsilon": sizes.epsilon,
        "squared": sizes.squared,
        "sigmoid": sizes.sigmoid,
        "averaged": sizes.averaged,
        "average_epsilon": sizes.average_epsilon,
        "dependent": False,
    }
    blocks = -(-sizes.count // head_block) + sizes.averaged, 1
    return KernelLaunch("gates_kernel", arguments, constants, blocks, 4)
