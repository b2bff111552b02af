"""StateSlots: the state slots of requests, and the checkpoints that the prefix cache keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.block_manager.copies import PendingCopies
from core.block_manager.errors import BlockManagerError
from core.block_manager.pool import BlockPool, Int32
from core.block_manager.prefix_cache import Node, PrefixCache
from core.block_manager.records import CacheGroup
from core.block_manager.slots import RequestSlots


class StateSlots:
    """State groups only. A slot of the pool is a request's own, a checkpoint, or free.

    Checkpoints that are being written or read never take so many slots that an open request would get none.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        indices: Sequence[int],
        slots: RequestSlots,
        pools: Sequence[BlockPool],
        prefix: PrefixCache,
        copies: PendingCopies,
    ) -> None:
        self._groups = groups
        self._indices = indices
        self._slots = slots
        self._pools = pools
        self._prefix = prefix
        self._copies = copies
        self._num_live = [0] * len(groups)

    def can_pin(self, group: int, state: int) -> bool:
        """Whether a request may hold this checkpoint until it has read it."""
        return bool(self._pools[group].refs[state]) or self._has_spare(group)

    def _has_spare(self, group: int) -> bool:
        unopened = len(self._slots.is_open) - self._num_live[group]
        return self._pools[group].num_available - 1 >= unopened

    def open(self, slot: int, checkpoints: Sequence[tuple[int, ...]]) -> None:
        """Give a request its own slots; per group the checkpoint that it starts from, or ()."""
        for g in self._indices:
            self._pools[g].acquire(checkpoints[g])
            self._slots.source[g][slot] = checkpoints[g][0] if checkpoints[g] else -1
        for g in self._indices:
            self._take_live(g, slot)

    def fork(self, parent: int, child: int) -> None:
        """Give a child its own slots with the parent's state."""
        s = self._slots
        has_stepped = s.reach[parent] > s.opened_at[parent]
        for g in self._indices:
            self._take_live(g, child)
            live, source = int(s.live[g][parent]), int(s.source[g][parent])
            if has_stepped or source == live:
                self._copies.add(g, live, int(s.live[g][child]))
                s.source[g][child] = s.live[g][child]
            elif source >= 0:
                s.source[g][child] = source
                self._pools[g].acquire((source,))

    def _take_live(self, group: int, slot: int) -> None:
        pool = self._pools[group]
        if not pool.num_available:
            raise BlockManagerError(
                f"cache group {group} has no state slot for request slot {slot}: those of closed requests "
                "are still fenced; retire their steps before reusing their request slots"
            )
        self._slots.live[group][slot] = pool.allocate(1)[0]
        self._num_live[group] += 1

    def unpin(self, slot: int) -> None:
        """The request's first step was waited for: the checkpoints that it read may go."""
        s = self._slots
        for g in self._indices:
            source, live = int(s.source[g][slot]), int(s.live[g][slot])
            if source != live:
                s.source[g][slot] = live
                if source >= 0:
                    self._pools[g].release(np.array([source], np.int32))

    def held(self, slot: int) -> list[tuple[int, Int32]]:
        """All that a request holds, per group: its own slot, the checkpoint it reads, those it writes."""
        s, held = self._slots, []
        for g in self._indices:
            live, source = int(s.live[g][slot]), int(s.source[g][slot])
            ids = [live] if source in (-1, live) else [live, source]
            ids += [state for group, _, state in s.reserved[slot] if group == g]
            held.append((g, np.array(ids, np.int32)))
        return held

    def given_back(self, group: int) -> None:
        """A request's own slot of the group was released."""
        self._num_live[group] -= 1

    def reserve(self, slot: int, group: int, boundary: int) -> int | None:
        """A slot for the checkpoint after `boundary` tokens; None where none can be spared."""
        if not self._has_spare(group):
            return None
        state = int(self._pools[group].allocate(1)[0])
        self._slots.reserved[slot].append((group, boundary, state))
        return state

    def cancel(self, slot: int, group: int) -> Int32:
        """Forget the request's newest reserved checkpoint of a group; its slot, for the caller to release."""
        reserved = self._slots.reserved[slot]
        newest = [i for i, entry in enumerate(reserved) if entry[0] == group][-1:]
        return np.array([reserved.pop(i)[2] for i in newest], np.int32)

    def settle(self, slot: int, num_tokens: int, node: Node | None) -> None:
        """Checkpoints up to `num_tokens` were written: those that end at `node` become hittable."""
        waiting = []
        for entry in self._slots.reserved[slot]:
            g, boundary, state = entry
            if boundary > num_tokens:
                waiting.append(entry)
                continue
            if node is not None and boundary == num_tokens:
                self._prefix.attach_checkpoint(node, g, state)
            self._pools[g].release(np.array([state], np.int32))
        self._slots.reserved[slot] = waiting
