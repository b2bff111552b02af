"""One step's input: StepBatch on the host, Step on the device, and the layout that both share.

The host side is one flat int32 buffer with a named view per field, so a step needs one copy in, graphs have
fixed addresses and jit gets one argument. Fields of a layout, in order (T, R, B as in the bucket, g a cache
group):

| field | shape | meaning; value in padding |
|---|---|---|
| counts | [4] | real tokens, real rows, decode rows, sampled rows |
| token_ids | [T] | input ids; 0 |
| token_source | [T] | -1, or the request slot whose `last` token replaces the id; -1 |
| positions | [T] | index of the token in its sequence; 0 |
| row_of_token | [T] | row that the token belongs to; R (in a decode bucket: t) |
| query_start | [R + 1] | row r's tokens are [query_start[r], query_start[r + 1]); the last one (decode: r) |
| seq_lens | [R] | tokens of the row's sequence, this step's included; 0 |
| request_slots | [R] | the row's slot; max_requests |
| query_kind | [R] | 0 decode, 1 verify, 2 prefill; 0. Decode and verify rows come first |
| sample_rows | [R] | token index whose logits are sampled; 0 |
| sample_slots | [R] | where in `last` the sampled token goes; max_requests |
| block_tables.g | [R, B] | block ids, the pad block beyond the row's end and where a window left; 0 |
| slots.g | [T] | block id * block size + offset, where the token's entry is written; 0, in the pad block |
| state_read.g | [R] | state slot that the row continues from, -1 = zero state; -1 |
| state_write.g | [R] | state slot for the state after the row's last token; 0 |
| checkpoint_offset.g | [R] | 0, or: the state after that many of the row's tokens is also stored; 0 |
| checkpoint_slot.g | [R] | in this slot; 0 |
| adapter_slots | [R] | for `batch.adapters`; 0 |
| prefix_group | [R] | for `batch.prefix_groups`: first row of the run that shares leading blocks; 0 |
| prefix_blocks | [R] | and how many blocks of group 0 the run shares; 0 |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.spec import BatchRules
from core.contract.types import Array, Bucket, CachePlan

Int32 = npt.NDArray[np.int32]

DECODE, VERIFY, PREFILL = 0, 1, 2


@dataclass(frozen=True)
class Field:
    """A field's place in the flat buffer: offset and shape, in int32 elements, and what padding holds."""

    name: str
    offset: int
    shape: tuple[int, ...]
    padding: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class StepLayout:
    """Where each field of a bucket's StepBatch lies. Hashable: may be a compiler's static argument."""

    bucket: Bucket
    fields: tuple[Field, ...]
    size: int

    @staticmethod
    def of(bucket: Bucket, plan: CachePlan, rules: BatchRules) -> StepLayout:
        """The layout of `bucket` for these caches; optional fields are there when `rules` declare them."""
        T, R = bucket.tokens, bucket.requests
        rows: list[tuple[str, tuple[int, ...], int]] = [
            ("counts", (4,), 0),
            ("token_ids", (T,), 0),
            ("token_source", (T,), -1),
            ("positions", (T,), 0),
            ("row_of_token", (T,), R),
            ("query_start", (R + 1,), 0),
            ("seq_lens", (R,), 0),
            ("request_slots", (R,), plan.max_requests),
            ("query_kind", (R,), 0),
            ("sample_rows", (R,), 0),
            ("sample_slots", (R,), plan.max_requests),
        ]
        for g, group in enumerate(plan.groups):
            if group.kind == "state":
                rows += [(f"state_read.{g}", (R,), -1), (f"state_write.{g}", (R,), 0)]
                rows += [(f"checkpoint_offset.{g}", (R,), 0), (f"checkpoint_slot.{g}", (R,), 0)]
            else:
                rows += [(f"block_tables.{g}", (R, bucket.widths[g]), 0), (f"slots.{g}", (T,), 0)]
        if rules.adapters:
            rows.append(("adapter_slots", (R,), 0))
        if rules.prefix_groups:
            rows += [("prefix_group", (R,), 0), ("prefix_blocks", (R,), 0)]
        fields, at = [], 0
        for name, shape, padding in rows:
            fields.append(Field(name, at, shape, padding))
            at += int(np.prod(shape))
        return StepLayout(bucket, tuple(fields), at)

    def views(self, flat: Array) -> dict[str, Array]:
        """Named views of a flat array of any framework, by slicing and `reshape`."""
        return {f.name: flat[f.offset : f.offset + f.size].reshape(f.shape) for f in self.fields}

    def clear(self, flat: Int32) -> None:
        """Fill the host buffer with padding."""
        for f in self.fields:
            flat[f.offset : f.offset + f.size] = f.padding
        if self.bucket.kind == "decode":
            rows = np.arange(self.bucket.requests + 1, dtype=np.int32)
            views = self.views(flat)
            views["row_of_token"][:] = rows[:-1]
            views["query_start"][:] = rows


@dataclass(frozen=True)
class StepBatch:
    """One step, on the host. Filled by the runner; read by backends; not touched until its step was waited
    for.

    Attributes:
        step_id: ascending by one. num_tokens, num_requests, num_decodes, num_samples: real counts, the rest
            is padding.
        flat: int32 [layout.size], the device's host buffer. The views below share its memory.
        input_embeds: float32 [num_tokens, D] in place of ids (backends that declare `batch.input_embeds`).
    """

    step_id: int
    layout: StepLayout
    plan: CachePlan
    flat: Int32
    num_tokens: int
    num_requests: int
    num_decodes: int
    num_samples: int
    input_embeds: npt.NDArray[np.float32] | None = None

    @property
    def bucket(self) -> Bucket:
        """The static shape."""
        return self.layout.bucket

    @cached_property
    def views(self) -> Mapping[str, Int32]:
        """Every field of the layout by name."""
        return self.layout.views(self.flat)

    @property
    def token_ids(self) -> Int32:
        """[T]"""
        return self.views["token_ids"]

    @property
    def token_source(self) -> Int32:
        """[T]"""
        return self.views["token_source"]

    @property
    def positions(self) -> Int32:
        """[T]"""
        return self.views["positions"]

    @property
    def row_of_token(self) -> Int32:
        """[T]"""
        return self.views["row_of_token"]

    @property
    def query_start(self) -> Int32:
        """[R + 1]"""
        return self.views["query_start"]

    @property
    def seq_lens(self) -> Int32:
        """[R]"""
        return self.views["seq_lens"]

    @property
    def request_slots(self) -> Int32:
        """[R]"""
        return self.views["request_slots"]

    @property
    def query_kind(self) -> Int32:
        """[R]"""
        return self.views["query_kind"]

    @property
    def sample_rows(self) -> Int32:
        """[R]"""
        return self.views["sample_rows"]

    @property
    def sample_slots(self) -> Int32:
        """[R]"""
        return self.views["sample_slots"]

    def block_table(self, group: int) -> Int32:
        """[R, B] of a paged or window group."""
        return self.views[f"block_tables.{group}"]

    def slots(self, group: int) -> Int32:
        """[T] of a paged or window group."""
        return self.views[f"slots.{group}"]


@dataclass(frozen=True)
class PagedStep:
    """A paged or window group's fields on the device: block_table [R, B], slots [T]; block_size is static."""

    block_table: Array
    slots: Array
    block_size: int


@dataclass(frozen=True)
class StateStep:
    """A state group's fields on the device, each [R]."""

    read: Array
    write: Array
    checkpoint_offset: Array
    checkpoint_slot: Array


@dataclass(frozen=True)
class Step:
    """One step as the model and the ops see it: arrays of the backend, and the static bucket. No host counts.

    Attributes:
        counts .. sample_slots: as in the module's table, int32 arrays of the backend.
        groups: one PagedStep or StateStep per cache group.
        last: `State.last` before this step.
        host: the host batch, only in programs of backends that declare `host_batch`; traced code never sees
            it.
        input_embeds: array [T, D], or None.
    """

    bucket: Bucket
    counts: Array
    token_ids: Array
    token_source: Array
    positions: Array
    row_of_token: Array
    query_start: Array
    seq_lens: Array
    request_slots: Array
    query_kind: Array
    sample_rows: Array
    sample_slots: Array
    groups: tuple[PagedStep | StateStep, ...]
    last: Array
    adapter_slots: Array | None = None
    prefix_group: Array | None = None
    prefix_blocks: Array | None = None
    input_embeds: Array | None = None
    host: StepBatch | None = field(default=None, compare=False)

    @staticmethod
    def of(
        layout: StepLayout,
        plan: CachePlan,
        flat: Array,
        last: Array,
        host: StepBatch | None = None,
        input_embeds: Array | None = None,
    ) -> Step:
        """Slice a backend's flat int32 array into a Step; works inside a trace."""
        v: dict[str, Any] = layout.views(flat)
        groups: list[PagedStep | StateStep] = []
        for g, group in enumerate(plan.groups):
            if group.kind == "state":
                names = (
                    f"{n}.{g}" for n in ("state_read", "state_write", "checkpoint_offset", "checkpoint_slot")
                )
                groups.append(StateStep(*(v.pop(n) for n in names)))
            else:
                groups.append(PagedStep(v.pop(f"block_tables.{g}"), v.pop(f"slots.{g}"), group.block_size))
        return Step(
            bucket=layout.bucket, groups=tuple(groups), last=last, host=host, input_embeds=input_embeds, **v
        )

    def paged(self, group: int) -> PagedStep:
        """A paged or window group's fields.

        Raises:
            TypeError: the group holds state.
        """
        fields = self.groups[group]
        if not isinstance(fields, PagedStep):
            raise TypeError(f"cache group {group} holds state, not blocks")
        return fields

    def state(self, group: int) -> StateStep:
        """A state group's fields.

        Raises:
            TypeError: the group holds blocks.
        """
        fields = self.groups[group]
        if not isinstance(fields, StateStep):
            raise TypeError(f"cache group {group} holds blocks, not state")
        return fields
