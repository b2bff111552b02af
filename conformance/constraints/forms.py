"""What each vendor's attention takes, and that attention in NumPy, written from it alone.

A form is derived from a step by `core.contract.derive`, whose functions know forms and no vendors; here they
get the vendor's names. Its `attend` sees the form, the step's queries, keys and values and the pools, writes
the new entries where the form says, and attends; it sees neither batch nor plan. Arithmetic is float64.

Letters as everywhere: T tokens, R rows, B blocks per row, Z block size, N query and K key heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core.contract import derive
from core.contract.batch import Int32, StepBatch

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """One layer's cache. keys [blocks, Z, K, H], values [blocks, Z, K, Hv], written in place."""

    keys: Float
    values: Float

    @property
    def block_size(self) -> int:
        """Z."""
        return int(self.keys.shape[1])

    def write(self, slots: Any, k: Float, v: Float) -> None:
        """Entries k [n, K, H], v [n, K, Hv] at slots [n]: block * Z + offset."""
        at = np.divmod(np.asarray(slots), self.block_size)
        self.keys[at], self.values[at] = k, v

    def read(self, blocks: Any, count: int) -> tuple[Float, Float]:
        """The first `count` entries of blocks laid end to end."""
        blocks = np.asarray(blocks)[: -(-count // self.block_size)]
        keys, values = self.keys[blocks], self.values[blocks]
        return keys.reshape(-1, *keys.shape[2:])[:count], values.reshape(-1, *values.shape[2:])[:count]


@dataclass(frozen=True)
class Inputs:
    """Of one layer in one step: q [T, N, H], k [T, K, H], v [T, K, Hv], and the factor on q . k."""

    q: Float
    k: Float
    v: Float
    scale: float

    def empty(self) -> Float:
        """Where results go: [T, N, Hv], NaN until they come."""
        return np.full((*self.q.shape[:2], self.v.shape[-1]), np.nan)


class Form(Protocol):
    """The metadata of one step for one cache group, as a kernel takes it."""

    def attend(self, x: Inputs, pool: Pool) -> Float:
        """Write, then attend: [T, N, Hv]; padding is left as it is."""


def causal(q: Float, keys: Float, values: Float, scale: float) -> Float:
    """q [n, N, H] are the last n of keys [L, K, H]; values [L, K, Hv] -> [n, N, Hv]."""
    seen = len(keys) - len(q) + 1 + np.arange(len(q))
    return np.stack([weigh(x, keys[:n], values[:n], scale) for x, n in zip(q, seen, strict=True)])


def weigh(q: Float, keys: Float, values: Float, scale: float) -> Float:
    """One query [N, H] over all of keys [L, K, H], values [L, K, Hv] -> [N, Hv]."""
    group = len(q) // keys.shape[1]
    keys, values = keys.repeat(group, 1), values.repeat(group, 1)
    scores = scale * np.einsum("nh,lnh->nl", q, keys)
    p = np.exp(scores - scores.max(1, keepdims=True))
    found: Float = np.einsum("nl,lnh->nh", p, values) / p.sum(1)[:, None]
    return found


@dataclass(frozen=True)
class VarlenPaged:
    """CUDA: packed rows with cumulative lengths, a dense block table and slots.

    cu_seqlens_q [R + 1], seqused_k [R], block_table [R, B], slot_mapping [T]; the longest row's queries and
    keys, beyond which no work is launched.
    """

    cu_seqlens_q: Int32
    seqused_k: Int32
    max_seqlen_q: int
    max_seqlen_k: int
    block_table: Int32
    slot_mapping: Int32

    @staticmethod
    def of(batch: StepBatch, group: int) -> VarlenPaged:
        """Of a step."""
        form = derive.cumulative_lengths(batch)
        keys = np.diff(form.key_start).astype(np.int32)
        return VarlenPaged(
            form.query_start,
            keys,
            form.max_query,
            form.max_keys,
            batch.block_table(group).copy(),
            batch.slots(group).copy(),
        )

    def attend(self, x: Inputs, pool: Pool) -> Float:
        """See `Form`."""
        pool.write(self.slot_mapping, x.k, x.v)
        out = x.empty()
        for r, length in enumerate(self.seqused_k):
            first, end = self.cu_seqlens_q[r : r + 2]
            if end > first:
                keys, values = pool.read(self.block_table[r], min(int(length), self.max_seqlen_k))
                out[first:end] = causal(x.q[first:end][: self.max_seqlen_q], keys, values, x.scale)
        return out


@dataclass(frozen=True)
class RaggedPages:
    """TPU: the block table in one row, and the runs of rows of one kind. The kernel writes by itself.

    kv_lens [S], page_indices [S * P], cu_q_lens [S + 1], distribution [3]: rows before distribution[0] have
    one query; rows at or past distribution[2] are padding.
    """

    kv_lens: Int32
    page_indices: Int32
    cu_q_lens: Int32
    distribution: Int32

    @staticmethod
    def of(batch: StepBatch, group: int) -> RaggedPages:
        """Of a step."""
        form = derive.flat_pages(batch, group)
        return RaggedPages(form.key_lens, form.pages, form.query_start, form.distribution)

    def attend(self, x: Inputs, pool: Pool) -> Float:
        """See `Form`."""
        out, Z = x.empty(), pool.block_size
        width = len(self.page_indices) // len(self.kv_lens)
        decodes, _, rows = self.distribution
        for r in range(rows):
            first = int(self.cu_q_lens[r])
            end = first + 1 if r < decodes else int(self.cu_q_lens[r + 1])
            pages, length = self.page_indices[r * width : (r + 1) * width], int(self.kv_lens[r])
            at = np.arange(length - (end - first), length)
            pool.write(pages[at // Z] * Z + at % Z, x.k[first:end], x.v[first:end])
            out[first:end] = causal(x.q[first:end], *pool.read(pages, length), x.scale)
        return out


@dataclass(frozen=True)
class FlatDecode:
    """Gaudi, decode: every block that is read, with its owner and how much of it counts.

    block_list, block_groups, block_usage [n]; block_mapping [n, R], one-hot rows, 0 in padding;
    slot_mapping [R].
    """

    block_list: Int32
    block_groups: Int32
    block_usage: Int32
    block_mapping: Float
    slot_mapping: Int32

    @staticmethod
    def of(batch: StepBatch, group: int) -> FlatDecode:
        """Of a decode step."""
        form = derive.flat_blocks(batch, group)
        R = batch.bucket.requests
        mapping = (form.block_groups[:, None] == np.arange(R)).astype(np.float64)
        return FlatDecode(
            form.block_list, form.block_groups, form.block_usage, mapping, batch.slots(group).copy()
        )

    def attend(self, x: Inputs, pool: Pool) -> Float:
        """See `Form`. Scores per block; softmax is joined over the blocks of a group."""
        pool.write(self.slot_mapping, x.k, x.v)
        heads = x.q.shape[1] // pool.keys.shape[2]
        keys, values = (y[self.block_list].repeat(heads, 2) for y in (pool.keys, pool.values))
        is_used = (np.arange(pool.block_size) < self.block_usage[:, None])[..., None]  # [n, Z, 1]
        is_used = is_used & (self.block_groups >= 0)[:, None, None]
        values = np.where(is_used[..., None], values, 0)
        q = np.einsum("br,rnh->bnh", self.block_mapping, x.q)
        scores = x.scale * np.einsum("bnh,bznh->bzn", q, keys)
        scores = np.where(is_used, scores, -np.inf)
        block_top = scores.max(1)  # [n, N]
        top = np.full((x.q.shape[0], x.q.shape[1]), -np.inf)
        real = self.block_groups >= 0
        np.maximum.at(top, self.block_groups[real], block_top[real])
        shift = np.where(real[:, None], top[self.block_groups], 0)[:, None]
        p = np.exp(scores - shift)
        total = np.einsum("br,bzn->rn", self.block_mapping, p)
        out = np.einsum("br,bzn,bznh->rnh", self.block_mapping, p, values)
        with np.errstate(invalid="ignore"):
            found: Float = out / total[..., None]
        return found


@dataclass(frozen=True)
class PaddedPrompts:
    """Gaudi, prefill: prompts as a rectangle padded on the right; the context comes from blocks, in front.

    tokens [R, S] where each query lies among the step's tokens, -1 in padding; slot_mapping [R * S];
    valid_seq_lengths, context_lens [R]; context_blocks [R, B].
    """

    tokens: Int32
    slot_mapping: Int32
    valid_seq_lengths: Int32
    context_lens: Int32
    context_blocks: Int32

    @staticmethod
    def of(batch: StepBatch, group: int) -> PaddedPrompts:
        """Of a prefill step."""
        form = derive.right_padded_rectangle(batch, group)
        return PaddedPrompts(
            form.tokens, form.slots.reshape(-1), form.query_lens, form.context_lens, form.table
        )

    def attend(self, x: Inputs, pool: Pool) -> Float:
        """See `Form`. New keys come from the step itself, so the cache is read before it is written."""
        out = x.empty()
        for r, n in enumerate(self.valid_seq_lengths):
            if n:
                at = self.tokens[r, :n]
                old_k, old_v = pool.read(self.context_blocks[r], int(self.context_lens[r]))
                keys, values = np.concatenate([old_k, x.k[at]]), np.concatenate([old_v, x.v[at]])
                out[at] = causal(x.q[at], keys, values, x.scale)
        tokens = self.tokens.reshape(-1)
        pool.write(self.slot_mapping, x.k[tokens], x.v[tokens])
        return out


@dataclass(frozen=True)
class HostLengths:
    """Ascend: packed rows (TND) whose lengths are lists of Python integers.

    actual_seq_lengths: ends of the rows' queries; actual_seq_lengths_kv: keys of each row; block_table
    [R, B] of the real rows, slot_mapping [T].
    """

    actual_seq_lengths: list[int]
    actual_seq_lengths_kv: list[int]
    block_table: Int32
    slot_mapping: Int32

    @staticmethod
    def of(batch: StepBatch, group: int) -> HostLengths:
        """Of a step."""
        form = derive.host_lists(batch)
        rows = len(form.key_lens)
        return HostLengths(
            form.query_ends, form.key_lens, batch.block_table(group)[:rows].copy(), batch.slots(group).copy()
        )

    def attend(self, x: Inputs, pool: Pool) -> Float:
        """See `Form`."""
        lengths = (*self.actual_seq_lengths, *self.actual_seq_lengths_kv)
        if any(type(n) is not int for n in lengths):
            raise TypeError("lengths on the host are Python integers")
        pool.write(self.slot_mapping, x.k, x.v)
        out, first = x.empty(), 0
        rows = zip(self.actual_seq_lengths, self.actual_seq_lengths_kv, self.block_table, strict=True)
        for end, length, blocks in rows:
            out[first:end] = causal(x.q[first:end], *pool.read(blocks, length), x.scale)
            first = end
        return out


@dataclass(frozen=True)
class LeftPaddedDecode:
    """Spyre, decode: rows of equal width, padded on the left with whole blocks of the pad block.

    block_table [R, W]; left_padded_prompt_mask [R] columns before a row's first key; current_tkv_mask [R]
    columns up to its last; slot_mapping [R].
    """

    block_table: Int32
    left_padded_prompt_mask: Int32
    current_tkv_mask: Int32
    slot_mapping: Int32

    @staticmethod
    def of(batch: StepBatch, group: int) -> LeftPaddedDecode:
        """Of a decode step; as wide as the bucket."""
        form = derive.left_padded_rectangle(batch, group, batch.bucket.widths[group])
        return LeftPaddedDecode(
            form.table, form.left_padding, form.positions + np.int32(1), batch.slots(group).copy()
        )

    def attend(self, x: Inputs, pool: Pool) -> Float:
        """See `Form`."""
        pool.write(self.slot_mapping, x.k, x.v)
        out = x.empty()
        for r, blocks in enumerate(self.block_table):
            first, end = int(self.left_padded_prompt_mask[r]), int(self.current_tkv_mask[r])
            if first < end:
                keys, values = pool.read(blocks, end)
                out[r] = weigh(x.q[r], keys[first:], values[first:], x.scale)
        return out


@dataclass(frozen=True)
class PromptChunk:
    """Spyre, prefill: one prompt's chunk, whole blocks long, read through its block table.

    tokens, slot_mapping [S], -1 and the pad block in padding; tkv: keys up to the chunk's last real token;
    block_table [B].
    """

    tokens: Int32
    slot_mapping: Int32
    tkv: int
    block_table: Int32

    @staticmethod
    def of(batch: StepBatch, group: int) -> PromptChunk:
        """Of a prefill step of one row.

        Raises:
            ValueError: it has several.
        """
        if batch.num_requests != 1:
            raise ValueError(f"a prefill step has {batch.num_requests} rows, but one is wanted")
        Z = batch.plan.groups[group].block_size
        form = derive.right_padded_rectangle(batch, group, -(-batch.bucket.max_query // Z) * Z)
        end = int(form.context_lens[0] + form.query_lens[0])
        return PromptChunk(form.tokens[0], form.slots[0], end, form.table[0])

    def attend(self, x: Inputs, pool: Pool) -> Float:
        """See `Form`."""
        pool.write(self.slot_mapping, x.k[self.tokens], x.v[self.tokens])
        out, at = x.empty(), self.tokens[self.tokens >= 0]
        out[at] = causal(x.q[at], *pool.read(self.block_table, self.tkv), x.scale)
        return out


Derive = Callable[[StepBatch, int], Form]


def split(batch: StepBatch, group: int) -> Form:
    """Of a step of either kind."""
    return (FlatDecode if batch.bucket.kind == "decode" else PaddedPrompts).of(batch, group)


def rectangular(batch: StepBatch, group: int) -> Form:
    """Of a step of either kind."""
    return (LeftPaddedDecode if batch.bucket.kind == "decode" else PromptChunk).of(batch, group)


FORMS: Mapping[str, Derive] = {
    "mixed": VarlenPaged.of,
    "static": RaggedPages.of,
    "split": split,
    "host-lists": HostLengths.of,
    "rectangular": rectangular,
}
"""By profile."""
