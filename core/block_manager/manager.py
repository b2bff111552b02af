"""BlockManager: gives blocks and state slots to requests and keeps the prefix cache.

Everything per request is an array indexed by request slot, so a step in which no request needs a new block
costs a few array operations, however many requests decode. One thread uses it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from core.block_manager import integrity
from core.block_manager.copies import PendingCopies
from core.block_manager.errors import BlockManagerError
from core.block_manager.geometry import Geometry
from core.block_manager.hits import longest_hit
from core.block_manager.metrics import measure
from core.block_manager.pool import BlockPool, Int32
from core.block_manager.prefix_cache import Node, PrefixCache
from core.block_manager.records import BlockCopy, BlockMetrics, CacheGroup, PrefixHit
from core.block_manager.slots import UNLIMITED, RequestSlots
from core.block_manager.states import StateSlots

Ints = npt.NDArray[np.integer[Any]] | Sequence[int]

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class _Held:
    """What a request held; given back once step `fence` was waited for. `is_request`: it is closed."""

    fence: int | None
    blocks: tuple[tuple[int, Int32], ...]
    is_request: bool = True


class BlockManager:
    """Blocks and state slots of one engine.

    Attributes:
        groups: the cache groups, in the plan's order.
        tables: per paged or window group int32 [max_requests, B], block ids by table column; the pad block
            where a column is unused or has left the window. [0, 0] for a state group. Read only.
        state_slots: per group int32 [max_requests], a request's own state slot, -1 = none. Read only.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        *,
        max_requests: int,
        max_model_len: int,
        enable_prefix_cache: bool = True,
        pad_block: int = 0,
        hash_key: bytes | None = None,
    ) -> None:
        """Start with every pool empty.

        Args:
            hash_key: up to 64 bytes that key the prefix hashes; None = drawn for this process.

        Raises:
            BlockManagerError: the groups do not fit together; names the group and the rule.
        """
        self.groups = tuple(groups)
        self.max_requests = max_requests
        self.max_model_len = max_model_len
        self.pad_block = pad_block
        self._geometry = Geometry.of(self.groups, max_requests, pad_block)
        self._slots = RequestSlots(self.groups, max_requests, max_model_len, pad_block)
        self.tables = self._slots.tables
        self.state_slots = self._slots.live
        self._is_caching = enable_prefix_cache
        key = os.urandom(32) if hash_key is None else hash_key
        shape = self._geometry
        self._prefix = PrefixCache(
            shape.base_size, len(self.groups), list(shape.state), shape.bound_group, key
        )
        self._pools = [
            BlockPool(group.num_blocks, pad_block, partial(self._prefix.evicted, g))
            for g, group in enumerate(self.groups)
        ]
        self._prefix.pools = self._pools
        self._num_tails = 0
        self._copies = PendingCopies(self._pools)
        self._states = StateSlots(
            self.groups, shape.state, self._slots, self._pools, self._prefix, self._copies
        )
        self._fenced: deque[_Held] = deque()
        self._retired = -1
        self._query_tokens = 0
        self._hit_tokens = 0

    # What would fit

    def num_free(self, group: int) -> int:
        """Blocks that can be allocated now: free ones and cached ones without a holder."""
        return self._pools[group].num_available

    def fits_now(self, num_tokens: int, hit: PrefixHit | None = None) -> bool:
        """Whether the blocks of that many tokens are available now, beyond those of `hit`."""
        for g, group in enumerate(self.groups):
            pool, needed = self._pools[g], 1
            held = hit.blocks[g] if hit is not None and hit.blocks else ()
            if group.kind != "state":
                needed = max(0, group.blocks_for(num_tokens) - len(held))
            needed += sum(int(pool.refs[b]) == 0 for b in held)
            if needed > pool.num_available:
                return False
        return True

    def can_grow(self, slot: int, num_tokens: int) -> bool:
        """Whether `grow` would succeed now."""
        self._require_open(slot)
        return self._growth(slot, num_tokens) is not None

    def growable(self, slot: int) -> int:
        """The most tokens that `grow` could give room for now, at most `max_model_len`."""
        self._require_open(slot)
        s, most = self._slots, self.max_model_len
        extra = self._shared_tails(slot, most)
        for g in self._geometry.blocks:
            spare = max(0, self.num_free(g) - sum(group == g for group, _ in extra))
            most = min(most, (int(s.columns[g][slot]) + spare) * self.groups[g].block_size)
        return most

    # A request's life

    def lookup(self, token_ids: Ints, *, salt: str | bytes = b"", adapter: str = "") -> PrefixHit:
        """What the prefix cache holds of a prompt; changes nothing.

        At least one token is left to compute, and the hit is a multiple of every group's block size.
        """
        root = self._prefix.root(salt, adapter) if self._is_caching else None
        max_tokens = len(token_ids) - 1
        if root is None or max_tokens < self._geometry.granularity:
            return PrefixHit()
        data = np.ascontiguousarray(token_ids, np.int32).tobytes()
        shape = self._geometry
        return longest_hit(
            self.groups,
            self._prefix.walk(root, data, max_tokens // shape.base_size),
            base_size=shape.base_size,
            granularity=shape.granularity,
            max_tokens=max_tokens,
            is_readable=self._states.can_pin,
        )

    def open(self, slot: int, token_ids: Ints, *, salt: str | bytes = b"", adapter: str = "") -> int:
        """Begin a request: take what the prefix cache holds of its tokens.

        Args:
            slot: a closed request slot. token_ids: [T] ids known now.
            salt, adapter: prefixes are shared within equal ones only.

        Returns:
            Leading tokens that need no computing, at most T - 1; 0 = none.

        Raises:
            BlockManagerError: the slot is open, or its last state slot has not come back (retire first).
        """
        if self._slots.is_open[slot]:
            raise BlockManagerError(f"request slot {slot} is open; free it before opening it again")
        hit = self.lookup(token_ids, salt=salt, adapter=adapter)
        s = self._slots
        s.is_open[slot] = True
        s.reach[slot] = s.opened_at[slot] = hit.num_tokens
        s.committed[slot] = hit.num_tokens // self._geometry.base_size
        firsts, blocks = hit.firsts or (0,) * len(self.groups), hit.blocks or ((),) * len(self.groups)
        for g in self._geometry.blocks:
            first, end = firsts[g], firsts[g] + len(blocks[g])
            self._pools[g].acquire(blocks[g])
            self.tables[g][slot, first:end] = blocks[g]
            s.firsts[g][slot], s.columns[g][slot] = first, end
        self._states.open(slot, blocks)
        self._set_capacity(slot)
        if self._is_caching:
            node = hit.node if hit.node is not None else self._prefix.make_root(salt, adapter)
            if node is not None:
                self._prefix.hold(node)
            s.nodes[slot] = node
        self._query_tokens += len(token_ids)
        self._hit_tokens += hit.num_tokens
        return hit.num_tokens

    def state_source(self, slot: int, group: int, start: int) -> int:
        """State slot that a step reads which computes the request's tokens from `start` on; -1 = zero state.

        The first step after `open` reads the checkpoint of the hit; the others read the request's own slot.
        """
        s = self._slots
        return int((s.source if start == s.opened_at[slot] else s.live)[group][slot])

    def grow(self, slot: int, num_tokens: int) -> bool:
        """Make room for tokens [0, num_tokens) in blocks that the request may write.

        A partly filled block that others hold too is replaced by a private copy (`take_copies`).

        Returns:
            False where blocks are short; then nothing changed.

        Raises:
            BlockManagerError: the slot is closed, or the request would exceed `max_model_len`.
        """
        self._require_open(slot)
        s = self._slots
        if s.tail[slot] >= 0 or num_tokens > s.capacity[slot]:
            growth = self._growth(slot, num_tokens)
            if growth is None:
                return False
            tails, needs = growth
            for g, column in tails:
                self._make_private(g, slot, column)
            for g, needed in needs:
                start = int(s.columns[g][slot])
                self.tables[g][slot, start : start + needed] = self._pools[g].allocate(needed)
                s.columns[g][slot] += needed
            self._set_capacity(slot)
            if 0 <= s.tail[slot] < num_tokens:
                s.tail[slot] = -1
                self._num_tails -= 1
        s.reach[slot] = max(int(s.reach[slot]), num_tokens)
        return True

    def grow_many(self, slots: Int32, num_tokens: Int32) -> int:
        """As `grow` for each row, in order, until one fails; both int [R], slots all different.

        Returns:
            How many leading rows were granted; the others are unchanged.
        """
        s = self._slots
        if self._num_tails and (s.tail[slots] >= 0).any():
            return self._grow_each(slots, num_tokens)
        short = np.flatnonzero(num_tokens > s.capacity[slots])
        granted = len(slots)
        if len(short):
            extended = self._extend(slots[short], num_tokens[short])
            if extended < len(short):
                granted = int(short[extended])
                slots, num_tokens = slots[:granted], num_tokens[:granted]
        s.reach[slots] = np.maximum(s.reach[slots], num_tokens)
        return granted

    def trim_window(self, slot: int | Int32, num_computed: int | Int32, fence: int | None = None) -> None:
        """Give back blocks that no query at or after `num_computed` sees; a slot and a count, or [R] of both.

        Args:
            fence: as in `free`.
        """
        for g in self._geometry.windows:
            size, hidden = self.groups[g].block_size, (self.groups[g].window or 1) - 1
            if isinstance(slot, np.ndarray):
                ends = (np.asarray(num_computed) - hidden) // size
                left = ends > self._slots.firsts[g][slot]
                for row, end in zip(slot[left].tolist(), ends[left].tolist(), strict=True):
                    self._trim(g, row, end, fence)
            else:
                self._trim(g, slot, (int(num_computed) - hidden) // size, fence)

    def _trim(self, g: int, slot: int, end: int, fence: int | None) -> None:
        s, row = self._slots, self.tables[g][slot]
        first, end = int(s.firsts[g][slot]), min(end, int(s.columns[g][slot]))
        if end > first:
            ids = row[first:end][::-1].copy()
            row[first:end] = self.pad_block
            s.firsts[g][slot] = end
            self._release(_Held(fence, ((g, ids),), is_request=False))

    def commit(self, slot: int, token_ids: Ints, num_computed: int) -> None:
        """Tokens [0, num_computed) of the request were computed by steps that were waited for.

        Full blocks and checkpoints among them become hittable. Call it before `trim_window`.

        Args:
            token_ids: ids of at least these tokens.
        """
        self._require_open(slot)
        s, size = self._slots, self._geometry.base_size
        if num_computed > s.opened_at[slot]:
            self._states.unpin(slot)
        done, full = int(s.committed[slot]), num_computed // size
        node = s.nodes[slot]
        if node is not None and full > done:
            s.committed[slot] = full
            data = np.ascontiguousarray(token_ids[done * size : full * size], np.int32).tobytes()
            for i in range(full - done):
                node = self._step_on(slot, node, data[i * size * 4 : (i + 1) * size * 4])
                if node is None:
                    break
                self._attach(slot, node, (done + i + 1) * size)
        self._states.settle(slot, num_computed, None)

    def _step_on(self, slot: int, node: Node, data: bytes) -> Node | None:
        """The request's last committed prefix is one node longer; None on a hash collision."""
        child = self._prefix.child(node, data)
        if child is not None:
            self._prefix.hold(child)
        self._prefix.drop(node)
        self._slots.nodes[slot] = child
        return child

    def _attach(self, slot: int, node: Node, end: int) -> None:
        """Make the request's blocks and checkpoints that end at `end` tokens hittable."""
        s = self._slots
        for g in self._geometry.blocks:
            column, rest = divmod(end, self.groups[g].block_size)
            if rest == 0 and s.firsts[g][slot] < column <= s.columns[g][slot]:
                self._prefix.attach(node, g, int(self.tables[g][slot, column - 1]))
        self._states.settle(slot, end, node)

    def fork(self, parent: int, child: int, num_tokens: int) -> None:
        """Open `child` with the parent's first `num_tokens` tokens, which submitted steps compute.

        Both hold the same blocks; whoever writes first into a partly filled one gets a private copy then. The
        child has its own state slots, filled by `take_copies`.

        Args:
            num_tokens: all tokens that the parent's submitted steps compute; fewer only while none of them is
                in flight and no group has a window or state.

        Raises:
            BlockManagerError: the parent is closed, the child is open, or the parent has no such tokens.
        """
        self._require_open(parent)
        s = self._slots
        if s.is_open[child]:
            raise BlockManagerError(f"request slot {child} is open; free it before forking into it")
        if num_tokens > s.reach[parent]:
            raise BlockManagerError(
                f"request slot {parent} has {int(s.reach[parent])} tokens, but a fork wants {num_tokens}; "
                "fork after the step that computes them was scheduled"
            )
        s.is_open[child] = True
        s.reach[child] = s.opened_at[child] = num_tokens
        for g in self._geometry.blocks:
            columns, first = -(-num_tokens // self.groups[g].block_size), int(s.firsts[g][parent])
            ids = self.tables[g][parent, first:columns]
            self.tables[g][child, first:columns] = ids
            s.firsts[g][child], s.columns[g][child] = first, max(first, columns)
            self._pools[g].share(ids)
        self._set_capacity(child)
        self._states.fork(parent, child)
        for slot in (parent, child):
            self._num_tails += int(s.tail[slot] < 0)
            s.tail[slot] = max(int(s.tail[slot]), num_tokens)
        node, done = s.nodes[parent], int(s.committed[parent])
        kept = min(done, num_tokens // self._geometry.base_size)
        s.committed[child] = kept
        if node is not None:
            node = node.ancestor(done - kept)
            self._prefix.hold(node)
            s.nodes[child] = node

    def take_copies(self) -> list[BlockCopy]:
        """Copies to do before the next step, each once; the list is handed over."""
        return self._copies.take()

    def free(self, slot: int, *, fence: int | None = None) -> None:
        """End a request. Its cached blocks stay hittable; the end of it is evicted before the beginning.

        Args:
            fence: id of the newest step that may touch what it held; that is reused only after
                `retire(fence)`. None = at once.
        """
        self._require_open(slot)
        s = self._slots
        held: list[tuple[int, Int32]] = []
        for g in self._geometry.blocks:
            first, end = int(s.firsts[g][slot]), int(s.columns[g][slot])
            held.append((g, self.tables[g][slot, first:end][::-1].copy()))
            self.tables[g][slot, first:end] = self.pad_block
        held += self._states.held(slot)
        self._num_tails -= int(s.tail[slot] >= 0)
        node = s.nodes[slot]
        s.close(slot)
        if node is not None:
            self._prefix.drop(node)
        self._release(_Held(fence, tuple(held)))

    def retire(self, step_id: int) -> None:
        """Step `step_id` and all before it were waited for: what their fences held may be reused."""
        self._retired = max(self._retired, step_id)
        waiting, self._fenced = self._fenced, deque()
        for held in waiting:
            self._release(held)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, as after a change of weights. Running requests cache nothing more."""
        for slot in np.flatnonzero(self._slots.is_open).tolist():
            self._slots.nodes[slot] = None
        self._prefix.clear()

    def forget(self, slot: int) -> None:
        """What the request computed, or found cached, is not to be trusted: nobody will hit it any more, and
        the request caches nothing more. Others that share its blocks keep them.
        """
        self._require_open(slot)
        node, self._slots.nodes[slot] = self._slots.nodes[slot], None
        if node is None:
            return
        prefix: Node | None = node
        while prefix is not None:
            self._prefix.forget(prefix)
            prefix = prefix.parent
        self._prefix.drop(node)

    # State checkpoints

    def checkpoint_for(self, slot: int, start: int, end: int, group: int) -> tuple[int, int] | None:
        """Where a step that computes tokens [start, end) shall also store the state, and in which slot.

        Reserves the slot; `commit` makes it hittable. It may take the place of the oldest checkpoint, never
        that of a request.

        Returns:
            (tokens after `start`, state slot) for the last multiple of the group's block size in
            (start, end], or None: no such multiple, no slot to spare, or the request caches nothing.
        """
        self._require_open(slot)
        size = self.groups[group].block_size
        boundary = end // size * size
        if boundary <= start or self._slots.nodes[slot] is None:
            return None
        state = self._states.reserve(slot, group, boundary)
        return None if state is None else (boundary - start, state)

    def drop_checkpoint(self, slot: int, group: int, *, fence: int | None = None) -> None:
        """Give back what `checkpoint_for` reserved last for this slot and group: its step will not run.

        Args:
            fence: as in `free`, where the step was submitted already.
        """
        self._require_open(slot)
        states = self._states.cancel(slot, group)
        self._release(_Held(fence, ((group, states),), is_request=False))

    # Figures and checks

    def metrics(self) -> BlockMetrics:
        """Figures of now."""
        return measure(
            self.groups,
            self._slots,
            self._pools,
            query_tokens=self._query_tokens,
            hit_tokens=self._hit_tokens,
        )

    def check_integrity(self) -> None:
        """Compare all books with one another; slow.

        Raises:
            BlockManagerError: the first thing that does not add up.
        """
        fenced = [blocks for held in self._fenced for blocks in held.blocks]
        integrity.check(
            self.groups, self._geometry, self._slots, self._pools, self._prefix, fenced, self._copies
        )

    # Inside

    def _require_open(self, slot: int) -> None:
        if not self._slots.is_open[slot]:
            raise BlockManagerError(f"request slot {slot} is closed; open it first")

    def _require_length(self, slot: int, num_tokens: int) -> None:
        if num_tokens > self.max_model_len:
            raise BlockManagerError(
                f"request slot {slot} wants room for {num_tokens} tokens, but max_model_len is "
                f"{self.max_model_len}; end the request there"
            )

    def _set_capacity(self, slot: int) -> None:
        s = self._slots
        room = [int(s.columns[g][slot]) * self.groups[g].block_size for g in self._geometry.blocks]
        s.capacity[slot] = min(room, default=UNLIMITED)

    def _growth(self, slot: int, num_tokens: int) -> tuple[Pairs, Pairs] | None:
        """Blocks that `grow` must make private (group, column) and add (group, count); None = short."""
        self._require_length(slot, num_tokens)
        tails, needs = self._shared_tails(slot, num_tokens), []
        for g in self._geometry.blocks:
            needed = -(-num_tokens // self.groups[g].block_size) - int(self._slots.columns[g][slot])
            if max(0, needed) + sum(group == g for group, _ in tails) > self.num_free(g):
                return None
            if needed > 0:
                needs.append((g, needed))
        return tails, needs

    def _shared_tails(self, slot: int, num_tokens: int) -> Pairs:
        """Blocks (group, column) that the request's next token goes to but others hold or may hit."""
        s, tails = self._slots, []
        tail = int(s.tail[slot])
        if 0 <= tail < num_tokens:
            for g in self._geometry.blocks:
                column, filled = divmod(tail, self.groups[g].block_size)
                if filled and s.firsts[g][slot] <= column < s.columns[g][slot]:
                    block, pool = self.tables[g][slot, column], self._pools[g]
                    if pool.refs[block] > 1 or pool.hittable[block]:
                        tails.append((g, column))
        return tails

    def _make_private(self, g: int, slot: int, column: int) -> None:
        pool, old = self._pools[g], self.tables[g][slot, column : column + 1].copy()
        new = pool.allocate(1)
        self._copies.add(g, int(old[0]), int(new[0]))
        self.tables[g][slot, column] = new[0]
        pool.release(old)

    def _grow_each(self, slots: Int32, num_tokens: Int32) -> int:
        for i, (slot, tokens) in enumerate(zip(slots.tolist(), num_tokens.tolist(), strict=True)):
            if not self.grow(slot, tokens):
                return i
        return len(slots)

    def _extend(self, slots: Int32, num_tokens: Int32) -> int:
        """Add blocks to rows that are short of them; returns how many leading rows got theirs."""
        s, rows = self._slots, len(slots)
        if not s.is_open[slots].all():
            self._require_open(int(slots[~s.is_open[slots]][0]))
        longest = int(num_tokens.argmax())
        self._require_length(int(slots[longest]), int(num_tokens[longest]))
        needs: list[Int32] = []
        for g in self._geometry.blocks:
            needed = -(-num_tokens // self.groups[g].block_size) - s.columns[g][slots]
            np.maximum(needed, 0, out=needed)
            needs.append(needed)
            if int(needed.sum()) > self.num_free(g):
                rows = min(rows, int(np.searchsorted(needed.cumsum(), self.num_free(g), side="right")))
        slots = slots[:rows]
        room = np.full(rows, UNLIMITED, np.int32)
        for g, all_needed in zip(self._geometry.blocks, needs, strict=True):
            needed, columns = all_needed[:rows], s.columns[g][slots]
            total = int(needed.sum())
            if total == rows and needed.all():
                self.tables[g][slots, columns] = self._pools[g].allocate(rows)
            elif total:
                row = np.repeat(np.arange(rows), needed)
                within = np.arange(total) - (needed.cumsum() - needed)[row]
                self.tables[g][slots[row], columns[row] + within] = self._pools[g].allocate(total)
            columns = columns + needed
            s.columns[g][slots] = columns
            np.minimum(room, columns * self.groups[g].block_size, out=room)
        s.capacity[slots] = room
        return rows

    def _release(self, held: _Held) -> None:
        if held.fence is not None and held.fence > self._retired:
            self._fenced.append(held)
            return
        for g, ids in held.blocks:
            self._pools[g].release(ids)
            if held.is_request and self.groups[g].kind == "state":
                self._states.given_back(g)
        self._copies.cancel_unheld()
