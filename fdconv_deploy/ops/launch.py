"""What a GPU kernel is launched with, in plain numbers: no Triton, no torch.

One description serves PyTorch's launches, the compilation to PTX and TensorRT's plugins.
Kernels take pointers only; everything else is a constant of the specialisation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

FLOAT_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
THREADS_PER_WARP = 32
# Of the compiler. No loop here feeds on loads that could be issued ahead; products and sums may
# be fused.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel, specialised: its arguments, constants and grid.

    kernel: name of the function; arguments: name and Triton type of each pointer, in order
    (`outputs` of them last); constants: by name; blocks: the grid's second and third axes
    (its first is the batch); warps: per program.
    """

    kernel: str
    arguments: tuple[tuple[str, str], ...]
    outputs: int
    constants: Mapping[str, int | bool]
    blocks: tuple[int, int]
    warps: int

    def grid(self, batch: int) -> tuple[int, int, int]:
        """Programs along each axis."""
        return batch, *self.blocks

    @property
    def threads(self) -> int:
        """Per program."""
        return self.warps * THREADS_PER_WARP

    def typed(self, **types: str) -> KernelLaunch:
        """The same with other argument types, e.g. ``weight="float16"``."""
        unknown = types.keys() - dict(self.arguments).keys()
        assert not unknown, f"{self.kernel} has no arguments {unknown}"
        arguments = tuple(
            (name, "*" + FLOAT_TYPES[types[name]] if name in types else kind)
            for name, kind in self.arguments
        )
        return KernelLaunch(
            self.kernel, arguments, self.outputs, self.constants, self.blocks, self.warps
        )


def warps_for(elements: int, most: int) -> int:
    """Warps that give each thread one of ``elements`` (a power of two), within 1 to ``most``."""
    return max(1, min(most, elements // THREADS_PER_WARP))


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
