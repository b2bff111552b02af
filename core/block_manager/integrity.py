"""Checks that compare the block manager's books with one another. Slow; for tests and fault finding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from core.block_manager.errors import BlockManagerError
from core.block_manager.geometry import Geometry
from core.block_manager.pool import BlockPool, Int32
from core.block_manager.prefix_cache import Node, PrefixCache, chain_digest
from core.block_manager.records import BlockCopy, CacheGroup
from core.block_manager.slots import UNLIMITED, RequestSlots


def check(
    groups: Sequence[CacheGroup],
    geometry: Geometry,
    slots: RequestSlots,
    pools: Sequence[BlockPool],
    prefix: PrefixCache,
    fenced: Sequence[tuple[int, Int32]],
    copies: Iterable[BlockCopy],
) -> None:
    """Raise BlockManagerError at the first thing that does not add up."""
    for g in range(len(groups)):
        _check_places(g, pools[g])
        _check_references(g, groups[g], slots, pools[g], fenced)
    for g in geometry.blocks:
        _check_tables(g, groups[g], slots, pools[g])
    _check_capacity(groups, geometry, slots)
    _check_nodes(slots, prefix)
    _check_attached(pools, prefix)
    for copy in copies:
        if pools[copy.group].refs[copy.dst] < 1:
            _fail(f"group {copy.group}: a copy into block {copy.dst} is due, but nobody holds that block")


def _fail(what: str) -> None:
    raise BlockManagerError(f"the block manager is inconsistent: {what}; this is a defect, report it")


def _check_places(g: int, pool: BlockPool) -> None:
    """Every block but the pad block is free, cached or used, and in one place only."""
    places = np.zeros(pool.num_blocks, np.int32)
    np.add.at(places, pool.free_blocks, 1)
    np.add.at(places, np.fromiter(pool.cached, np.int32, len(pool.cached)), 1)
    places += pool.refs > 0
    if places[pool.pad_block]:
        _fail(f"group {g}: pad block {pool.pad_block} is in use or free; it must be neither")
    places[pool.pad_block] = 1
    for block in np.flatnonzero(places != 1).tolist():
        _fail(f"group {g}: block {block} is in {places[block]} of free, cached, used; it must be in one")
    if pool.hittable[pool.free_blocks].any():
        _fail(f"group {g}: a free block is marked hittable")
    for block in pool.cached:
        if not pool.hittable[block]:
            _fail(f"group {g}: block {block} is cached but cannot be hit")


def _check_references(
    g: int, group: CacheGroup, slots: RequestSlots, pool: BlockPool, fenced: Sequence[tuple[int, Int32]]
) -> None:
    """Each block's count equals the references that exist."""
    counted = np.zeros(pool.num_blocks, np.int32)
    for fenced_group, ids in fenced:
        if fenced_group == g:
            np.add.at(counted, ids, 1)
    for slot in np.flatnonzero(slots.is_open).tolist():
        if group.kind != "state":
            first, end = slots.firsts[g][slot], slots.columns[g][slot]
            np.add.at(counted, slots.tables[g][slot, first:end], 1)
            continue
        live, source = int(slots.live[g][slot]), int(slots.source[g][slot])
        held = [live] if source in (-1, live) else [live, source]
        held += [state for reserved, _, state in slots.reserved[slot] if reserved == g]
        np.add.at(counted, held, 1)
    for block in np.flatnonzero(counted != pool.refs).tolist():
        _fail(
            f"group {g}: block {block} counts {pool.refs[block]} holders, but {counted[block]} "
            "references to it exist"
        )


def _check_tables(g: int, group: CacheGroup, slots: RequestSlots, pool: BlockPool) -> None:
    """Columns hold a block exactly where the request has one."""
    table, columns = slots.tables[g], np.arange(slots.tables[g].shape[1])
    inside = (columns >= slots.firsts[g][:, None]) & (columns < slots.columns[g][:, None])
    for slot, column in np.argwhere((table != pool.pad_block) != inside).tolist():
        _fail(
            f"group {g}: column {column} of request slot {slot} holds block {table[slot, column]}, but the "
            f"request has columns {slots.firsts[g][slot]} to {slots.columns[g][slot] - 1}"
        )
    if inside[~slots.is_open].any():
        _fail(f"group {g}: a closed request slot has blocks")
    if group.window is not None:
        seen = np.maximum(0, slots.reach - group.window + 1) // group.block_size
        for slot in np.flatnonzero(slots.firsts[g] > seen).tolist():
            _fail(f"group {g}: request slot {slot} gave back blocks that its next token sees")


def _check_capacity(groups: Sequence[CacheGroup], geometry: Geometry, slots: RequestSlots) -> None:
    capacity = np.where(slots.is_open, UNLIMITED, 0)
    for g in geometry.blocks:
        capacity = np.minimum(capacity, slots.columns[g] * groups[g].block_size)
    for slot in np.flatnonzero((capacity != slots.capacity) | (slots.reach > capacity)).tolist():
        _fail(
            f"request slot {slot} has room for {capacity[slot]} tokens, counts {slots.capacity[slot]}, "
            f"and was granted {slots.reach[slot]}"
        )


def _check_nodes(slots: RequestSlots, prefix: PrefixCache) -> None:
    """Hashes, parents and holders of the prefix tree."""
    children: dict[int, int] = {}
    for node in prefix.nodes.values():
        if node.parent is not None:
            children[id(node.parent)] = children.get(id(node.parent), 0) + 1
    holders: dict[int, int] = {}
    for held in slots.nodes:
        if held is not None:
            holders[id(held)] = holders.get(id(held), 0) + 1
            if prefix.nodes.get(held.digest) is not held:
                _fail("a request continues from a prefix that is not known")
    for digest, node in prefix.nodes.items():
        _check_node(digest, node, prefix)
        found = (node.children, node.holders, node.attached)
        wanted = (
            children.get(id(node), 0),
            holders.get(id(node), 0),
            sum(block >= 0 for block in node.blocks),
        )
        if found != wanted or not any(wanted):
            _fail(f"a prefix counts {found} children, holders and blocks; it has {wanted}, not all 0")


def _check_node(digest: bytes, node: Node, prefix: PrefixCache) -> None:
    parent = node.parent
    if node.digest != digest or digest != chain_digest(
        prefix.key, parent.digest if parent is not None else b"", node.data
    ):
        _fail("a prefix is kept under another hash than its own")
    if parent is not None and prefix.nodes.get(parent.digest) is not parent:
        _fail("a prefix outlived the one before it")
    if prefix.bound_group is not None and node.blocks[prefix.bound_group] < 0:
        for g in prefix.state_groups:
            if node.blocks[g] >= 0:
                _fail(f"group {g}: checkpoint {node.blocks[g]} outlived the block it is bound to")


def _check_attached(pools: Sequence[BlockPool], prefix: PrefixCache) -> None:
    """Nodes and pools name the same blocks as hittable."""
    for g, pool in enumerate(pools):
        for block, node in prefix.owners[g].items():
            if node.blocks[g] != block or prefix.nodes.get(node.digest) is not node:
                _fail(f"group {g}: block {block} and its prefix do not name each other")
        marked = set(np.flatnonzero(pool.hittable).tolist())
        if marked != set(prefix.owners[g]):
            _fail(f"group {g}: blocks {sorted(marked ^ set(prefix.owners[g]))} are hittable by one book only")
