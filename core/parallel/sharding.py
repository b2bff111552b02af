"""Logical axes to shards: which part of each tensor a tensor-parallel rank holds, and what its products still
need.

| logical axis | cut over ranks | as the input of a product | as its output |
|---|---|---|---|
| heads, mlp | evenly, in whole units | sum over ranks | stays local |
| kv_heads | evenly; fewer heads than ranks are replicated | sum over ranks | stays local |
| vocab | evenly where it divides, else not | | gathered |
| embed, head, expert, layer, "" | never | | |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.contract.types import Param, Part

_CUT = ("heads", "kv_heads", "mlp", "vocab")


@dataclass(frozen=True)
class Shard:
    """This rank among those that share each layer."""

    rank: int = 0
    world_size: int = 1

    def range_of(self, axis: str, size: int, unit: int = 1) -> slice:
        """What this rank holds of a dimension; the whole of it for axes that are not cut."""
        units, n = size // unit, self.world_size
        if axis not in _CUT or n == 1 or (axis == "vocab" and units % n):
            return slice(0, size)
        if axis == "kv_heads" and units < n:
            first = self.rank * units // n
            return slice(first * unit, (first + 1) * unit)
        share = units // n
        return slice(self.rank * share * unit, (self.rank + 1) * share * unit)

    def ranges(self, part: Part) -> tuple[slice, ...]:
        """What this rank holds of a part, one slice per dimension, relative to the part."""
        units = part.unit or (1,) * len(part.shape)
        return tuple(
            self.range_of(axis, size, unit)
            for axis, size, unit in zip(part.axes, part.shape, units, strict=True)
        )


@dataclass(frozen=True)
class Sharded:
    """A packed weight whose product is not complete on one rank.

    Attributes:
        reduces: products with it are partial sums. gathers: products give this rank's share of the
            vocabulary.
        first: id of its first row, for look-ups.
    """

    value: Any
    reduces: bool
    gathers: bool
    first: int


def mark(param: Param, packed: Any, shard: Shard) -> Any:
    """`packed`, wrapped in Sharded where a product or look-up with it needs a collective."""
    if shard.world_size == 1:
        return packed
    part = param.parts[0]
    ranges = shard.ranges(part)
    cut = [r.stop - r.start < size for r, size in zip(ranges, part.shape, strict=True)]
    is_product = any(use in ("linear", "embed", "experts") for use in param.uses) and "bias" not in param.uses
    inputs = -2 if part.transform == "transpose" else -1
    reduces = is_product and len(part.shape) > 1 and cut[inputs]
    is_vocab = part.axes[0] == "vocab" and cut[0]
    if not reduces and not is_vocab:
        return packed
    return Sharded(packed, reduces, is_vocab, ranges[0].start if is_vocab else 0)
