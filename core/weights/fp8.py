"""Eight-bit floats with scales beside them, read as the products they stand for.

`X` in float8 goes with `X_scale_inv` (DeepSeek-V3: one float32 per block, 128 x 128 where the config does not
say) or with `X_scale` (one per tensor, per row or per block). In spite of its name the former is multiplied
too.
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

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
SCALES = ("_scale_inv", "_scale")
# Scales of activations and of KV entries, which nothing here quantizes.
_UNUSED = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".kv_scale", ".output_scale")
_BLOCK = (128, 128)
_WIDE = {"float32": np.float32, "float16": np.float16}
_PIECE = 1 << 18


class Fp8Checkpoint:
    """A checkpoint whose float8 tensors appear multiplied by their scales, in the dtype that its config names
    (bfloat16 where it names none). A float8 tensor without scales stays as it is.

    Raises:
        WeightError: scales that do not belong to their tensor's shape, or are no floats.
    """

    def __init__(self, inner: Checkpoint) -> None:
        self._inner = inner
        config = inner.config()
        quantization = config.get("quantization_config") or {}
        self._block = _block_of(inner.path, quantization.get("weight_block_size"))
        named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
        self._dtype: np.dtype[Any] = np.dtype(_WIDE.get(named, ml_dtypes.bfloat16))
        names = set(inner.names())
        self._scales = {
            name: name + scale
            for name in names
            for scale in SCALES
            if name + scale in names and inner.dtype(name) in FLOAT8
        }
        self._units = {name: self._unit(name) for name in self._scales}
        hidden = set(self._scales.values())
        self._names = tuple(n for n in inner.names() if n not in hidden and not n.endswith(_UNUSED))

    @property
    def path(self) -> Path:
        """See `Checkpoint`."""
        return self._inner.path

    def names(self) -> Collection[str]:
        """See `Checkpoint`."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._inner.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """See `Checkpoint`."""
        return self._dtype if name in self._scales else self._inner.dtype(name)

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """See `Checkpoint`. Scales are read of the blocks that the part lies in."""
        if name not in self._scales:
            return self._inner.read(name, index)
        ranges = check_index(self.path, name, self.shape(name), index)
        units, scale_name = self._units[name], self._scales[name]
        # A scale of fewer dimensions holds for the whole tensor, or for each row.
        cuts = tuple(slice(r.start // u, -(-r.stop // u)) for r, u in zip(ranges, units, strict=True))
        scales = self._inner.read(scale_name, cuts[: len(self._inner.shape(scale_name))])
        values = self._inner.read(name, ranges)
        scales = scales.astype(np.float32).reshape((*scales.shape, *(1,) * (values.ndim - scales.ndim)))
        at = [np.arange(r.start, r.stop) // u - r.start // u for r, u in zip(ranges, units, strict=True)]
        found = np.empty(values.shape, self._dtype)
        if not values.ndim or not values.size:
            found[...] = values.astype(np.float32) * scales
            return found
        # In pieces: the float32 in between is large.
        rows = max(1, _PIECE * len(values) // values.size)
        for first in range(0, len(values), rows):
            part = slice(first, first + rows)
            piece = scales[np.ix_(at[0][part], *at[1:])]
            found[part] = values[part].astype(np.float32) * piece
        return found

    def stored(self, names: Collection[str]) -> Iterator[StoredTensor]:
        """See `Checkpoint`. Values and scales apart; a scale may not make the largest value infinite."""
        for name in names:
            yield from self._inner.stored((name,))
            if name in self._scales:
                largest = float(ml_dtypes.finfo(self._dtype).max) / float(
                    ml_dtypes.finfo(self._inner.dtype(name)).max
                )
                yield replace(next(self._inner.stored((self._scales[name],))), limit=largest)

    def source(self, name: str) -> Path:
        """See `Checkpoint`."""
        return self._inner.source(name)

    def config(self) -> dict[str, Any]:
        """See `Checkpoint`."""
        return self._inner.config()

    def close(self) -> None:
        """See `Checkpoint`."""
        self._inner.close()

    def _unit(self, name: str) -> tuple[int, ...]:
        """Elements that share a scale, per dimension of the tensor."""
        scale, shape = self._scales[name], self._inner.shape(name)
        found = self._inner.shape(scale)
        if self._inner.dtype(scale) not in (np.float32, np.float16, ml_dtypes.bfloat16):
            raise WeightError(
                f"{self._inner.source(scale)}: tensor {scale!r} is {self._inner.dtype(scale).name}, but "
                "scales are wanted in float32, float16 or bfloat16; take another checkpoint"
            )
        blocks = (*(1,) * (len(shape) - 2), *self._block)[-len(shape) :] if shape else ()
        padded = (*found, *(1,) * (len(shape) - len(found)))
        units = []
        for size, block, count in zip(shape, blocks, padded[: len(shape)], strict=True):
            if count == -(-size // block):
                units.append(block)
            elif count in (1, size):
                units.append(size if count == 1 else 1)
        if len(found) > len(shape) or len(units) != len(shape):
            raise WeightError(
                f"{self._inner.source(scale)}: tensor {scale!r} has shape {found}, but {name!r} of shape "
                f"{shape} wants one scale, one for each row, or one for each block of {self._block}; check "
                "weight_block_size in config.json"
            )
        return tuple(max(1, u) for u in units)


def _block_of(path: Path, found: Any) -> tuple[int, int]:
    if found is None:
        return _BLOCK
    if isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
        return found[0], found[1]
    raise WeightError(
        f"{path / 'config.json'}: weight_block_size is {found!r:.200}, but two positive whole numbers are "
        "wanted; check that the config is that of this model"
    )
