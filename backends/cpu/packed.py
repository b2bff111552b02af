"""Weights that stay in GGML's blocks of 32: 4.5 (q4_0), 5 (q4_1) or 8.5 (q8_0) bits each.

torch has no product of float32 with such blocks that keeps their values, so a product decodes some rows at
a time, into a buffer that the processor's cache holds, and multiplies them in float32. Values are those of
the decoded matrix, bit for bit: a product of an integer of 8 bits and a half-precision scale is exact in
float32, so only q4_1's addition rounds, as it does in the decoded matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

BLOCK = 32
TILE = 1 << 19
"""Elements decoded at a time. Fewer cost more calls, more leave the cache."""

_HALVES = {"q4_0": 1, "q4_1": 2, "q8_0": 1}
"""Half-precision numbers at the beginning of a block: the scale, and q4_1's smallest value."""
SCHEMES = tuple(_HALVES)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A matrix [..., O, I] in blocks, taken apart: G = I / 32 blocks a row.

    Attributes:
        quants: int8 [..., O, G, 32] of q8_0; else uint8 [..., O, G, 16], element i of a block in byte i's low
            half, element 16 + i in its high half.
        scale: float16 [..., O, G]. minimum: the same, of q4_1; else None.
    """

    scheme: str
    quants: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None

    @staticmethod
    def of(blocks: npt.NDArray[np.uint8], scheme: str) -> PackedWeight:
        """From rows of blocks as a file has them, uint8 [..., O, row bytes]. The result owns its memory."""
        halves, data = _HALVES[scheme], 32 if scheme == "q8_0" else 16
        rows = np.ascontiguousarray(blocks).reshape(*blocks.shape[:-1], -1, 2 * halves + data)
        numbers = np.ascontiguousarray(rows[..., : 2 * halves]).view(np.float16)  # [..., O, G, halves]
        quants = torch.from_numpy(np.array(rows[..., 2 * halves :]))
        parts = [torch.from_numpy(np.array(numbers[..., i])) for i in range(halves)]
        return PackedWeight(
            scheme=scheme,
            quants=quants.view(torch.int8) if scheme == "q8_0" else quants,
            scale=parts[0],
            minimum=parts[1] if halves > 1 else None,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: [..., O, I]."""
        return (*self.scale.shape[:-1], self.scale.shape[-1] * BLOCK)

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.quants.nbytes + self.scale.nbytes + (0 if self.minimum is None else self.minimum.nbytes)

    def __getitem__(self, index: int | slice) -> PackedWeight:
        """An expert, or rows; shares memory."""
        minimum = None if self.minimum is None else self.minimum[index]
        return PackedWeight(self.scheme, self.quants[index], self.scale[index], minimum)

    def index_select(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows by number, int [n], decoded: float32 [n, I]."""
        minimum = None if self.minimum is None else self.minimum.index_select(0, rows)
        quants, scale = self.quants.index_select(0, rows), self.scale.index_select(0, rows)
        return PackedWeight(self.scheme, quants, scale, minimum).values()

    def values(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The matrix [O, I] decoded to float32; into `out`, of at least as many elements, where given."""
        rows, width = self.shape
        flat = torch.empty(rows * width) if out is None else out.flatten()[: rows * width]
        scale = self.scale.float()[..., None]  # [O, G, 1]
        if self.scheme == "q8_0":
            torch.mul(self.quants, scale, out=flat.view(rows, -1, BLOCK))
            return flat.view(rows, width)
        halves = flat.view(rows, -1, 2, BLOCK // 2)
        torch.mul(self.quants & 15, scale, out=halves[:, :, 0])
        torch.mul(self.quants >> 4, scale, out=halves[:, :, 1])
        # q4_0's values are scale * (q - 8); 8 scales are exact too, and so is the difference.
        shift = scale * -8 if self.minimum is None else self.minimum.float()[..., None]
        halves.add_(shift[..., None, :])
        return flat.view(rows, width)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] times the matrix [O, I], transposed: float32 [..., O]."""
        rows, width = self.shape
        wide = x.reshape(-1, width).float()
        tile = max(1, TILE // width)
        if tile >= rows:
            return F.linear(wide, self.values()).view(*x.shape[:-1], rows)
        out, buffer = wide.new_empty(wide.shape[0], rows), torch.empty(tile * width)
        for first in range(0, rows, tile):
            out[:, first : first + tile] = F.linear(wide, self[first : first + tile].values(buffer))
        return out.view(*x.shape[:-1], rows)

    def blocks(self) -> npt.NDArray[np.uint8]:
        """What `of` was given: uint8 [..., O, row bytes]."""
        numbers = [self.scale] if self.minimum is None else [self.scale, self.minimum]
        parts = [x[..., None].view(torch.uint8) for x in numbers]
        joined = torch.cat([*parts, self.quants.view(torch.uint8)], -1)
        found: npt.NDArray[np.uint8] = joined.flatten(-2).numpy()
        return found


Weight = torch.Tensor | PackedWeight


def product(x: torch.Tensor, w: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., I] @ w [O, I].T + bias, in x's dtype."""
    if isinstance(w, PackedWeight):
        y = w.product(x)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))
