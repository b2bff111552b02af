"""Which rows of a step are computed together, derived once per step however many layers ask.

A step's arrays lie in host memory here, so reading them costs nothing and nothing is computed for padding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from core.contract.batch import Step

MIN_SPAN = 256
"""Shorter rows are batched as if they had this many keys: below it a call costs more than the padding."""

Reach = tuple[int | None, int | None, bool]
"""(window, chunk, causal) of an AttentionSpec: all that decides which keys a query sees."""


class StepMemo:
    """Values derived from the step at hand; forgotten when the next step comes."""

    def __init__(self) -> None:
        self._step: Step | None = None
        self._values: dict[Hashable, Any] = {}

    def get(self, step: Step, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value for `key`, made by `make` when this step asks first."""
        if self._step is not step:
            self._step, self._values = step, {}
        if key not in self._values:
            self._values[key] = make()
        return self._values[key]


@dataclass(frozen=True)
class HostRows:
    """A step's real rows as Python integers. Row r's tokens are [start[r], start[r + 1])."""

    num_tokens: int
    start: list[int]
    seq_lens: list[int]

    @staticmethod
    def of(step: Step) -> HostRows:
        """Read them from the step."""
        num_tokens, num_rows = step.counts[:2].tolist()
        start, seq_lens = step.query_start[: num_rows + 1], step.seq_lens[:num_rows]
        return HostRows(num_tokens, start.tolist(), seq_lens.tolist())

    @property
    def num_rows(self) -> int:
        """Real rows."""
        return len(self.seq_lens)


@dataclass(frozen=True)
class Span:
    """Queries that attend together, as b sequences of n queries each over L keys.

    tokens: slice, or int64 [b] where n = 1: the queries.
    slots: int64 [b * L], where the keys lie in the cache; repeats one of the sequence's own keys in
        padding, so that memory of another sequence is never read.
    mask: bool [b, 1, n, L], which keys count; None = all.
    row: of the queries, where they are all of one row's; else None.
    causal: key j counts for query i where j <= i, in place of a mask (b = 1, n = L).
    """

    tokens: slice | torch.Tensor
    batch: int
    length: int
    slots: torch.Tensor
    mask: torch.Tensor | None
    row: int | None = None
    causal: bool = False


def spans(step: Step, rows: HostRows, group: int, reach: Reach) -> list[Span]:
    """Split the step's real rows: rows of one query by length, every other row by itself.

    Queries that see no key are in no span.
    """
    positions = step.positions[: rows.num_tokens].tolist()
    single, out = [], []
    for r, length in enumerate(rows.seq_lens):
        a, b = rows.start[r], rows.start[r + 1]
        if b - a == 1:
            single.append((a, r, *visible(positions[a], length, reach)))
        elif b > a:
            out.append(_whole_row(step, rows, group, reach, r))
    return out + batches(step, group, single)


def visible(position: int, length: int, reach: Reach) -> tuple[int, int]:
    """Range [low, high) of the keys that a query sees, of a sequence of `length`."""
    window, chunk, causal = reach
    low, high = 0, min(length, position + 1) if causal else length
    if window is not None:
        low = max(low, position - window + 1)
    if chunk is not None:
        low = max(low, position // chunk * chunk)
        high = min(high, (position // chunk + 1) * chunk)
    return low, high


def single_queries(step: Step, rows: HostRows, group: int, reach: Reach, row: int) -> list[Span]:
    """The queries of one row, each with the keys that it sees and no other."""
    a, b = rows.start[row], rows.start[row + 1]
    positions = step.positions[a:b].tolist()
    queries = [(a + i, row, *visible(p, rows.seq_lens[row], reach)) for i, p in enumerate(positions)]
    return [s for at in range(0, len(queries), 32) for s in batches(step, group, queries[at : at + 32])]


def batches(step: Step, group: int, queries: list[tuple[int, int, int, int]]) -> list[Span]:
    """Spans of single queries (token, row, low, high), those of similar length together."""
    by_size: dict[int, list[tuple[int, int, int, int]]] = {}
    for query in queries:
        size = query[3] - query[2]
        if size > 0:
            by_size.setdefault(max(size, MIN_SPAN).bit_length(), []).append(query)
    paged = step.paged(group)
    Z = paged.block_size
    out = []
    for batch in by_size.values():
        tokens, row, low, high = torch.tensor(batch, dtype=torch.int64).T
        longest = int((high - low).max())
        j = low[:, None] + torch.arange(longest)  # [b, L]
        mask = None
        if int((high - low).min()) < longest:
            mask = (j < high[:, None])[:, None, None, :]
            j = torch.minimum(j, high[:, None] - 1)
        slots = paged.block_table[row].gather(1, j // Z) * Z + j % Z
        out.append(Span(tokens, len(batch), longest, slots.flatten(), mask))
    return out


def _whole_row(step: Step, rows: HostRows, group: int, reach: Reach, row: int) -> Span:
    window, chunk, causal = reach
    tokens, length = slice(rows.start[row], rows.start[row + 1]), rows.seq_lens[row]
    first = int(step.positions[tokens.start])
    paged = step.paged(group)
    Z = paged.block_size
    low, _ = visible(first, length, reach)
    j = torch.arange(low, length)  # [L]
    slots = paged.block_table[row][j // Z].to(torch.int64) * Z + j % Z
    p = step.positions[tokens].to(torch.int64)[:, None]
    plain = window is None and chunk is None
    if plain and not causal:
        return Span(tokens, 1, len(j), slots, None, row)
    if plain and first == 0 and length == tokens.stop - tokens.start:
        return Span(tokens, 1, len(j), slots, None, row, causal=True)
    mask = j <= p if causal else torch.ones((len(p), len(j)), dtype=torch.bool)  # [n, L]
    if window is not None:
        mask &= p - j < window
    if chunk is not None:
        mask &= j // chunk == p // chunk
    return Span(tokens, 1, len(j), slots, mask[None, None], row)
