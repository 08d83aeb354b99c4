"""A constant spectrum read back from an assembly node, by frequency."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from fdconv_deploy.export.tensorrt.plugin_nodes import constant_of, unknown
from numpy.typing import NDArray


@dataclass(frozen=True)
class StoredSpectrum:
    """What a node's constants say, in the terms of `FoldedSpectrum.by_frequency`."""

    rows: int
    columns: int
    frequencies: NDArray[np.int64]
    values: NDArray[np.complex64]
    groups: NDArray[np.int64]

    def by_frequency(
        self,
    ) -> tuple[NDArray[np.int64], NDArray[np.complex64], NDArray[np.int64]]:
        """Row frequencies ``(S,)``, values and groups ``(P, S, C)``."""
        return self.frequencies, self.values, self.groups


def _digits(start: NDArray[np.int64], weight: int, factors: list[int]) -> NDArray[np.int64]:
    """The frequencies of ``(start, digit, digit, …)``, the first digit counting ``weight``."""
    order = start
    for factor in factors:
        order = (order[:, None] + weight * np.arange(factor)[None, :]).reshape(-1)
        weight *= factor
    return order


def _column_order(stages: list[NDArray], columns: int, name: str) -> NDArray[np.int64]:
    # Of the last factor first.
    factors = [stage.shape[-1] // 2 for stage in reversed(stages)]
    if int(np.prod(factors)) != columns:
        raise unknown(name)
    return _digits(np.zeros(1, np.int64), 1, factors)


def _row_frequencies(
    stages: list[NDArray], outer: NDArray, rows: int, name: str
) -> tuple[NDArray[np.int64], int]:
    """The frequency of each slot ``(classes, slots)``, and how many classes are of first slots."""
    first = len(outer)
    higher = [stage.shape[-1] // 2 for stage in reversed(stages)]
    if first * int(np.prod(higher, initial=1)) != rows:
        raise unknown(name)
    # Position 1 turns by the residue: (cos, -sin) of 2π · residue / first.
    position = outer[1 % first].reshape(-1, 2).astype(np.float64)
    turns = np.arctan2(-position[:, 1], position[:, 0]) * first / (2 * np.pi)
    residues = np.rint(turns).astype(np.int64) % first
    frequency = residues[:, None] + _digits(np.zeros(1, np.int64), first, higher)[None, :]
    return frequency, first // 2 + 1


def _mirror(array: NDArray) -> NDArray:
    return np.roll(np.flip(array, 2), 1, 2)


def stored_spectrum(node: gs.Node, named: dict[str, gs.Tensor]) -> StoredSpectrum:
    """Of an assembly node, whose inputs go by `AssemblyForm.inputs`' names.

    Raises:
        ExportError: its constants do not fit together.
    """
    _, rows, columns = node.attrs["matrix_shape"]
    values = constant_of(named["spectrum"])
    values = values.reshape(-1, *values.shape[-3:])  # (P, F, 2, fm·slots)
    planes = len(values)

    def stages(kind: str) -> list[NDArray]:
        names = [n for n in named if n.startswith(f"{kind}_stage")]
        return [constant_of(named[n]) for n in names]

    order = _column_order(stages("column"), columns, node.name)
    outer = constant_of(named["row_outer"])
    frequency, firsts = _row_frequencies(stages("row"), outer, rows, node.name)
    slots = frequency.size
    last = values.shape[3] // slots
    if values.shape[1] * last != columns or values.shape[3] % slots:
        raise unknown(node.name)
    patterns, blocks = constant_of(named["patterns"]), constant_of(named["blocks"])
    groups = patterns[blocks].reshape(planes, columns, slots).astype(np.int64)
    parts = values.reshape(planes, values.shape[1], 2, last, slots)
    complex_ = (parts[:, :, 0] + 1j * parts[:, :, 1]).reshape(planes, columns, slots)

    # (P, f digits, slot) -> (P, slot, f)
    natural, owner = np.empty_like(complex_), np.empty_like(groups)
    natural[:, order], owner[:, order] = complex_, groups
    natural, owner = natural.transpose(0, 2, 1), owner.transpose(0, 2, 1)
    flat = frequency.reshape(-1)
    first_slot = np.repeat(np.arange(len(frequency)) < firsts, frequency.shape[1])
    # Of a class of its own mirror images the upper half is empty, as most second slots are.
    residue = np.repeat(frequency[:, 0], frequency.shape[1])
    own = (residue == 0) | (2 * residue == len(outer))
    used = np.where(
        first_slot, ~(own & (2 * flat > rows)), np.any(natural != 0, axis=(0, 2))
    )  # fmt: skip
    flat, natural, owner = flat[used], natural[:, used], owner[:, used]
    weight = np.where((flat == 0) | (2 * flat == rows), 1.0, 2.0)
    natural = natural / weight[:, None]
    image = 2 * flat > rows
    natural[:, image] = np.conj(_mirror(natural[:, image]))
    owner[:, image] = _mirror(owner[:, image])
    flat = np.where(image, rows - flat, flat)
    by_row = np.argsort(flat, kind="stable")
    return StoredSpectrum(
        rows, columns, flat[by_row], natural[:, by_row].astype(np.complex64), owner[:, by_row]
    )
