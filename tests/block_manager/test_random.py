"""Ten thousand random operations, and planted bugs that the same driver must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core.block_manager import BlockManager, BlockManagerError, prefix_cache
from core.block_manager.pool import BlockPool
from core.block_manager.prefix_cache import PrefixCache, chain_digest, root_data
from core.block_manager.states import StateSlots

from .driver import PLANS, Driver

OPERATIONS = 2000
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("plan", PLANS)
def test_random_operations_keep_contents_and_books_right(plan: str) -> None:
    driver = Driver(plan, seed=1)
    driver.run(OPERATIONS)
    assert min(driver.hits, driver.evictions, driver.forks, driver.copies) > 20
    if driver.state:
        assert driver.checkpoint_hits > 20


@pytest.mark.parametrize("plan", ["paged", "paged+window+state"])
def test_hash_collisions_are_never_hits(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weak_hash(monkeypatch)
    driver = Driver(plan, seed=2)
    driver.run(OPERATIONS)
    assert driver.hits > 5


def weak_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prefix_cache, "chain_digest", lambda *args: chain_digest(*args)[:1])
    patch.setattr("core.block_manager.integrity.chain_digest", prefix_cache.chain_digest)


def accept_collisions(patch: pytest.MonkeyPatch) -> None:
    weak_hash(patch)
    patch.setattr(PrefixCache, "is_same", staticmethod(lambda node, parent, data: True))


def drop_a_decref(patch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release
    patch.setattr(BlockPool, "release", lambda self, blocks: release(self, blocks[: max(1, len(blocks) - 1)]))


def evict_the_youngest(patch: pytest.MonkeyPatch) -> None:
    def evict(self: BlockPool, count: int) -> None:
        for _ in range(count):
            self.cached.move_to_end(next(reversed(self.cached)), last=False)
            original(self, 1)

    original = BlockPool._evict
    patch.setattr(BlockPool, "_evict", evict)


def release_the_beginning_first(patch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release
    patch.setattr(BlockPool, "release", lambda self, blocks: release(self, blocks[::-1]))


def ignore_the_salt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prefix_cache, "root_data", lambda salt, adapter: root_data("", adapter))


def ignore_the_adapter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prefix_cache, "root_data", lambda salt, adapter: root_data(salt, ""))


def skip_copy_on_write(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "_shared_tails", lambda self, slot, tokens: [])


def forget_the_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "take_copies", lambda self: self._copies.take()[:0])


def free_window_blocks_early(patch: pytest.MonkeyPatch) -> None:
    trim = BlockManager._trim

    def early(self: BlockManager, g: int, slot: int, end: int, fence: int | None) -> None:
        trim(self, g, slot, end + 1, fence)

    patch.setattr(BlockManager, "_trim", early)


def ignore_the_fence(patch: pytest.MonkeyPatch) -> None:
    free = BlockManager.free
    patch.setattr(BlockManager, "free", lambda self, slot, *, fence=None: free(self, slot))


def hand_out_the_pad_block(patch: pytest.MonkeyPatch) -> None:
    start = BlockPool.__init__

    def with_pad(self: BlockPool, *args: Any) -> None:
        start(self, *args)
        self._push(np.zeros(1, np.int32))

    patch.setattr(BlockPool, "__init__", with_pad)


def checkpoint_a_block_too_soon(patch: pytest.MonkeyPatch) -> None:
    plan = BlockManager.checkpoint_for

    def stale(self: BlockManager, slot: int, start: int, end: int, group: int) -> tuple[int, int] | None:
        found, size = plan(self, slot, start, end, group), self.groups[group].block_size
        return (found[0] - size, found[1]) if found is not None and found[0] > size else found

    patch.setattr(BlockManager, "checkpoint_for", stale)


def let_checkpoints_outlive_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixCache, "drop_checkpoints", lambda self, node: None)


def use_checkpoints_before_commit(patch: pytest.MonkeyPatch) -> None:
    settle = StateSlots.settle
    patch.setattr(
        StateSlots, "settle", lambda self, slot, tokens, node: settle(self, slot, tokens + 64, node)
    )


def cache_what_is_not_computed(patch: pytest.MonkeyPatch) -> None:
    commit = BlockManager.commit

    def too_much(self: BlockManager, slot: int, tokens: np.ndarray, computed: int) -> None:
        size = self._geometry.base_size
        more = np.append(tokens, np.zeros(size, np.int32))
        commit(self, slot, more, min(computed + size - 1, int(self._slots.capacity[slot])))

    patch.setattr(BlockManager, "commit", too_much)


def serve_the_whole_prompt(patch: pytest.MonkeyPatch) -> None:
    lookup = BlockManager.lookup
    patch.setattr(
        BlockManager, "lookup", lambda self, tokens, **names: lookup(self, np.append(tokens, 0), **names)
    )


BUGS: list[tuple[Patch, str]] = [
    (drop_a_decref, "paged"),
    (evict_the_youngest, "paged"),
    (release_the_beginning_first, "paged"),
    (accept_collisions, "paged"),
    (ignore_the_salt, "paged"),
    (ignore_the_adapter, "state"),
    (skip_copy_on_write, "paged"),
    (forget_the_copy, "state"),
    (free_window_blocks_early, "paged+window"),
    (ignore_the_fence, "paged"),
    (ignore_the_fence, "state"),
    (hand_out_the_pad_block, "paged"),
    (checkpoint_a_block_too_soon, "state"),
    (let_checkpoints_outlive_blocks, "paged+window+state"),
    (use_checkpoints_before_commit, "state"),
    (cache_what_is_not_computed, "paged"),
    (serve_the_whole_prompt, "paged"),
]


@pytest.mark.parametrize(("bug", "plan"), BUGS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_planted_bug_is_noticed(bug: Patch, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    with pytest.raises((AssertionError, BlockManagerError)):
        Driver(plan, seed=1).run(OPERATIONS)
