"""TensorRT plugin of the band combination kernel."""

# TensorRT reads annotations as types: no `from __future__ import annotations` here.

from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.ops.frequency_band_modulation.kernel_launch import combination_launch
from fdconv_deploy.ops.frequency_band_modulation.plugin_function import COMBINATION
from fdconv_deploy.ops.launch import KernelLaunch
from fdconv_deploy.ops.plugins import NAMESPACE, combination, implement

Sizes = npt.NDArray[np.int32]
# What a node's ``sizes`` lists.
SIZES = "channels pixels groups weighted terms batch".split()


def launch_of(name: str, sizes: Sizes) -> KernelLaunch:
    """The kernel of a form for a node's ``sizes``."""
    given = dict(zip(SIZES, (int(n) for n in sizes), strict=True))
    del given["batch"]
    return combination_launch(
        **given,
        sigmoid="_Activated" not in name,
        dtype="float16" if name.endswith("_Half") else "float32",
    )


def register_combination(trt: Any, trtp: Any, name: str) -> None:
    """Input, logits and low-passes -> modulated input, all of one type."""
    identity = f"{NAMESPACE}::{name}"
    desc = trtp.TensorDesc
    kind = "float16" if name.endswith("_Half") else "float32"

    @trtp.register(identity)
    def describe(
        x: desc, logits: desc, mix: desc, mix_bias: desc, lows: desc, sizes: Sizes
    ) -> desc:
        return x.like()

    @trtp.autotune(identity)
    def types(
        x: desc,
        logits: desc,
        mix: desc,
        mix_bias: desc,
        lows: desc,
        sizes: Sizes,
        outputs: tuple[desc],
    ) -> list[trtp.AutoTuneCombination]:
        return combination(trtp, kind, kind, "float32", "float32", kind, kind)

    @trtp.aot_impl(identity)
    def kernel(
        x: desc,
        logits: desc,
        mix: desc,
        mix_bias: desc,
        lows: desc,
        sizes: Sizes,
        outputs: tuple[desc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        return implement(trtp, launch_of(name, sizes), int(sizes[-1]))


PLUGINS = {COMBINATION: register_combination}
