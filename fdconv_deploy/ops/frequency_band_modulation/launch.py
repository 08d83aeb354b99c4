"""Launch of the band combination kernel for a layer's sizes."""

from __future__ import annotations

from fdconv_deploy.ops.launch import FLOAT_TYPES, KernelLaunch

F32 = "*fp32"
TILE = 1024
TALLEST = 128


def combination_launch(
    *,
    channels: int,
    pixels: int,
    groups: int,
    weighted: int,
    terms: int,
    sigmoid: bool,
    channels_last: bool = False,
    dtype: str = "float32",
) -> KernelLaunch:
    """For ``channels`` × ``pixels`` inputs of a type (float32, float16, bfloat16).

    groups, weighted, terms: of `FoldedBands`. sigmoid: whether the kernel applies it; a
    softmax has been applied already.
    """
    # The axis that is contiguous gets the longer side of the tile.
    limit = 1 << (max(channels if channels_last else pixels, 1) - 1).bit_length()
    longer = min(TALLEST, limit)
    limit = 1 << (max(pixels if channels_last else channels, 1) - 1).bit_length()
    shorter = min(TILE // longer, limit)
    pixel_block, channel_block = (shorter, longer) if channels_last else (longer, shorter)
    feature = "*" + FLOAT_TYPES[dtype]
    arguments = (
        ("x", feature),
        ("logits", feature),
        ("mix", F32),
        ("mix_bias", F32),
        ("lows", feature),
        ("y", feature),
    )
    constants: dict[str, int | bool] = {
        "channels": channels,
        "pixels": pixels,
        "groups": groups,
        "weighted": weighted,
        "terms": terms,
        "pixel_block": pixel_block,
        "channel_block": channel_block,
        "sigmoid": sigmoid,
        "channels_last": channels_last,
    }
    blocks = -(-pixels // pixel_block), -(-channels // channel_block)
    return KernelLaunch("combination_kernel", arguments, constants, blocks, 4)
