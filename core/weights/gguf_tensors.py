"""Tensors of a GGUF file in the form that Hugging Face gives them: decoded, in its order of rows and axes.

Most are one stored tensor. An expert is one slice of a stored one; a few are put together from two.
Quantized values are decoded to float32 by the gguf package, only the rows and blocks wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from core.weights.checkpoint import Index
from core.weights.gguf_header import QUANTIZED, TensorInfo

Bytes = npt.NDArray[np.uint8]
"""The whole file, mapped."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class View(Protocol):
    """A tensor as Hugging Face has it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost dimension first."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """What `read` gives."""

    @property
    def type(self) -> str:
        """GGUF's name of the stored type."""

    def read(self, data: Bytes, ranges: Index) -> npt.NDArray[Any]:
        """The part within `ranges`, one per dimension, none empty."""


@dataclass(frozen=True)
class Stored:
    """One stored tensor, or slice `lead` of its first dimension.

    Attributes:
        paired: rows per head where rows lie in the order of interleaved rotary pairs; 0 = as they are.
        shift: added to every value after reading, in float64.
    """

    info: TensorInfo
    lead: int | None = None
    paired: int = 0
    shift: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.info.shape if self.lead is None else self.info.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `View`."""
        return np.dtype(np.float64) if self.shift else _DTYPES.get(self.info.type, np.dtype(np.float32))

    @property
    def type(self) -> str:
        """See `View`."""
        return self.info.type

    def read(self, data: Bytes, ranges: Index) -> npt.NDArray[Any]:
        """See `View`."""
        out = self._values(data, ranges)
        return out.astype(np.float64) + self.shift if self.shift else out

    def blocks(self, data: Bytes, ranges: Index) -> Bytes:
        """Undecoded rows, uint8 [..., row bytes]; the last range holds whole blocks."""
        size, last = self.info.block_size, ranges[-1]
        found = self._block_array(data, (*ranges[:-1], slice(last.start // size, last.stop // size)))
        return found.reshape(*found.shape[:-2], found.shape[-2] * found.shape[-1])

    def _values(self, data: Bytes, ranges: Index) -> npt.NDArray[Any]:
        if self.info.type not in QUANTIZED:
            plain: npt.NDArray[Any] = self._array(data, self.shape, _DTYPES[self.info.type])
            return np.asarray(plain[self._places(ranges)])
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        # Whole blocks around the wanted columns are decoded, and no others.
        size, last = self.info.block_size, ranges[-1]
        first = last.start // size
        packed = self._block_array(data, (*ranges[:-1], slice(first, -(-last.stop // size))))
        flat = np.ascontiguousarray(packed).reshape(*packed.shape[:-2], -1)
        decoded: npt.NDArray[Any] = dequantize(flat, GGMLQuantizationType[self.info.type])
        return decoded[..., last.start - first * size : last.stop - first * size]

    def _block_array(self, data: Bytes, ranges: Index) -> Bytes:
        """Blocks [..., blocks, block bytes]; the last range counts blocks."""
        num_blocks = self.shape[-1] // self.info.block_size
        whole = self._array(data, (*self.shape[:-1], num_blocks, self.info.block_bytes), np.dtype(np.uint8))
        return np.asarray(whole[self._places(ranges)])

    def _array(self, data: Bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        size = prod(shape) * dtype.itemsize
        return np.ndarray(shape, dtype, buffer=data, offset=self.info.offset + (self.lead or 0) * size)

    def _places(self, ranges: Index) -> tuple[Any, ...]:
        if not self.paired:
            return ranges
        return (_paired_rows(np.arange(ranges[0].start, ranges[0].stop), self.paired), *ranges[1:])


@dataclass(frozen=True)
class Joined:
    """`first` and `second`, of equal shapes but for axis `axis`, in turns along it.

    Each turn takes `counts[0]` of the first and `counts[1]` of the second. With `swap` the last two axes
    are exchanged afterwards; `axis` is meant before.
    """

    first: View
    second: View
    axis: int
    counts: tuple[int, int]
    swap: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        shape = list(self.first.shape)
        shape[self.axis] += self.second.shape[self.axis]
        return _swapped(tuple(shape)) if self.swap else tuple(shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `View`."""
        return np.promote_types(self.first.dtype, self.second.dtype)

    @property
    def type(self) -> str:
        """See `View`."""
        return self.first.type

    def read(self, data: Bytes, ranges: Index) -> npt.NDArray[Any]:
        """See `View`. Whole turns are read, then cut."""
        ranges = _swapped(ranges) if self.swap else ranges
        turn, wanted = sum(self.counts), ranges[self.axis]
        first, last = wanted.start // turn, -(-wanted.stop // turn)
        parts = []
        for view, count in zip((self.first, self.second), self.counts, strict=True):
            inner = list(ranges)
            inner[self.axis] = slice(first * count, last * count)
            part = view.read(data, tuple(inner)).astype(self.dtype)
            parts.append(
                part.reshape(*part.shape[: self.axis], last - first, count, *part.shape[self.axis + 1 :])
            )
        both = np.concatenate(parts, self.axis + 1)
        both = both.reshape(*both.shape[: self.axis], (last - first) * turn, *both.shape[self.axis + 2 :])
        cut = [slice(None)] * both.ndim
        cut[self.axis] = slice(wanted.start - first * turn, wanted.stop - first * turn)
        out = both[tuple(cut)]
        return out.swapaxes(-1, -2) if self.swap else out


@dataclass(frozen=True)
class Reshaped:
    """A stored tensor [N, A, B] as [N, B, A] where `swap`, and then as [N * A, B] (or [N * B, A]) where
    `flat`.
    """

    inner: View
    swap: bool = False
    flat: bool = False

    @property
    def _middle(self) -> tuple[int, ...]:
        return _swapped(self.inner.shape) if self.swap else self.inner.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        n, a, b = self._middle
        return (n * a, b) if self.flat else (n, a, b)

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `View`."""
        return self.inner.dtype

    @property
    def type(self) -> str:
        """See `View`."""
        return self.inner.type

    def read(self, data: Bytes, ranges: Index) -> npt.NDArray[Any]:
        """See `View`. Whole heads are read, then cut."""
        if not self.flat:
            return self._read_middle(data, ranges)
        rows, size = ranges[0], self._middle[1]
        first, last = rows.start // size, -(-rows.stop // size)
        heads = self._read_middle(data, (slice(first, last), slice(0, size), ranges[1]))
        return heads.reshape(-1, heads.shape[-1])[rows.start - first * size : rows.stop - first * size]

    def _read_middle(self, data: Bytes, ranges: Index) -> npt.NDArray[Any]:
        if not self.swap:
            return self.inner.read(data, ranges)
        return self.inner.read(data, _swapped(ranges)).swapaxes(-1, -2)


def _swapped(x: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*x[:-2], x[-1], x[-2])


def _paired_rows(wanted: npt.NDArray[np.intp], head_size: int) -> npt.NDArray[np.intp]:
    """Stored rows of q or k that hold `wanted` rows of Hugging Face's order.

    A head's first half holds the first element of each rotary pair, its second half the second; the file
    has pairs side by side.
    """
    head, row = np.divmod(wanted, head_size)
    second, pair = np.divmod(row, head_size // 2)
    return np.asarray(head * head_size + 2 * pair + second, np.intp)
