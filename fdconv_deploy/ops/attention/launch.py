"""Launches of the pooling, finishing and gates kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fdconv_deploy.ops.launch import KernelLaunch, constants_of, make_launch, power_of_two

if TYPE_CHECKING:  # it imports torch, which compiling kernels does without
    from fdconv_deploy.folding.modulation import FoldedLocal, FoldedModulation

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
    def stride(self) -> int:
        """Of a split's parts: the hidden layer by blocks, then the average."""
        return self.blocks * self.units + self.channels

    @property
    def unit_block(self) -> int:
        """Units of the hidden layer that a program's part is multiplied for at a time."""
        return power_of_two(max(1, min(self.units, 1024 // self.channel_block)))

    def launch(
        self, kernel: str, pointers: str, channels_last: bool, dtype: str, **more: bool
    ) -> KernelLaunch:
        """Of either kernel that pools, for features of a type."""
        names = "channels pixels units unit_block pixel_block channel_block blocks stride steps"
        constants = constants_of(self, names) | {"channels_last": channels_last} | more
        blocks = self.blocks, self.splits
        types = dict.fromkeys(("x", "shortcut", "y"), dtype)
        return make_launch(kernel, pointers, types, constants, blocks, self.warps)


@lru_cache(maxsize=2048)
def pool_launch(pooling: Pooling, channels_last: bool, dtype: str = "float32") -> KernelLaunch:
    """Of pooling alone, for inputs of a type."""
    return pooling.launch("pool_kernel", "x hidden_weight partial", channels_last, dtype)


@lru_cache(maxsize=2048)
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
    return pooling.launch(
        "finish_kernel", "x bias shortcut hidden_weight partial y", channels_last, dtype,
        biased=biased, added=added, relu=relu, pooled=pooled,
    )  # fmt: skip


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


# What kernels make attentions of.
ATTENTION = "partial hidden_bias norm_weight norm_bias heads head_bias average_weight average_bias"


def gate_constants(pooling: Pooling, sizes: GateSizes, averages: int, parts: int) -> dict[str, Any]:
    """Of a kernel that makes attentions, and adds up so many numbers of the pooled at a time."""
    unit_pad, channel_pad = power_of_two(pooling.units), power_of_two(pooling.channels)
    return {
        **constants_of(pooling, "splits blocks channels units stride"),
        **constants_of(sizes, "count normed centred epsilon squared averaged average_epsilon"),
        "channel_pad": channel_pad,
        "split_block": max(1, min(power_of_two(pooling.splits), averages // channel_pad)),
        "unit_pad": unit_pad,
        "part_block": max(1, min(power_of_two(pooling.parts), parts // unit_pad)),
    }


@lru_cache(maxsize=2048)
def gates_launch(pooling: Pooling, sizes: GateSizes) -> KernelLaunch:
    """The launch of the gates kernel, on what `pool_launch` or `finish_launch` pooled."""
    constants = gate_constants(pooling, sizes, averages=4096, parts=2048)
    head_block = max(1, min(64, 8192 // constants["unit_pad"], power_of_two(sizes.count)))
    constants |= {"head_block": head_block, "sigmoid": sizes.sigmoid}
    blocks = -(-sizes.count // head_block) + sizes.averaged, 1
    return make_launch("gates_kernel", f"{ATTENTION} average gates", {}, constants, blocks, 4)
