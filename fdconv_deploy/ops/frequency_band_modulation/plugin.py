"""TensorRT plugin of the band combination kernel."""

from __future__ import annotations

from fdconv_deploy.ops.frequency_band_modulation.launch import combination_launch
from fdconv_deploy.ops.frequency_band_modulation.plugin_function import COMBINATION, INPUTS
from fdconv_deploy.ops.launch import KernelLaunch
from fdconv_deploy.ops.tensorrt_plugins import Plugin, Sizes

# What a node's ``sizes`` lists.
SIZES = "channels height width groups weighted terms batch".split()


def combination_plugin(name: str) -> Plugin:
    """Input, logits and low-passes -> modulated input, all of one type."""
    kind = "float16" if name.endswith("_Half") else "float32"

    def given(sizes: Sizes) -> dict[str, int]:
        return dict(zip(SIZES, (int(n) for n in sizes), strict=True))

    def shape(sizes: Sizes) -> tuple[int, ...]:
        return tuple(given(sizes)[n] for n in ("batch", "channels", "height", "width"))

    def launch(sizes: Sizes) -> KernelLaunch:
        of = given(sizes)
        return combination_launch(
            channels=of["channels"],
            pixels=of["height"] * of["width"],
            groups=of["groups"],
            weighted=of["weighted"],
            terms=of["terms"],
            sigmoid="_Activated" not in name,
            dtype=kind,
        )

    return Plugin(tuple(INPUTS), (kind, kind, "float32", "float32", kind, kind), shape, launch)


PLUGINS = {COMBINATION: combination_plugin}
