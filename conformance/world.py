"""Hand-made steps over a few sequences, as an engine would make them.

A `World` knows its sequences and where their blocks and state slots lie (scattered over the pool, in no
order); `World.batch` turns rows (sequence, start, count) into a StepBatch with padding in every dimension.
Token ids are unique over all sequences, so a table that is embedded gives any activations wanted, and the
same ones however a sequence is cut into steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from core.contract.batch import DECODE, PREFILL, VERIFY, StepBatch, StepLayout
from core.contract.spec import BackendSpec, BatchRules
from core.contract.types import (
    Bucket,
    CacheGroupSpec,
    CacheLayerSpec,
    CachePlan,
    Outputs,
    StepKind,
)

MAX_REQUESTS = 6


@dataclass(frozen=True)
class Row:
    """Tokens [start, start + count) of a sequence in one step.

    Attributes:
        sampled: the row's last token is sampled.
        source: the (only) token comes from `last` of this slot; -1 = from its id.
        checkpoint: state slot that also gets the state after `checkpoint_offset` tokens.
    """

    sequence: int
    start: int
    count: int
    sampled: bool = True
    source: int = -1
    checkpoint_offset: int = 0
    checkpoint: int = 0


@dataclass(frozen=True)
class World:
    """Sequences of these lengths over caches of these layers; every layer is a group of its own."""

    lengths: tuple[int, ...]
    layers: tuple[CacheLayerSpec, ...] = ()
    block_size: int = 8
    seed: int = 5
    outputs: Outputs = field(default_factory=lambda: Outputs(all_logits=True))
    max_verify: int = 8
    multiple: int = 1
    first_block: int = 1

    def fitted(self, spec: BackendSpec) -> World:
        """This world with blocks and rows that a backend declares."""
        sizes = spec.cache.block_sizes
        size = self.block_size if self.block_size in sizes else min(sizes)
        return replace(
            self,
            block_size=size,
            max_verify=min(self.max_verify, spec.attention.max_decode_queries),
            multiple=spec.batch.prefill_multiple,
        )

    def kind(self, row: Row) -> int:
        """A single token after others is a decode; a few of them a verification; else a prefill."""
        if row.start and row.count == 1:
            return DECODE
        return VERIFY if row.start and row.count <= self.max_verify else PREFILL

    def legal(self, steps: Sequence[Sequence[Row]], rules: BatchRules) -> list[list[Row]]:
        """The same rows in steps that a backend takes: by its rules on mixing and on numbers of rows."""
        found: list[list[Row]] = []
        for rows in steps:
            first = [row for row in rows if self.kind(row) != PREFILL]
            last = [row for row in rows if self.kind(row) == PREFILL]
            many = rules.max_prefills or max(len(last), 1)
            groups = [last[i : i + many] for i in range(0, len(last), many)]
            if rules.mixed and groups:
                groups[0] = [*first, *groups[0]]
            elif first:
                groups = [first, *groups]
            found += groups
        return found

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    def first_id(self, sequence: int) -> int:
        """Id of a sequence's first token; the others follow."""
        return sum(self.lengths[:sequence])

    @cached_property
    def plan(self) -> CachePlan:
        """Those before `first_block`, and twice the blocks that are needed; state slots for the sequences and
        as many checkpoints.
        """
        blocks = self.first_block + 2 * len(self.lengths) * self.width
        groups = []
        for i, layer in enumerate(self.layers):
            if layer.kind == "state":
                group = CacheGroupSpec(
                    kind="state",
                    layers=(i,),
                    block_size=self.block_size,
                    num_blocks=1 + 2 * len(self.lengths),
                )
            else:
                group = CacheGroupSpec(
                    kind="window" if layer.kind == "window" else "paged",
                    layers=(i,),
                    block_size=self.block_size,
                    num_blocks=blocks,
                    window=layer.window,
                )
            groups.append(group)
        return CachePlan(
            layers=self.layers,
            groups=tuple(groups),
            group_of=tuple(range(len(groups))),
            max_requests=max(MAX_REQUESTS, len(self.lengths)),
        )

    @property
    def width(self) -> int:
        """Columns of a block table that hold the longest sequence; a power of two."""
        return _power_of_two(-(-max(self.lengths) // self.block_size))

    @cached_property
    def blocks(self) -> tuple[npt.NDArray[np.int32], ...]:
        """Each paged group's block ids [sequences, width]: distinct, scattered, from `first_block` on, never
        the pad block.
        """
        rng = np.random.default_rng(self.seed)
        found = []
        for group in self.plan.groups:
            count = max(group.num_blocks - self.first_block, len(self.lengths) * self.width)
            ids = self.first_block + rng.permutation(count)
            found.append(
                ids[: len(self.lengths) * self.width].reshape(len(self.lengths), self.width).astype(np.int32)
            )
        return tuple(found)

    def state_slot(self, sequence: int) -> int:
        """Where a sequence's state lies."""
        return len(self.lengths) - sequence

    def checkpoint_slot(self, sequence: int) -> int:
        """A second slot of a sequence."""
        return len(self.lengths) + 1 + sequence

    def batch(
        self, rows: Sequence[Row], rules: BatchRules, *, step_id: int = 0, read: int | None = None
    ) -> StepBatch:
        """The step of these rows, decode and verify rows first. `read`: state slot to continue from."""
        rows = sorted(rows, key=lambda row: self.kind(row) == PREFILL)
        layout = StepLayout.of(self._bucket(rows), self.plan, rules)
        flat = np.zeros(layout.size, np.int32)
        layout.clear(flat)
        v = layout.views(flat)
        token = sample = 0
        for r, row in enumerate(rows):
            end = token + row.count
            v["token_ids"][token:end] = self.first_id(row.sequence) + row.start + np.arange(row.count)
            v["token_source"][token:end] = row.source
            v["positions"][token:end] = row.start + np.arange(row.count)
            v["row_of_token"][token:end] = r
            v["query_start"][r : r + 2] = token, end
            v["seq_lens"][r] = row.start + row.count
            v["request_slots"][r] = row.sequence
            v["query_kind"][r] = self.kind(row)
            if row.sampled:
                v["sample_rows"][sample], v["sample_slots"][sample] = end - 1, row.sequence
                sample += 1
            self._fill_caches(v, r, row, slice(token, end), read)
            token = end
        if layout.bucket.kind != "decode":
            v["query_start"][len(rows) :] = token
        decodes = sum(self.kind(row) == DECODE for row in rows)
        v["counts"][:] = token, len(rows), decodes, sample
        return StepBatch(step_id, layout, self.plan, flat, token, len(rows), decodes, sample)

    def _fill_caches(
        self, v: dict[str, npt.NDArray[np.int32]], r: int, row: Row, tokens: slice, read: int | None
    ) -> None:
        positions = row.start + np.arange(row.count)
        for g, group in enumerate(self.plan.groups):
            if group.kind == "state":
                own = self.state_slot(row.sequence)
                v[f"state_read.{g}"][r] = read if read is not None else own if row.start else -1
                v[f"state_write.{g}"][r] = own
                v[f"checkpoint_offset.{g}"][r] = row.checkpoint_offset
                v[f"checkpoint_slot.{g}"][r] = row.checkpoint
                continue
            Z, blocks = group.block_size, self.blocks[g][row.sequence]
            used = -(-(row.start + row.count) // Z)
            table = v[f"block_tables.{g}"][r]
            table[:used] = blocks[:used]
            if group.window is not None:  # what no query of this step sees was given back
                table[: max(0, row.start - group.window + 1) // Z] = 0
            v[f"slots.{g}"][tokens] = blocks[positions // Z] * Z + positions % Z

    def _bucket(self, rows: Sequence[Row]) -> Bucket:
        """One bucket for decode steps and one for all others, so that few programs are compiled."""
        decode = all(self.kind(row) == DECODE for row in rows)
        kind: StepKind = "decode" if decode else "mixed"
        requests = _power_of_two(len(self.lengths) + 1)
        return Bucket(
            tokens=requests if decode else _power_of_two(self.num_tokens + 1),
            requests=requests,
            widths=tuple(0 if group.kind == "state" else self.width for group in self.plan.groups),
            kind=kind,
            max_query=1 if decode else _power_of_two(max(self.lengths)),
            max_seq=self.width * self.block_size,
            outputs=self.outputs,
        )

    def whole(self) -> list[list[Row]]:
        """Every sequence in one prefill, all in one step."""
        return [[Row(s, 0, n) for s, n in enumerate(self.lengths)]]

    def mixed(self) -> list[list[Row]]:
        """Steps of all kinds until every token was seen.

        Sequences start one step apart, each with a chunk that ends within a block; then single tokens, a
        verification of two to seven, and longer chunks take turns.
        """
        counts = (self.block_size + 3, 1, 7, 1, 3, 1, 5, 2)
        at = [0] * len(self.lengths)
        turn = [0] * len(self.lengths)
        steps: list[list[Row]] = []
        while any(done < n for done, n in zip(at, self.lengths, strict=True)):
            rows = []
            for s, n in enumerate(self.lengths):
                if len(steps) < s or at[s] == n:
                    continue
                count = counts[turn[s] % len(counts)]
                if count > self.max_verify or not at[s]:
                    count = -(-count // self.multiple) * self.multiple
                elif count > 1 and self.multiple > 1:
                    count = 1
                count = min(count, n - at[s])
                rows.append(Row(s, at[s], count))
                at[s] += count
                turn[s] += 1
            steps.append(rows)
        return steps

    def leaving(self) -> list[list[Row]]:
        """All together to the last few tokens, which come one by one; the first sequence ends first.

        So a row's number changes while it lives, and what had a number before is padding in the next step.
        """
        at, steps = [], []
        for s, n in enumerate(self.lengths):
            count = max(1, n - 2 * (s + 1))
            at.append(min(n, -(-count // self.multiple) * self.multiple))
        steps.append([Row(s, 0, count) for s, count in enumerate(at)])
        while any(done < n for done, n in zip(at, self.lengths, strict=True)):
            steps.append([Row(s, at[s], 1) for s, n in enumerate(self.lengths) if at[s] < n])
            at = [min(done + 1, n) for done, n in zip(at, self.lengths, strict=True)]
        return steps

    def single(self) -> list[list[Row]]:
        """One token of one sequence per step."""
        return [[Row(s, i, 1)] for s, n in enumerate(self.lengths) for i in range(n)]


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
