"""Geometry: how the cache groups of a plan relate to one another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.block_manager.errors import BlockManagerError
from core.block_manager.records import CacheGroup


@dataclass(frozen=True)
class Geometry:
    """Derived once from the groups.

    Attributes:
        blocks: indices of paged and window groups. windows, state: of window and of state groups.
        base_size: smallest block size; every other is a multiple of it.
        granularity: least common multiple of all block sizes; prefix hits are multiples of it.
        bound_group: the group whose blocks a state checkpoint lives and dies with; None = it stands alone.
    """

    blocks: tuple[int, ...]
    windows: tuple[int, ...]
    state: tuple[int, ...]
    base_size: int
    granularity: int
    bound_group: int | None

    @staticmethod
    def of(groups: tuple[CacheGroup, ...], max_requests: int, pad_block: int) -> Geometry:
        """Check the groups.

        Raises:
            BlockManagerError: names the group and the rule it breaks.
        """
        if not groups:
            raise BlockManagerError("a block manager needs at least one cache group")
        kinds = {kind: tuple(i for i, g in enumerate(groups) if g.kind == kind) for kind in _KINDS}
        bound = next(iter(kinds["paged"] + kinds["window"]), None)
        base_size = min(g.block_size for g in groups)
        for i, group in enumerate(groups):
            _check(i, group, base_size, max_requests, pad_block)
            if group.kind == "state" and bound is not None and group.block_size % groups[bound].block_size:
                raise BlockManagerError(
                    f"cache group {i} spaces checkpoints {group.block_size} tokens apart; it must be a "
                    f"multiple of the block size {groups[bound].block_size} of group {bound}"
                )
        return Geometry(
            blocks=tuple(i for i, g in enumerate(groups) if g.kind != "state"),
            windows=kinds["window"],
            state=kinds["state"],
            base_size=base_size,
            granularity=math.lcm(*(g.block_size for g in groups)),
            bound_group=bound,
        )


_KINDS = ("paged", "window", "state")


def _check(index: int, group: CacheGroup, base_size: int, max_requests: int, pad_block: int) -> None:
    name = f"cache group {index} ({group.kind})"
    if group.kind not in _KINDS:
        raise BlockManagerError(f"cache group {index} has kind {group.kind!r}; it must be one of {_KINDS}")
    if base_size < 1 or group.block_size % base_size:
        raise BlockManagerError(
            f"{name} has block size {group.block_size}; it must be a multiple of the smallest, {base_size}"
        )
    if (group.kind == "window") != (group.window is not None) or (group.window or 1) < 1:
        raise BlockManagerError(
            f"{name} has window {group.window}; window groups need one of at least 1, others take none"
        )
    smallest = max_requests + 1 if group.kind == "state" else 2
    if group.num_blocks < smallest or not 0 <= pad_block < group.num_blocks:
        raise BlockManagerError(
            f"{name} has {group.num_blocks} blocks and pad block {pad_block}; it needs at least {smallest}, "
            "one of which is the pad block"
        )
