"""Pure functions from a StepBatch to every page-table form that attention kernels take.

Each form is a frozen record named by what it is. Arrays are new, int32 unless said otherwise, and shaped by
the bucket (R rows, B table columns of the group, Z its block size), so that a bucket's shapes never change.
Row r's queries are tokens [query_start[r], query_start[r + 1]) of the step, its keys are the `seq_lens[r]`
entries of its blocks, this step's included; causal order and the window within them are the kernel's to
apply, but for the decode forms, which say exactly which keys count. A padded row has no query and no key.
Block 0 is the pad block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.contract.batch import PREFILL, VERIFY, Int32, StepBatch


@dataclass(frozen=True)
class CumulativeLengths:
    """Queries and keys of all rows laid end to end, for kernels over packed rows.

    Attributes:
        query_start: [R + 1]; padded rows repeat the number of real tokens.
        key_start: [R + 1]; row r's keys are [key_start[r], key_start[r + 1]) of the packed keys.
        max_query, max_keys: of the longest real row; 0 in an empty step.
    """

    query_start: Int32
    key_start: Int32
    max_query: int
    max_keys: int


@dataclass(frozen=True)
class CsrPages:
    """Each row's pages in one list, with row pointers.

    Attributes:
        query_start: [R + 1], as in `CumulativeLengths`.
        indptr: [R + 1]; row r's pages are indices[indptr[r] : indptr[r + 1]], oldest first.
        indices: [R * B]; the pad block past indptr[R].
        last_len: [R]; keys in the row's last page, 1 to Z; 0 for padded rows.
    """

    query_start: Int32
    indptr: Int32
    indices: Int32
    last_len: Int32


@dataclass(frozen=True)
class FlatBlocks:
    """Decode as a list of blocks with their owners; softmax is joined over blocks of equal group.

    Blocks that lie wholly outside the group's window are left out.

    Attributes:
        block_list: [N] block ids; 0 in padding.
        block_groups: [N] row that reads the block; -1 in padding.
        block_first: [N] offset of the first key that counts; 0 in padding.
        block_usage: [N] offset after the last key that counts; 1 in padding, so that no softmax is empty.
    """

    block_list: Int32
    block_groups: Int32
    block_first: Int32
    block_usage: Int32


@dataclass(frozen=True)
class HostLists:
    """Lengths of the real rows as Python integers, for kernels whose launch needs them on the host.

    Attributes:
        query_ends: cumulative query lengths, without a leading 0.
        key_lens: keys of each row.
    """

    query_ends: list[int]
    key_lens: list[int]


@dataclass(frozen=True)
class FlatPages:
    """The block table as one row of pages, for kernels that index it by row * B + column.

    Attributes:
        pages: [R * B]. key_lens: [R]; 0 for padded rows. query_start: [R + 1], as in `CumulativeLengths`.
        distribution: [3] ends of three runs of rows: one query each; prefill chunks; any kind. The second run
            is empty where verify rows lie between, since they come before prefill rows.
    """

    pages: Int32
    key_lens: Int32
    query_start: Int32
    distribution: Int32


@dataclass(frozen=True)
class LeftPaddedRectangle:
    """Decode rows as a rectangle of W blocks: each padded on the left with whole pad blocks.

    Attributes:
        table: [R, W].
        left_padding: [R] tokens of padding before the row's first key; W * Z for padded rows.
        positions: [R] column of the row's query, in [0, W * Z); the last one for padded rows.
        mask: bool [R, W * Z], keys that count, the group's window included. For padded rows the last column,
            so that no softmax is empty.
    """

    table: Int32
    left_padding: Int32
    positions: Int32
    mask: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RightPaddedRectangle:
    """Rows as a rectangle of S queries, padded on the right, with the context that their blocks hold already.

    Attributes:
        tokens: [R, S] index of the query among the step's tokens; -1 in padding.
        slots: [R, S] where the query's entry is written; 0, in the pad block, in padding.
        query_lens: [R] queries of the row; 0 for padded rows.
        context_lens: [R] keys before the row's first query; 0 for padded rows.
        table: [R, B].
    """

    tokens: Int32
    slots: Int32
    query_lens: Int32
    context_lens: Int32
    table: Int32


def cumulative_lengths(batch: StepBatch) -> CumulativeLengths:
    """Row pointers over packed queries and packed keys."""
    queries, keys = _query_lens(batch), _key_lens(batch)
    return CumulativeLengths(
        _starts(queries), _starts(keys), int(queries.max(initial=0)), int(keys.max(initial=0))
    )


def csr_pages(batch: StepBatch, group: int) -> CsrPages:
    """Row pointers over one list of pages, for a paged or window group.

    Columns that a window has freed hold the pad block, and stay in the list: a page's place tells its
    position.
    """
    keys, Z = _key_lens(batch), batch.plan.groups[group].block_size
    table = batch.block_table(group)
    num_pages = -(-keys // Z)
    indptr = _starts(num_pages)
    indices = np.zeros(table.size, np.int32)
    held = np.arange(table.shape[1]) < num_pages[:, None]
    indices[: indptr[-1]] = table[held]
    last_len = np.where(keys > 0, (keys - 1) % Z + 1, 0).astype(np.int32)
    return CsrPages(_starts(_query_lens(batch)), indptr, indices, last_len)


def flat_blocks(batch: StepBatch, group: int, size: int | None = None) -> FlatBlocks:
    """Blocks with owners, for a decode step over a paged or window group.

    Args:
        size: N, entries with padding; None = R * B.

    Raises:
        ValueError: a row has several queries, or `size` is too small.
    """
    _check_decode(batch, "flat_blocks")
    table, Z = batch.block_table(group), batch.plan.groups[group].block_size
    low, keys = _first_keys(batch, group), _key_lens(batch)
    begin = np.arange(table.shape[1]) * Z  # [B]
    used = (begin < keys[:, None]) & (begin + Z > low[:, None])  # [R, B]
    rows, columns = np.nonzero(used)
    size = table.size if size is None else size
    if len(rows) > size:
        raise ValueError(f"flat_blocks: the step reads {len(rows)} blocks but size is {size}; raise it")
    out = FlatBlocks(
        np.zeros(size, np.int32),
        np.full(size, -1, np.int32),
        np.zeros(size, np.int32),
        np.ones(size, np.int32),
    )
    n = len(rows)
    out.block_list[:n] = table[rows, columns]
    out.block_groups[:n] = rows
    out.block_first[:n] = np.maximum(low[rows] - begin[columns], 0)
    out.block_usage[:n] = np.minimum(keys[rows] - begin[columns], Z)
    return out


def host_lists(batch: StepBatch) -> HostLists:
    """Lengths of the real rows, for kernels that take them as host integers."""
    R = batch.num_requests
    return HostLists(batch.query_start[1 : R + 1].tolist(), batch.seq_lens[:R].tolist())


def flat_pages(batch: StepBatch, group: int) -> FlatPages:
    """The block table in one row, with the runs of equal kinds, for a paged or window group."""
    R = batch.num_requests
    kinds, queries = batch.query_kind[:R], _query_lens(batch)[:R]
    first_other = np.flatnonzero((kinds == PREFILL) | (queries != 1))
    decodes = int(first_other[0]) if len(first_other) else R
    prefills = decodes if (kinds[decodes:] == VERIFY).any() else R
    return FlatPages(
        batch.block_table(group).reshape(-1).copy(),
        _key_lens(batch),
        _starts(_query_lens(batch)),
        np.array([decodes, prefills, R], np.int32),
    )


def left_padded_rectangle(batch: StepBatch, group: int, width: int | None = None) -> LeftPaddedRectangle:
    """Rows of equal width, for a decode step over a paged or window group.

    Args:
        width: W, blocks of each row; None = those of the longest row, at least 1.

    Raises:
        ValueError: a row has several queries, or `width` is too small.
    """
    _check_decode(batch, "left_padded_rectangle")
    table, Z = batch.block_table(group), batch.plan.groups[group].block_size
    keys = _key_lens(batch)
    num_pages = -(-keys // Z)
    longest = max(1, int(num_pages.max(initial=0)))
    W = longest if width is None else width
    if longest > W:
        raise ValueError(f"left_padded_rectangle: a row has {longest} blocks but width is {W}; raise it")
    padding = ((W - num_pages) * Z).astype(np.int32)
    column = np.arange(W) - (W - num_pages)[:, None]  # [R, W], of the row's own table
    inside = np.take_along_axis(table, np.clip(column, 0, table.shape[1] - 1), axis=1)
    j = np.arange(W * Z) - padding[:, None]  # [R, W * Z], position in the row's sequence
    mask = (j >= _first_keys(batch, group)[:, None]) & (j < keys[:, None])
    mask[keys == 0, -1] = True
    positions = np.where(keys > 0, padding + keys - 1, W * Z - 1).astype(np.int32)
    return LeftPaddedRectangle(np.where(column >= 0, inside, 0).astype(np.int32), padding, positions, mask)


def right_padded_rectangle(batch: StepBatch, group: int, length: int | None = None) -> RightPaddedRectangle:
    """Rows of equal length, for kernels without packed rows; for a paged or window group.

    Columns that a window has freed hold the pad block, and stay in the table: a column tells its position.

    Args:
        length: S, queries of each row; None = the bucket's `max_query`.

    Raises:
        ValueError: `length` is too small.
    """
    queries = _query_lens(batch)
    longest = int(queries.max(initial=0))
    S = batch.bucket.max_query if length is None else length
    if longest > S:
        raise ValueError(f"right_padded_rectangle: a row has {longest} queries but length is {S}; raise it")
    i = np.arange(S)
    is_real = i < queries[:, None]  # [R, S]
    tokens = np.where(is_real, batch.query_start[:-1, None] + i, -1).astype(np.int32)
    slots = np.where(is_real, batch.slots(group)[tokens], 0).astype(np.int32)
    return RightPaddedRectangle(
        tokens, slots, queries, _key_lens(batch) - queries, batch.block_table(group).copy()
    )


def _query_lens(batch: StepBatch) -> Int32:
    """[R]; 0 for padded rows, those of a decode bucket too."""
    out = np.zeros(batch.bucket.requests, np.int32)
    out[: batch.num_requests] = np.diff(batch.query_start[: batch.num_requests + 1])
    return out


def _key_lens(batch: StepBatch) -> Int32:
    """[R]; 0 for padded rows."""
    return batch.seq_lens.copy()


def _first_keys(batch: StepBatch, group: int) -> Int32:
    """[R] position of the first key that a decode row's query sees."""
    window = batch.plan.groups[group].window
    keys = _key_lens(batch)
    return np.zeros_like(keys) if window is None else np.maximum(keys - np.int32(window), 0)


def _starts(lens: Int32) -> Int32:
    """[R] -> [R + 1], cumulative from 0."""
    out = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=out[1:])
    return out


def _check_decode(batch: StepBatch, form: str) -> None:
    longest = int(_query_lens(batch).max(initial=0))
    if longest > 1:
        raise ValueError(
            f"{form}: a row has {longest} queries, but this form serves rows of one query; use a form with "
            "query_start for other steps"
        )
