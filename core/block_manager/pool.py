"""BlockPool: reference counts, the free list and the eviction order of one cache group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from core.block_manager.errors import BlockManagerError

Int32 = npt.NDArray[np.int32]


class BlockPool:
    """Every block is in exactly one place: free, cached (no holder, but hittable), or used (has holders).

    A block that the prefix cache knows is marked hittable; when its last holder leaves it becomes cached, at
    the young end of the eviction order. Allocation takes free blocks first, then evicts the oldest cached
    ones.

    Attributes:
        refs: int32 [num_blocks], holders of each block.
        hittable: bool [num_blocks].
        cached: blocks without holders that may be hit, oldest first.
    """

    def __init__(self, num_blocks: int, pad_block: int, on_evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self.pad_block = pad_block
        self.refs: Int32 = np.zeros(num_blocks, np.int32)
        self.hittable: npt.NDArray[np.bool_] = np.zeros(num_blocks, np.bool_)
        self.cached: OrderedDict[int, None] = OrderedDict()
        self._on_evict = on_evict
        ids = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._stack: Int32 = np.empty(num_blocks, np.int32)
        self._num_free = 0
        self._push(ids[ids != pad_block])

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self._num_free

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free and cached ones."""
        return self._num_free + len(self.cached)

    @property
    def free_blocks(self) -> Int32:
        """int32 [num_free], a view; the last one is allocated first."""
        return self._stack[: self._num_free]

    def allocate(self, count: int) -> Int32:
        """`count` blocks with one holder each, int32 [count].

        Raises:
            BlockManagerError: fewer are available. Nothing was allocated.
        """
        if count > self._num_free:
            if count > self.num_available:
                raise BlockManagerError(
                    f"{count} blocks were asked of a pool that has {self.num_available} available; "
                    "ask num_free before allocating"
                )
            self._evict(count - self._num_free)
        self._num_free -= count
        ids = self._stack[self._num_free : self._num_free + count][::-1].copy()
        self.refs[ids] = 1
        return ids

    def _evict(self, count: int) -> None:
        for _ in range(count):
            block, _none = self.cached.popitem(last=False)
            self.hittable[block] = False
            self._on_evict(block)
            self._push_one(block)

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more holder for each hittable block, cached or used."""
        for block in blocks:
            if self.refs[block] == 0:
                del self.cached[block]
            self.refs[block] += 1

    def share(self, blocks: Int32) -> None:
        """One more holder for each of these different, used blocks."""
        self.refs[blocks] += 1

    def release(self, blocks: Int32) -> None:
        """One holder less for each of these different blocks. The first one is evicted first.

        Raises:
            BlockManagerError: a block had no holder.
        """
        left = self.refs[blocks] - 1
        if (left < 0).any():
            raise BlockManagerError(
                f"block {int(blocks[left < 0][0])} was released but has no holder; release a block once only"
            )
        self.refs[blocks] = left
        unheld = blocks[left == 0]
        known = self.hittable[unheld]
        for block in unheld[known].tolist():
            self.cached[block] = None
        self._push(unheld[~known])

    def mark(self, block: int) -> None:
        """The prefix cache knows this used block from now on."""
        self.hittable[block] = True

    def unmark(self, block: int) -> None:
        """The prefix cache forgot this block; it is free if nobody holds it."""
        self.hittable[block] = False
        if self.refs[block] == 0:
            del self.cached[block]
            self._push_one(block)

    def _push_one(self, block: int) -> None:
        self._stack[self._num_free] = block
        self._num_free += 1

    def _push(self, blocks: Int32) -> None:
        end = self._num_free + len(blocks)
        self._stack[self._num_free : end] = blocks
        self._num_free = end
