"""PendingCopies: block copies that the next step needs done before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from core.block_manager.pool import BlockPool
from core.block_manager.records import BlockCopy


class PendingCopies:
    """At most one copy into each block. All reads happen before all writes."""

    def __init__(self, pools: Sequence[BlockPool]) -> None:
        self._pools = pools
        self._sources: dict[tuple[int, int], int] = {}

    def add(self, group: int, src: int, dst: int) -> None:
        """Fill `dst` from `src`."""
        # A source that itself waits for a copy has no contents yet: take them from where they come.
        self._sources[(group, dst)] = self._sources.get((group, src), src)

    def cancel_unheld(self) -> None:
        """Forget copies into blocks that nobody holds any more; to be called after each release."""
        for group, dst in [key for key in self._sources if self._pools[key[0]].refs[key[1]] == 0]:
            del self._sources[(group, dst)]

    def take(self) -> list[BlockCopy]:
        """All copies, handed over."""
        copies = list(self)
        self._sources.clear()
        return copies

    def __iter__(self) -> Iterator[BlockCopy]:
        return iter([BlockCopy(g, src, dst) for (g, dst), src in self._sources.items()])
