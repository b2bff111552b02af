"""RequestSlots: what the block manager knows of each request, as arrays indexed by request slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core.block_manager.pool import Int32
from core.block_manager.prefix_cache import Node
from core.block_manager.records import CacheGroup

UNLIMITED = np.iinfo(np.int32).max


class RequestSlots:
    """Arrays over R = max_requests; per group where a list.

    Attributes:
        is_open: bool [R].
        tables: int32 [R, B] of paged and window groups ([0, 0] of state groups); the pad block where a column
            is unused or has left the window.
        columns: columns in use, those that left the window included. firsts: first column that has not left.
        capacity: tokens that every group has room for; 0 while closed.
        opened_at: tokens that it had when it was opened or forked. reach: tokens that granted steps fill.
        tail: -1, or: tokens that the request had when it was last forked, so the block that holds the next
            one may need a private copy.
        committed: nodes of `base_size` tokens behind `nodes`, which is the last one committed; None = this
            request caches nothing (any more).
        live: the request's own state slot, -1 = none. source: the slot that its first step reads, -1 = zero
            state; the same as `live` once that step was waited for.
        reserved: checkpoints that submitted steps write: (group, tokens, state slot).
    """

    def __init__(
        self, groups: Sequence[CacheGroup], max_requests: int, max_model_len: int, pad_block: int
    ) -> None:
        R = max_requests
        self.is_open: npt.NDArray[np.bool_] = np.zeros(R, np.bool_)
        self.tables: list[Int32] = [
            np.zeros((0, 0), np.int32)
            if g.kind == "state"
            else np.full((R, -(-max_model_len // g.block_size)), pad_block, np.int32)
            for g in groups
        ]
        self.columns: list[Int32] = [np.zeros(R, np.int32) for _ in groups]
        self.firsts: list[Int32] = [np.zeros(R, np.int32) for _ in groups]
        self.capacity: Int32 = np.zeros(R, np.int32)
        self.reach: Int32 = np.zeros(R, np.int32)
        self.opened_at: Int32 = np.zeros(R, np.int32)
        self.tail: Int32 = np.full(R, -1, np.int32)
        self.committed: Int32 = np.zeros(R, np.int32)
        self.nodes: list[Node | None] = [None] * R
        self.live: list[Int32] = [np.full(R, -1, np.int32) for _ in groups]
        self.source: list[Int32] = [np.full(R, -1, np.int32) for _ in groups]
        self.reserved: list[list[tuple[int, int, int]]] = [[] for _ in range(R)]

    def close(self, slot: int) -> None:
        """Forget the request's figures; its table rows and state slots were given back before."""
        self.is_open[slot] = False
        for figures in (self.capacity, self.opened_at, self.reach, self.committed):
            figures[slot] = 0
        self.tail[slot] = -1
        self.nodes[slot] = None
        self.reserved[slot] = []
        for columns, firsts, live, source in zip(
            self.columns, self.firsts, self.live, self.source, strict=True
        ):
            columns[slot] = firsts[slot] = 0
            live[slot] = source[slot] = -1
