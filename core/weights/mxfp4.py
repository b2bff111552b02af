"""MXFP4 tensors (OCP Microscaling Formats, version 1.0, 2023): blocks of 32 four-bit values with one scale.

A value is e2m1: a sign, two bits of exponent, one of mantissa; a scale is e8m0: a power of two, with 127
for 1 and 255 for no number. Two values share a byte, the first in its low half. A tensor `X` [E, in, out] is
stored as `X_blocks`, uint8 [E, out, in / 32, 16], and `X_scales`, uint8 [E, out, in / 32].
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from core.contract.errors import WeightError
from core.weights.checkpoint import Checkpoint, Index, StoredTensor, check_index

BLOCK = 32
BYTES = BLOCK // 2
BLOCKS, SCALES = "_blocks", "_scales"
_DTYPE: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], np.float32)
LARGEST_SCALE = 252
"""Six times a larger power of two is beyond bfloat16."""
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], 1)
"""Both values of a byte, float32 [256, 2]."""


def dequantize(blocks: npt.NDArray[Any], scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """blocks uint8 [..., G, 16] and scales uint8 [..., G] -> bfloat16 [..., G * 32], exact.

    Products past bfloat16's range are infinite, a scale of 255 gives NaN.
    """
    powers = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    values = _PAIRS[blocks].reshape(*scales.shape, BLOCK)
    with np.errstate(over="ignore"):
        values *= powers[..., None]
    exact: npt.NDArray[Any] = values.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK).astype(_DTYPE)
    return exact


class Mxfp4Checkpoint:
    """A checkpoint whose pairs `X_blocks`, `X_scales` appear as the tensor `X` they stand for, in bfloat16.

    Raises:
        WeightError: blocks without scales, or the reverse; shapes or dtypes that do not belong together.
    """

    def __init__(self, inner: Checkpoint) -> None:
        self._inner = inner
        names = inner.names()
        bases = {n.removesuffix(BLOCKS) for n in names if n.endswith(BLOCKS)}
        bases |= {n.removesuffix(SCALES) for n in names if n.endswith(SCALES)}
        self._shapes = {base: _shape(inner, base) for base in sorted(bases)}
        halves = {base + end for base in bases for end in (BLOCKS, SCALES)}
        self._names = tuple(n for n in names if n not in halves) + tuple(self._shapes)

    @property
    def path(self) -> Path:
        """See `Checkpoint`."""
        return self._inner.path

    def names(self) -> Collection[str]:
        """See `Checkpoint`."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._shapes[name] if name in self._shapes else self._inner.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `Checkpoint`."""
        return _DTYPE if name in self._shapes else self._inner.dtype(name)

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """See `Checkpoint`. Whole blocks are read, of the asked experts and outputs alone."""
        if name not in self._shapes:
            return self._inner.read(name, index)
        experts, inputs, outputs = check_index(self.path, name, self._shapes[name], index)
        groups = slice(inputs.start // BLOCK, -(-inputs.stop // BLOCK))
        blocks = self._inner.read(name + BLOCKS, (experts, outputs, groups, slice(0, BYTES)))
        scales = self._inner.read(name + SCALES, (experts, outputs, groups))
        skipped = groups.start * BLOCK
        found = np.empty((*scales.shape[:2], inputs.stop - inputs.start), _DTYPE)
        # One expert at a time: the float32 in between is large.
        for e in range(len(scales)):
            found[e] = dequantize(blocks[e], scales[e])[:, inputs.start - skipped : inputs.stop - skipped]
        return found.swapaxes(1, 2)

    def stored(self, names: Collection[str]) -> Iterator[StoredTensor]:
        """See `Checkpoint`. Of a pair its scales: no block can be wrong by itself."""
        for name in names:
            if name in self._shapes:
                found = next(self._inner.stored((name + SCALES,)))
                yield replace(found, kind="e8m0", limit=LARGEST_SCALE)
            else:
                yield from self._inner.stored((name,))

    def source(self, name: str) -> Path:
        """See `Checkpoint`."""
        return self._inner.source(name + BLOCKS if name in self._shapes else name)

    def config(self) -> dict[str, Any]:
        """See `Checkpoint`."""
        return self._inner.config()

    def close(self) -> None:
        """See `Checkpoint`."""
        self._inner.close()


def _shape(inner: Checkpoint, base: str) -> tuple[int, ...]:
    """The shape [E, in, out] that a pair stands for."""
    names = inner.names()
    for name in (base + BLOCKS, base + SCALES):
        if name not in names:
            raise WeightError(
                f"{inner.path} has no tensor {name!r}, which the other half of this MXFP4 tensor needs; "
                "download the model again"
            )
        if inner.dtype(name) != np.uint8:
            raise WeightError(f"{inner.path}: tensor {name!r} is {inner.dtype(name)}, but MXFP4 wants uint8")
    blocks, scales = inner.shape(base + BLOCKS), inner.shape(base + SCALES)
    if len(blocks) != 4 or blocks[3] != BYTES or blocks[:3] != scales:
        raise WeightError(
            f"{inner.path}: tensor {base + BLOCKS!r} has shape {blocks} and {base + SCALES!r} {scales}, "
            f"but MXFP4 wants [experts, outputs, groups, {BYTES}] and the same without the last"
        )
    return (blocks[0], blocks[2] * BLOCK, blocks[1])
