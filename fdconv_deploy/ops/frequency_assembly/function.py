"""``fdconv::FrequencyAssembly`` as a function of standard ONNX operators.

The body gathers the attention of each bin by blocks of neighbouring bins: groups are rings around
frequency zero, so that bins side by side mostly share one, and the patterns of groups in a short
block of bins repeat over and over. Runtimes gather blocks several times faster than single numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto

from fdconv_deploy.ops.function_body import FunctionBody

# In how many stages the published 3×3 layer's columns and rows are inverted.
USUAL_STAGES = (3, 3)
# Attributes of a node that other readers than its body need; the folder's ``__init__`` lists what
# they mean. GEOMETRY is that of a convolution by kernel rows.
ATTRIBUTES = (
    "layer out_channels in_channels kernel_size by_rows taps row_frequencies column_frequencies "
    "heads filter_at spatial_at channel_at"
).split()
GEOMETRY = "strides pads dilations input_size".split()
# Lengths of blocks of bins.
LENGTHS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class AssemblyForm:
    """Which parts a layer's assembly has.

    stages: products that invert the columns, and the rows. planes: more than one spectrum is
    summed. spatial_kernel: the kernel is higher than 1, so that its rows and the input channels
    must change places. by_rows: they do not, the answer is a matrix per kernel row instead.
    """

    stages: tuple[int, int]
    planes: bool
    local: bool
    column_scale: bool
    row_scale: bool
    spatial_kernel: bool
    by_rows: bool = False

    @property
    def name(self) -> str:
        """Name of the function; the published 3×3 layer's is plain ``FrequencyAssembly``."""
        departures = [
            ("Pointwise", not self.spatial_kernel and not self.by_rows),
            ("ByRows", self.by_rows),
            ("Stages{}x{}".format(*self.stages), self.stages != USUAL_STAGES),
            ("Planes", self.planes),
            ("NoLocal", not self.local),
            ("NoColumnScale", not self.column_scale),
            ("NoRowScale", not self.row_scale),
        ]
        suffixes = [name for name, departs in departures if departs]
        return "".join(["FrequencyAssembly", *(f"_{s}" for s in suffixes)])

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        names = ["attention", "spectrum", "patterns", "blocks"]
        names += [f"column_stage{i}" for i in range(self.stages[0])]
        names += [f"row_stage{i}" for i in range(self.stages[1] - 1)] + ["row_outer"]
        if self.local:
            names += ["local_input", "local_window", "local_weight"]
        if self.column_scale:
            names += ["column_scale"]
        if self.row_scale:
            names += ["row_scale"]
        return names


def assembly_function(form: AssemblyForm) -> FunctionProto:
    """The ONNX function body for one form."""
    f = FunctionBody(form.name, form.inputs, ATTRIBUTES + GEOMETRY * form.by_rows)
    # Attention by bin in two steps: first by the few patterns of groups that blocks of
    # neighbouring bins have, then whole blocks, which are copied several numbers at a time.
    index = f("Cast", "patterns", to=6)  # int32
    weights = f("Gather", f("Gather", "attention", index, axis=1), "blocks", axis=1)
    x = f("Mul", f.reshape(weights, "weights_shape"), "spectrum")
    if form.planes:
        x = f("ReduceSum", x, f.constant([1]), keepdims=0)

    for stage in range(form.stages[0]):
        x = f("MatMul", f"column_stage{stage}", f.reshape(x, f"column_stage{stage}_shape"))
    x = f("Transpose", f.reshape(x, "columns_shape"), perm=[0, 2, 1])
    for stage in range(form.stages[1] - 1):
        x = f("MatMul", f"row_stage{stage}", f.reshape(x, f"row_stage{stage}_shape"))
    x = f("MatMul", "row_outer", f.reshape(x, "row_outer_shape"))
    kernel = f.reshape(x, "matrix_shape")

    if form.local:
        # The average, spread to the kernel matrix's columns with zeros between, and every
        # window of it: one small matrix that the local weights multiply.
        spread = f("Unsqueeze", "local_input", f.constant([2]))
        spread = f("Pad", spread, f.attribute("local_spread"))
        spread = f.reshape(spread, "local_shape")
        spread = f("Pad", spread, f.attribute("local_pads"))
        windows = f("Conv", spread, "local_window")
        logits = f("MatMul", "local_weight", windows)
        kernel = f("Mul", kernel, f("Sigmoid", logits))
    if form.column_scale or form.row_scale:
        kernel = f.reshape(kernel, "scaled_shape")
    if form.column_scale:
        kernel = f("Mul", kernel, "column_scale")
    if form.row_scale:
        kernel = f("Mul", kernel, "row_scale")
    if form.spatial_kernel and not form.by_rows:
        kernel = f("Transpose", f.reshape(kernel, "interleaved_shape"), perm=[0, 1, 3, 2, 4])
    kernel = f.reshape(kernel, "kernel_shape")
    return f.finish(kernel, "One kernel per image from kernel attention and constant spectra.")


@dataclass(frozen=True)
class GroupBlocks:
    """``groups.reshape(-1) == patterns[blocks].reshape(-1)``.

    patterns: ``(N, L)``, of the type of the group map; blocks: ``(bins / L,)`` int32.
    """

    patterns: NDArray[Any]
    blocks: NDArray[np.int32]


def _cost(patterns: int, length: int, bins: int) -> float:
    """Nanoseconds of gathering: measured in ONNX Runtime, benchmarks/primitives.py."""
    return 2.9 * patterns * length + (2.8 + 0.11 * length) * bins / length


def group_blocks(groups: NDArray[Any]) -> GroupBlocks:
    """Blocks of the length that is fastest to gather, of an integer group map of any shape."""
    return _group_blocks(groups.tobytes(), groups.dtype.str)


# Layers of one shape share a group map, and so do the graphs of several batch sizes.
@lru_cache(maxsize=32)
def _group_blocks(content: bytes, dtype: str) -> GroupBlocks:
    flat = np.frombuffer(content, dtype)
    best: tuple[float, GroupBlocks] | None = None
    for length in LENGTHS:
        if flat.size % length:
            continue
        rows = flat.reshape(-1, length)
        # One bytes-like key per block: sorting those is much faster than sorting rows.
        keys = rows.view(np.dtype((np.void, rows.itemsize * length))).reshape(-1)
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        found = GroupBlocks(rows[first], inverse.reshape(-1).astype(np.int32))
        cost = _cost(len(first), length, flat.size)
        if best is None or cost < best[0]:
            best = cost, found
    assert best is not None
    return best[1]
