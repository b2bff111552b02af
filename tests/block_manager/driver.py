"""A random driver: requests come, step, fork, finish and are preempted on a simulated device.

The device's memory is a dictionary from a block's place to the prefix whose entry was written there, so a
wrong block, a stale checkpoint or a block that was reused too early shows as a wrong prefix. Prefixes are
numbers from a dictionary (prefix, token) -> number, so equal numbers mean equal salt, adapter and tokens.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from core.block_manager import BlockManager, CacheGroup

MAX_REQUESTS, MAX_LEN = 6, 48


def paged(size: int, blocks: int) -> CacheGroup:
    return CacheGroup(kind="paged", layers=(0,), block_size=size, num_blocks=blocks)


def window(size: int, blocks: int, tokens: int) -> CacheGroup:
    return CacheGroup(kind="window", layers=(1,), block_size=size, num_blocks=blocks, window=tokens)


def state(size: int, slots: int) -> CacheGroup:
    return CacheGroup(kind="state", layers=(2,), block_size=size, num_blocks=slots)


PLANS: dict[str, tuple[CacheGroup, ...]] = {
    "paged": (paged(4, 36),),
    "paged+window": (paged(4, 36), window(4, 26, 7), window(2, 50, 5)),
    "paged+window+state": (paged(4, 40), window(4, 30, 9), state(8, 13)),
    "state": (state(4, 12),),
    "window+state": (window(2, 60, 6), state(4, 11)),
    "two sizes": (paged(2, 60), paged(6, 26)),
}


@dataclass
class Sequence:
    slot: int
    tokens: list[int]
    prefixes: list[int]
    prompt: int
    limit: int
    computed: int
    epoch: int


@dataclass
class Row:
    sequence: Sequence
    epoch: int
    end: int
    entries: list[tuple[int, int, int, int]] = field(default_factory=list)
    states: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass
class Held:
    fence: int
    request_slot: int
    blocks: set[tuple[int, int]]


class Driver:
    def __init__(self, plan: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.groups = PLANS[plan]
        self.blocks = BlockManager(
            self.groups, max_requests=MAX_REQUESTS, max_model_len=MAX_LEN, hash_key=b"test"
        )
        self.kv = [i for i, g in enumerate(self.groups) if g.kind != "state"]
        self.state = [i for i, g in enumerate(self.groups) if g.kind == "state"]
        self.memory: list[dict[tuple[int, int], int]] = [{} for _ in self.groups]
        self.numbers: dict[tuple[object, ...], int] = {}
        self.running: dict[int, Sequence] = {}
        self.in_flight: deque[tuple[int, list[Row]]] = deque()
        self.held: list[Held] = []
        self.next_step = 0
        self.num_ops = 0
        self.hits = self.evictions = self.forks = self.copies = self.checkpoint_hits = 0
        self.documents = [[self.random.randrange(3) for _ in range(40)] for _ in range(3)]
        self.stamps: list[dict[int, tuple[int, int]]] = [{} for _ in self.groups]

    def run(self, num_ops: int) -> None:
        operations = (
            [self.start] * 8 + [self.step] * 9 + [self.wait] * 9 + [self.finish] * 4 + [self.fork] * 2
        )
        for _ in range(num_ops):
            self.num_ops += 1
            operation = self.reset if self.random.random() < 0.002 else self.random.choice(operations)
            columns = operation()
            self.blocks.check_integrity()
            self.check_evictions(columns or {}, is_reset=operation == self.reset)

    # Names of prefixes

    def number(self, *key: object) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def prefixes(self, tokens: list[int], salt: str, adapter: str) -> list[int]:
        found = [self.number("root", salt, adapter)]
        for token in tokens:
            found.append(self.number(found[-1], token))
        return found

    # Operations; each returns the table column of blocks that it releases in a known order

    def start(self) -> None:
        slot = self.free_slot()
        if slot is None:
            return
        document = self.random.choice(self.documents)
        tokens = document[: self.random.choice((1, 7, 8, 9, 12, 13, 16, 24, 25, 37))]
        tokens = tokens + [self.random.randrange(3) for _ in range(self.random.choice((0, 1, 3)))]
        salt, adapter = self.random.choices((("", ""), ("a", ""), ("", "x"), ("a", "x")), (8, 1, 1, 1))[0]
        prefixes = self.prefixes(tokens, salt, adapter)
        wanted, is_certain = self.expected_hit(prefixes)
        cached = self.blocks.open(slot, np.array(tokens, np.int32), salt=salt, adapter=adapter)
        assert cached == wanted or (not is_certain and cached < wanted), f"hit {cached}, wanted {wanted}"
        self.hits += cached > 0
        self.checkpoint_hits += cached > 0 and bool(self.state)
        limit = min(MAX_LEN, len(tokens) + self.random.randrange(1, 20))
        self.running[slot] = Sequence(slot, tokens, prefixes, len(tokens), limit, cached, self.num_ops)

    def expected_hit(self, prefixes: list[int]) -> tuple[int, bool]:
        """The longest prefix whose entries are hittable by what the device's memory holds."""
        is_certain = True
        known: list[set[int]] = []
        for g, group in enumerate(self.groups):
            pool, last = self.blocks._pools[g], group.block_size - 1 if g in self.kv else 0
            known.append({self.memory[g].get((b, last), -1) for b in np.flatnonzero(pool.hittable).tolist()})
            if g in self.state:
                closed = MAX_REQUESTS - len(self.running) - len([h for h in self.held if h.request_slot >= 0])
                is_certain &= self.blocks.num_free(g) - 1 >= closed
        step = math.lcm(*(g.block_size for g in self.groups))
        for length in range((len(prefixes) - 2) // step * step, 0, -step):
            if all(self.serves(g, known[g], prefixes, length) for g in range(len(self.groups))):
                return length, is_certain
        return 0, True

    def serves(self, g: int, known: set[int], prefixes: list[int], length: int) -> bool:
        group = self.groups[g]
        if group.kind == "state":
            return prefixes[length] in known
        seen = range(self.first_seen(g, length), length)
        return all(prefixes[(p // group.block_size + 1) * group.block_size] in known for p in seen)

    def first_seen(self, g: int, position: int) -> int:
        size = self.groups[g].window
        return 0 if size is None else max(0, position - size + 1)

    def step(self) -> None:
        if len(self.in_flight) >= 2:
            return
        chosen = [s for s in self.running.values() if self.random.random() < 0.8]
        self.random.shuffle(chosen)
        rows = self.decode_rows([s for s in chosen if s.computed >= s.prompt])
        for sequence in chosen:
            if sequence.computed < sequence.prompt and sequence.slot in self.running:
                rows += self.prefill_row(sequence, {id(r.sequence) for r in rows})
        if rows:
            self.submit(rows)

    def decode_rows(self, sequences: list[Sequence]) -> list[Row]:
        sequences = [s for s in sequences if s.computed < s.limit]
        for s in sequences:
            if s.computed == len(s.tokens):
                s.tokens.append(self.random.randrange(3))
                s.prefixes.append(self.number(s.prefixes[-1], s.tokens[-1]))
        slots = np.array([s.slot for s in sequences], np.int32)
        wanted = np.array([s.computed + 1 for s in sequences], np.int32)
        granted = self.blocks.grow_many(slots, wanted)
        if granted < len(slots):
            assert not self.blocks.can_grow(int(slots[granted]), int(wanted[granted]))
        return [Row(s, s.epoch, s.computed + 1) for s in sequences[:granted]]

    def prefill_row(self, sequence: Sequence, busy: set[int]) -> list[Row]:
        end = min(sequence.prompt, sequence.computed + self.random.choice((3, 8, 16, 40)))
        before = [self.blocks.tables[g].copy() for g in self.kv]
        could = self.blocks.can_grow(sequence.slot, end)
        if self.blocks.grow(sequence.slot, end):
            assert could
            return [Row(sequence, sequence.epoch, end)]
        assert not could
        assert all((self.blocks.tables[g] == t).all() for g, t in zip(self.kv, before, strict=True))
        others = [s for s in self.running.values() if id(s) not in busy and s is not sequence]
        if others and self.random.random() < 0.7:
            self.close(self.random.choice(others))
        return []

    def submit(self, rows: list[Row]) -> None:
        step_id, self.next_step = self.next_step, self.next_step + 1
        copies = self.blocks.take_copies()
        self.copies += len(copies)
        read = [{k: v for k, v in self.memory[c.group].items() if k[0] == c.src} for c in copies]
        for copy, entries in zip(copies, read, strict=True):
            # A copy for a request that ended meanwhile goes to a block that no step has touched yet.
            if any((copy.group, copy.dst) in self.holding(slot) for slot in self.running):
                self.check_writable(copy.group, copy.dst)
            for (_, offset), prefix in entries.items():
                self.memory[copy.group][(copy.dst, offset)] = prefix
        for row in rows:
            self.read_states(row)
            self.check_entries(self.entries(row, row.sequence.computed))
        for row in rows:
            self.write(row)
        self.in_flight.append((step_id, rows))
        for row in rows:
            self.check_row(row)

    def entries(self, row: Row, end: int) -> list[tuple[int, int, int, int]]:
        """Places and prefixes of all entries before `end` that the row's tokens see."""
        found, sequence = [], row.sequence
        for g in self.kv:
            size, table = self.groups[g].block_size, self.blocks.tables[g][sequence.slot]
            for p in range(self.first_seen(g, sequence.computed), end):
                found.append((g, int(table[p // size]), p % size, sequence.prefixes[p + 1]))
        return found

    def read_states(self, row: Row) -> None:
        sequence, start = row.sequence, row.sequence.computed
        for g in self.state:
            source = self.blocks.state_source(sequence.slot, g, start)
            if source == -1:
                assert start == 0, f"row at {start} starts from the zero state"
                continue
            assert self.memory[g].get((source, 0)) == sequence.prefixes[start], "wrong state"
            if source != self.blocks.state_slots[g][sequence.slot]:
                row.states.append((g, source, sequence.prefixes[start]))

    def write(self, row: Row) -> None:
        sequence, start = row.sequence, row.sequence.computed
        for g in self.kv:
            size = self.groups[g].block_size
            for p in range(start, row.end):
                block = int(self.blocks.tables[g][sequence.slot, p // size])
                self.check_writable(g, block)
                self.memory[g][(block, p % size)] = sequence.prefixes[p + 1]
        for g in self.state:
            live = int(self.blocks.state_slots[g][sequence.slot])
            self.check_writable(g, live)
            self.memory[g][(live, 0)] = sequence.prefixes[row.end]
            checkpoint = self.blocks.checkpoint_for(sequence.slot, start, row.end, g)
            if checkpoint is not None and self.random.random() < 0.1:
                self.blocks.drop_checkpoint(sequence.slot, g)
            elif checkpoint is not None:
                offset, slot = checkpoint
                assert 0 < offset <= row.end - start
                self.check_writable(g, slot)
                self.memory[g][(slot, 0)] = sequence.prefixes[start + offset]
                row.states.append((g, slot, sequence.prefixes[start + offset]))
        row.entries = self.entries(row, row.end)
        sequence.computed = row.end

    def wait(self) -> None:
        if not self.in_flight:
            return
        step_id, rows = self.in_flight.popleft()
        # The step may have run as late as now.
        for row in rows:
            self.check_row(row)
        self.held = [h for h in self.held if h.fence > step_id]
        self.blocks.retire(step_id)
        self.settle()
        for row in rows:
            sequence = row.sequence
            if self.running.get(sequence.slot) is sequence and sequence.epoch == row.epoch:
                self.blocks.commit(sequence.slot, np.array(sequence.tokens[: row.end], np.int32), row.end)
                self.settle()
                self.trim(sequence, row.end)

    def settle(self) -> None:
        """Between the parts of an operation: stamp what was cached just now."""
        self.check_evictions({}, is_reset=False)
        self.num_ops += 1

    def trim(self, sequence: Sequence, end: int) -> None:
        fence = self.in_flight[-1][0] if self.in_flight else None
        before = self.holding(sequence.slot)
        if self.random.random() < 0.5:
            self.blocks.trim_window(sequence.slot, end, fence)
        else:
            self.blocks.trim_window(np.array([sequence.slot], np.int32), np.array([end], np.int32), fence)
        if fence is not None:
            self.held.append(Held(fence, -1, set(before) - set(self.holding(sequence.slot))))

    def finish(self) -> dict[tuple[int, int], int] | None:
        return self.close(self.random.choice(list(self.running.values()))) if self.running else None

    def close(self, sequence: Sequence) -> dict[tuple[int, int], int]:
        fence = self.in_flight[-1][0] if self.in_flight else None
        holding = self.holding(sequence.slot)
        if fence is not None:
            self.held.append(Held(fence, sequence.slot, set(holding)))
        self.blocks.free(sequence.slot, fence=fence)
        del self.running[sequence.slot]
        return holding

    def holding(self, slot: int) -> dict[tuple[int, int], int]:
        """Blocks of a request by (group, block), with their table columns; its own state slots too."""
        held = {(g, int(self.blocks.state_slots[g][slot])): 0 for g in self.state}
        for g in self.kv:
            blocks = self.blocks.tables[g][slot].tolist()
            held.update({(g, block): column for column, block in enumerate(blocks) if block})
        return held

    def fork(self) -> None:
        slot = self.free_slot()
        parents = [s for s in self.running.values() if 0 < s.computed < MAX_LEN]
        if slot is None or not parents:
            return
        parent = self.random.choice(parents)
        known = parent.computed
        if not self.in_flight and all(g.kind == "paged" for g in self.groups):
            known = self.random.choice((known, known, self.random.randrange(1, known + 1)))
        self.blocks.fork(parent.slot, slot, known)
        self.forks += 1
        limit = min(MAX_LEN, known + self.random.randrange(1, 20))
        tokens, prefixes = parent.tokens[:known], parent.prefixes[: known + 1]
        self.running[slot] = Sequence(slot, tokens, prefixes, known, limit, known, self.num_ops)

    def reset(self) -> None:
        self.blocks.reset_prefix_cache()
        assert self.blocks.metrics().cached == 0

    def free_slot(self) -> int | None:
        fenced = {h.request_slot for h in self.held}
        free = [s for s in range(MAX_REQUESTS) if s not in self.running and s not in fenced]
        return self.random.choice(free) if free else None

    # Checks

    def check_entries(self, entries: list[tuple[int, int, int, int]]) -> None:
        for g, block, offset, prefix in entries:
            assert self.memory[g].get((block, offset)) == prefix, f"group {g}: wrong entry in block {block}"

    def check_row(self, row: Row) -> None:
        self.check_entries(row.entries)
        for g, slot, prefix in row.states:
            assert self.memory[g].get((slot, 0)) == prefix, f"group {g}: state slot {slot} was overwritten"

    def check_writable(self, g: int, block: int) -> None:
        assert block != 0, "the pad block was handed out"
        assert not self.blocks._pools[g].hittable[block], "a cached block is written"
        for held in self.held:
            assert (g, block) not in held.blocks, (
                f"block {block} is reused before step {held.fence} was waited for"
            )

    def check_evictions(self, columns: dict[tuple[int, int], int], *, is_reset: bool) -> None:
        """Evicted blocks were released before those that stayed; of one request, the end went first."""
        for g, old in enumerate(self.stamps):
            pool = self.blocks._pools[g]
            # A checkpoint may also go, young as it is, because its block does.
            is_ordered = g in self.kv or not self.kv
            gone = [b for b in old if not pool.hittable[b]]
            stayed = [old[b] for b in old if b in pool.cached]
            self.evictions += len(gone)
            if gone and stayed and is_ordered and not is_reset:
                assert max(old[b] for b in gone) <= min(stayed), f"group {g}: evicted a young block"
            self.stamps[g] = {b: old.get(b, (self.num_ops, -columns.get((g, b), 0))) for b in pool.cached}
