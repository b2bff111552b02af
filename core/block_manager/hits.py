"""How much of a known prefix every cache group can serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.block_manager.prefix_cache import Node
from core.block_manager.records import CacheGroup, PrefixHit


def longest_hit(
    groups: Sequence[CacheGroup],
    path: Sequence[Node],
    *,
    base_size: int,
    granularity: int,
    max_tokens: int,
    is_readable: Callable[[int, int], bool],
) -> PrefixHit:
    """The longest prefix along `path` that all groups have: the minimum over the groups.

    Full attention needs every block; a window those that a query right after the prefix sees; a state group
    a checkpoint at exactly the end.

    Args:
        path: known nodes of the prompt, `base_size` tokens each. granularity: the hit is a multiple of it.
        is_readable: whether a state group's checkpoint slot can be pinned now.
    """
    longest = min(len(path) * base_size, max_tokens) // granularity * granularity
    runs = [_runs(g, i, path, base_size) for i, g in enumerate(groups)]
    for length in range(longest, 0, -granularity):
        node = path[length // base_size - 1]
        if all(_has(g, i, runs[i], node, length, is_readable) for i, g in enumerate(groups)):
            return _collect(groups, path, node, length, base_size)
    return PrefixHit()


def _runs(group: CacheGroup, index: int, path: Sequence[Node], base_size: int) -> list[int]:
    """Per table column: how many known blocks in a row end there."""
    if group.kind == "state":
        return []
    step, run, runs = group.block_size // base_size, 0, []
    for node in path[step - 1 :: step]:
        run = run + 1 if node.blocks[index] >= 0 else 0
        runs.append(run)
    return runs


def _has(
    group: CacheGroup,
    index: int,
    runs: list[int],
    node: Node,
    length: int,
    is_readable: Callable[[int, int], bool],
) -> bool:
    if group.kind == "state":
        return node.blocks[index] >= 0 and is_readable(index, node.blocks[index])
    columns = length // group.block_size
    return runs[columns - 1] >= columns - group.first_visible(length)


def _collect(
    groups: Sequence[CacheGroup], path: Sequence[Node], end: Node, length: int, base_size: int
) -> PrefixHit:
    firsts: list[int] = []
    blocks: list[tuple[int, ...]] = []
    for i, group in enumerate(groups):
        if group.kind == "state":
            firsts.append(0)
            blocks.append((end.blocks[i],))
            continue
        step, first = group.block_size // base_size, group.first_visible(length)
        firsts.append(first)
        ends = path[(first + 1) * step - 1 : length // base_size : step]
        blocks.append(tuple(node.blocks[i] for node in ends))
    return PrefixHit(length, end, tuple(firsts), tuple(blocks))
