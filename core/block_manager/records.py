"""Records that go into and come out of the block manager."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from core.block_manager.prefix_cache import Node


@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """Layers that share one block table, or one set of state slots.

    Attributes:
        kind: "paged", "window" or "state".
        layers: indices of its layers.
        block_size: tokens per block; for "state" the spacing of checkpoints in tokens.
        num_blocks: blocks or state slots of the pool, the pad block included.
        window: tokens that a query sees, itself included ("window" only).
        bytes_per_block: for reports; 0 = not told.
    """

    kind: Literal["paged", "window", "state"]
    layers: tuple[int, ...]
    block_size: int
    num_blocks: int
    window: int | None = None
    bytes_per_block: int = 0

    def first_visible(self, position: int) -> int:
        """Column of the first block that a query at `position` sees; 0 unless the group has a window."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold all that a query after `num_tokens` tokens can see."""
        blocks = -(-num_tokens // self.block_size)
        if self.window is None:
            return blocks
        return min(blocks, -(-(self.window - 1) // self.block_size) + 1)


@dataclass(frozen=True)
class BlockCopy:
    """Copy a whole block (or state slot) of a group before the next step.

    All reads of the copies of one step happen before all writes.
    """

    group: int
    src: int
    dst: int


@dataclass(frozen=True)
class PrefixHit:
    """What the prefix cache holds of a prompt; valid until the next call that changes the block manager.

    Attributes:
        num_tokens: leading tokens that need no computing; 0 = none.
        node: where the hit ends in the prefix cache.
        firsts: per group the table column of the first block; columns before it have left the window.
        blocks: per group the blocks from there on; for a state group its one checkpoint slot.
    """

    num_tokens: int = 0
    node: Node | None = None
    firsts: tuple[int, ...] = ()
    blocks: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class GroupMetrics:
    """One pool now, in blocks (or state slots); total = used + cached + free, the pad block not counted.

    Attributes:
        used: held by a request, a fence, a checkpoint being written or read. shared: of these, held more
            than once.
        cached: held by nobody, but the prefix cache may hit it; evicted when blocks run short.
        wasted_slots: token places that live requests have in their blocks and have not filled (a block with
            several holders counts for each).
    """

    kind: str
    total: int
    used: int
    shared: int
    cached: int
    free: int
    wasted_slots: int


@dataclass(frozen=True, kw_only=True)
class BlockMetrics:
    """All pools and their sums; since the start, prompt tokens asked of the prefix cache, and found in it."""

    groups: tuple[GroupMetrics, ...]
    total: int
    used: int
    shared: int
    cached: int
    free: int
    wasted_slots: int
    query_tokens: int
    hit_tokens: int
