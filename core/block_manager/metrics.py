"""Figures of all pools."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.block_manager.pool import BlockPool
from core.block_manager.records import BlockMetrics, CacheGroup, GroupMetrics
from core.block_manager.slots import RequestSlots


def measure(
    groups: Sequence[CacheGroup],
    slots: RequestSlots,
    pools: Sequence[BlockPool],
    *,
    query_tokens: int,
    hit_tokens: int,
) -> BlockMetrics:
    """Each group's figures and their sums."""
    found = tuple(_measure_group(group, g, slots, pools[g]) for g, group in enumerate(groups))
    return BlockMetrics(
        groups=found,
        total=sum(g.total for g in found),
        used=sum(g.used for g in found),
        shared=sum(g.shared for g in found),
        cached=sum(g.cached for g in found),
        free=sum(g.free for g in found),
        wasted_slots=sum(g.wasted_slots for g in found),
        query_tokens=query_tokens,
        hit_tokens=hit_tokens,
    )


def _measure_group(group: CacheGroup, g: int, slots: RequestSlots, pool: BlockPool) -> GroupMetrics:
    wasted = 0
    if group.kind != "state":
        room = slots.columns[g][slots.is_open] * group.block_size
        wasted = int((room - slots.reach[slots.is_open]).sum())
    total = group.num_blocks - 1
    return GroupMetrics(
        kind=group.kind,
        total=total,
        used=total - pool.num_available,
        shared=int(np.count_nonzero(pool.refs > 1)),
        cached=len(pool.cached),
        free=pool.num_free,
        wasted_slots=wasted,
    )
