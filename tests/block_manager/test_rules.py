"""The block manager's rules, one by one."""

from __future__ import annotations

import numpy as np
import pytest

from core.block_manager import BlockCopy, BlockManager, BlockManagerError, CacheGroup

from .driver import paged, state, window


def manager(*groups: CacheGroup, requests: int = 4, length: int = 64, cache: bool = True) -> BlockManager:
    return BlockManager(groups, max_requests=requests, max_model_len=length, enable_prefix_cache=cache)


def ids(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int32)


def compute(blocks: BlockManager, slot: int, tokens: np.ndarray) -> None:
    """Open a request and compute its tokens in one step, which is waited for."""
    start = blocks.open(slot, tokens)
    assert blocks.grow(slot, len(tokens))
    for g, group in enumerate(blocks.groups):
        if group.kind == "state":
            blocks.checkpoint_for(slot, start, len(tokens), g)
    blocks.commit(slot, tokens, len(tokens))
    blocks.trim_window(slot, len(tokens))
    blocks.check_integrity()


def array(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_hit_leaves_one_token_to_compute() -> None:
    blocks = manager(paged(4, 20))
    compute(blocks, 0, ids(12))
    assert blocks.open(1, ids(12)) == 8
    assert blocks.open(2, ids(13)) == 12
    assert (blocks.tables[0][2, :3] == blocks.tables[0][0, :3]).all()
    assert blocks.lookup(ids(1)).num_tokens == blocks.lookup(ids(0)).num_tokens == 0


def test_a_disabled_prefix_cache_never_hits() -> None:
    blocks = manager(paged(4, 20), state(4, 9), cache=False)
    compute(blocks, 0, ids(12))
    assert blocks.open(1, ids(12)) == 0
    assert blocks.checkpoint_for(0, 12, 16, 1) is None


def test_salts_and_adapters_never_run_into_each_other() -> None:
    blocks = manager(paged(4, 20))
    assert blocks.open(0, ids(9), salt="a", adapter="bc") == 0
    assert blocks.grow(0, 9)
    blocks.commit(0, ids(9), 9)
    assert blocks.lookup(ids(9), salt="a", adapter="bc").num_tokens == 8
    assert blocks.lookup(ids(9), salt=b"a", adapter="bc").num_tokens == 8
    for salt, adapter in (("ab", "c"), (b"ab", "c"), ("", "abc"), ("abc", ""), ("", "")):
        assert blocks.lookup(ids(9), salt=salt, adapter=adapter).num_tokens == 0


def test_only_committed_tokens_are_hittable() -> None:
    blocks = manager(paged(4, 20))
    blocks.open(0, ids(12))
    assert blocks.grow(0, 12)
    assert blocks.lookup(ids(12)).num_tokens == 0
    blocks.commit(0, ids(12), 7)
    assert blocks.lookup(ids(12)).num_tokens == 4


def test_the_end_of_a_request_is_evicted_before_its_beginning() -> None:
    blocks = manager(paged(4, 6))
    compute(blocks, 0, ids(20))
    blocks.free(0)
    for evicted, left in ((1, 16), (2, 12), (3, 8)):
        blocks.open(1, ids(50, 100))
        assert blocks.grow(1, 4 * evicted)
        blocks.free(1)
        assert blocks.lookup(ids(30)).num_tokens == left


def test_a_hit_makes_blocks_young_again() -> None:
    blocks = manager(paged(4, 5))
    compute(blocks, 0, ids(8))
    blocks.free(0)
    compute(blocks, 0, ids(8, 50))
    blocks.free(0)
    assert blocks.open(0, ids(9)) == 8
    blocks.free(0)
    blocks.open(0, ids(9, 90))
    assert blocks.grow(0, 8)
    assert blocks.lookup(ids(9)).num_tokens == 8
    assert blocks.lookup(ids(9, 50)).num_tokens == 0


def test_a_window_hit_needs_visible_blocks_only() -> None:
    blocks = manager(paged(4, 20), window(4, 20, 6))
    compute(blocks, 0, ids(17))
    # The query at 17 sees positions 12 to 17: three blocks are out of the window.
    assert (blocks.tables[1][0, :5] != 0).tolist() == [False, False, False, True, True]
    blocks.free(0)
    assert blocks.open(1, ids(17)) == 16
    # The query at 16 sees positions from 11 on.
    assert (blocks.tables[1][1, :5] != 0).tolist() == [False, False, True, True, False]
    assert (blocks.tables[0][1, :5] != 0).tolist() == [True, True, True, True, False]


def test_trimming_many_rows_is_trimming_each() -> None:
    rows, vector = manager(window(4, 60, 6)), manager(window(4, 60, 6))
    for blocks in (rows, vector):
        for slot in range(3):
            blocks.open(slot, ids(30))
            assert blocks.grow(slot, 30)
    for slot, computed in ((0, 30), (1, 9), (2, 5)):
        rows.trim_window(slot, computed)
    vector.trim_window(array(0, 1, 2), array(30, 9, 5))
    assert ((rows.tables[0] == 0) == (vector.tables[0] == 0)).all()
    assert (vector.tables[0] != 0).sum(axis=1).tolist() == [2, 7, 8, 0]


def test_a_state_hit_is_at_a_checkpoint_exactly() -> None:
    blocks = manager(paged(4, 30), state(8, 9))
    compute(blocks, 0, ids(21))
    assert blocks.open(1, ids(21)) == 16
    source = blocks.state_source(1, 1, 16)
    assert source not in (0, -1, int(blocks.state_slots[1][0]), int(blocks.state_slots[1][1]))
    assert blocks.state_source(1, 1, 20) == blocks.state_slots[1][1]
    assert blocks.open(2, ids(15)) == 0
    assert blocks.state_source(2, 1, 0) == -1


def test_a_checkpoint_takes_no_slot_that_a_request_needs() -> None:
    blocks = manager(state(4, 6), requests=4)
    for slot in range(2):
        blocks.open(slot, ids(20, 100 * slot))
        assert blocks.grow(slot, 8)
    assert blocks.checkpoint_for(0, 0, 8, 0) is not None
    assert blocks.checkpoint_for(1, 0, 8, 0) is None
    for slot in (2, 3):
        blocks.open(slot, ids(20, 100 * slot))
    blocks.check_integrity()


def test_dropping_a_checkpoint_keeps_the_one_of_the_step_before() -> None:
    blocks = manager(state(4, 9))
    blocks.open(0, ids(12))
    assert blocks.grow(0, 8)
    first = blocks.checkpoint_for(0, 0, 4, 0)
    second = blocks.checkpoint_for(0, 4, 8, 0)
    assert first is not None and second is not None
    blocks.drop_checkpoint(0, 0)
    blocks.commit(0, ids(12), 8)
    assert blocks.lookup(ids(12)).num_tokens == 4


def test_grow_grants_all_or_nothing() -> None:
    blocks = manager(paged(4, 6), window(4, 4, 30))
    blocks.open(0, ids(5))
    before = blocks.metrics()
    assert not blocks.can_grow(0, 16)
    assert not blocks.grow(0, 16)
    assert blocks.metrics() == before
    assert blocks.growable(0) == 12
    assert blocks.grow(0, 12)


def test_grow_many_grants_leading_rows() -> None:
    blocks = manager(paged(4, 7), length=40)
    for slot in range(4):
        blocks.open(slot, ids(4))
    assert blocks.grow_many(array(3, 0, 2, 1), array(5, 9, 8, 1)) == 2
    assert (blocks.tables[0] != 0).sum(axis=1).tolist() == [3, 0, 0, 2]
    assert blocks.grow_many(array(2), array(4)) == 1
    blocks.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_grow_many_is_grow_for_each_row(seed: int) -> None:
    one, many = (manager(paged(4, 40), window(8, 30, 16), requests=8) for _ in range(2))
    rng = np.random.default_rng(seed)
    for blocks in (one, many):
        for slot in range(8):
            blocks.open(slot, ids(60))
    wanted = np.zeros(8, np.int32)
    for _ in range(12):
        slots = rng.permutation(8)[:6].astype(np.int32)
        target = wanted[slots] + rng.integers(0, 9, 6).astype(np.int32)
        granted = 0
        while granted < 6 and one.grow(int(slots[granted]), int(target[granted])):
            granted += 1
        assert many.grow_many(slots, target) == granted
        wanted[slots[:granted]] = target[:granted]
        many.check_integrity()
        for g in range(2):
            assert ((one.tables[g] != 0) == (many.tables[g] != 0)).all()


def test_a_shared_partly_filled_block_is_copied_before_it_is_written() -> None:
    blocks = manager(paged(4, 20), state(4, 9))
    compute(blocks, 0, ids(6))
    for child in (1, 2):
        blocks.fork(0, child, 6)
    parent = blocks.tables[0][0].copy()
    live = blocks.state_slots[1]
    assert (blocks.tables[0][:3] == parent).all()
    assert blocks.metrics().groups[0].shared == 2
    assert blocks.grow_many(array(0, 1, 2), array(7, 7, 7)) == 3
    copies = blocks.take_copies()
    moved = [BlockCopy(0, int(parent[1]), int(blocks.tables[0][slot, 1])) for slot in (0, 1)]
    states = [BlockCopy(1, int(live[0]), int(live[slot])) for slot in (1, 2)]
    assert sorted(copies, key=str) == sorted(moved + states, key=str)
    assert blocks.tables[0][2, 1] == parent[1]
    assert (blocks.tables[0][:3, 0] == parent[0]).all()
    assert blocks.take_copies() == []


def test_a_fork_at_a_block_boundary_copies_nothing() -> None:
    blocks = manager(paged(4, 20))
    compute(blocks, 0, ids(8))
    blocks.fork(0, 1, 8)
    assert blocks.grow_many(array(0, 1), array(9, 9)) == 2
    assert blocks.take_copies() == []


def test_fenced_blocks_come_back_at_the_fence_and_stay_hittable() -> None:
    blocks = manager(paged(4, 6))
    compute(blocks, 0, ids(20))
    blocks.free(0, fence=7)
    assert blocks.num_free(0) == 0
    assert blocks.open(0, ids(13)) == 12
    blocks.free(0)
    blocks.retire(6)
    assert blocks.num_free(0) == 0
    blocks.retire(7)
    assert blocks.num_free(0) == 5
    blocks.check_integrity()


def test_trimmed_blocks_wait_for_their_fence() -> None:
    blocks = manager(window(4, 6, 5))
    blocks.open(0, ids(20))
    assert blocks.grow(0, 20)
    blocks.trim_window(0, 20, 3)
    assert blocks.num_free(0) == 0
    blocks.retire(3)
    assert blocks.num_free(0) == 4


def test_a_reset_forgets_cached_prefixes_and_those_of_running_requests() -> None:
    blocks = manager(paged(4, 20), state(4, 9))
    compute(blocks, 0, ids(8))
    blocks.reset_prefix_cache()
    assert blocks.grow(0, 16)
    blocks.commit(0, ids(16), 16)
    assert blocks.lookup(ids(16)).num_tokens == 0
    blocks.free(0)
    assert blocks.metrics().cached == 0
    blocks.check_integrity()


def test_what_fits_is_told_before_anything_is_taken() -> None:
    blocks = manager(paged(4, 11), window(4, 5, 5), length=64)
    compute(blocks, 0, ids(12))
    assert blocks.fits_now(28) and not blocks.fits_now(29)
    hit = blocks.lookup(ids(40))
    assert hit.num_tokens == 12
    assert blocks.fits_now(40, hit)


def test_metrics_count_every_block_once() -> None:
    blocks = manager(paged(4, 11))
    compute(blocks, 0, ids(9))
    blocks.open(1, ids(9))
    blocks.free(0)
    figures = blocks.metrics()
    group = figures.groups[0]
    assert (group.total, group.used, group.cached, group.free, group.shared) == (10, 2, 0, 8, 0)
    assert (figures.query_tokens, figures.hit_tokens) == (18, 8)
    assert blocks.grow(1, 9)
    assert blocks.metrics().wasted_slots == 3
    blocks.free(1)
    assert blocks.metrics().cached == 2


def test_misuse_is_refused_by_name() -> None:
    blocks = manager(paged(4, 20))
    with pytest.raises(BlockManagerError, match="request slot 2 is closed"):
        blocks.grow(2, 4)
    with pytest.raises(BlockManagerError, match="request slot 2 is closed"):
        blocks.grow_many(array(2), array(4))
    blocks.open(0, ids(5))
    with pytest.raises(BlockManagerError, match="request slot 0 is open"):
        blocks.open(0, ids(5))
    with pytest.raises(BlockManagerError, match="max_model_len is 64"):
        blocks.grow(0, 65)
    with pytest.raises(BlockManagerError, match="max_model_len is 64"):
        blocks.grow_many(array(0), array(65))
    with pytest.raises(BlockManagerError, match="a fork wants 5"):
        blocks.fork(0, 1, 5)


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ((), "at least one cache group"),
        ((paged(4, 9), paged(6, 9)), "multiple of the smallest, 4"),
        ((paged(4, 9), state(2, 9)), "multiple of the block size 4"),
        ((state(4, 4),), "at least 5"),
        ((paged(4, 1),), "at least 2"),
        ((CacheGroup(kind="window", layers=(), block_size=4, num_blocks=9),), "window None"),
    ],
)
def test_groups_that_do_not_fit_together_are_refused(groups: tuple[CacheGroup, ...], match: str) -> None:
    with pytest.raises(BlockManagerError, match=match):
        manager(*groups)


def test_less_than_four_percent_of_allocated_slots_are_empty() -> None:
    """32 requests at once, prompts of 32 to 512 tokens, outputs of 16 to 256, blocks of 16."""
    rng = np.random.default_rng(0)
    prompts, outputs = rng.integers(32, 513, 32), rng.integers(16, 257, 32)
    blocks = manager(paged(16, 2000), requests=32, length=800)
    length = prompts.astype(np.int32)
    for slot, prompt in enumerate(prompts.tolist()):
        blocks.open(slot, rng.integers(0, 1000, prompt))
        assert blocks.grow(slot, prompt)
    shares = []
    running = np.arange(32, dtype=np.int32)
    while len(running):
        figures = blocks.metrics()
        shares.append(figures.wasted_slots / (16 * figures.used))
        for slot in running[length[running] == (prompts + outputs)[running]].tolist():
            blocks.free(slot)
        running = running[length[running] < (prompts + outputs)[running]]
        length[running] += 1
        assert blocks.grow_many(running, length[running]) == len(running)
    assert np.mean(shares) < 0.04
