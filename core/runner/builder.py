"""From a StepPlan to a StepBatch and its SamplingBatch.

Decode rows are filled with array operations over slots; only prefill rows are visited one by one. Host
buffers are used in turn: one is written again only after its step was waited for.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from core.block_manager import BlockManager
from core.contract.batch import PREFILL, Int32, StepBatch, StepLayout
from core.contract.spec import BatchRules
from core.contract.types import Bucket, CachePlan, Outputs, SamplingBatch
from core.runner.buckets import Buckets
from core.runner.sampling import sampling_batch
from core.scheduler.plan import PrefillRow, StepPlan
from core.scheduler.sequence import SlotTable

_TOKEN_FIELDS = frozenset(("token_ids", "token_source", "positions", "row_of_token", "slots"))
_SAMPLE_FIELDS = frozenset(("sample_rows", "sample_slots"))
_OPTIONAL_FIELDS = ("adapter_slots", "prefix_group", "prefix_blocks")
_MAX_LAYOUTS = 1024
"""Layouts kept; backends of dynamic shape meet new ones without end."""

Views = Mapping[str, Int32]


class BatchBuilder:
    """Builds the batches of one engine into its device's host buffers."""

    def __init__(
        self,
        plan: CachePlan,
        rules: BatchRules,
        buckets: Buckets,
        table: SlotTable,
        blocks: BlockManager,
        buffers: list[Int32],
        vocab_size: int,
    ) -> None:
        self._plan = plan
        self._rules = rules
        self._buckets = buckets
        self._table = table
        self._blocks = blocks
        self._buffers = buffers
        self._vocab_size = vocab_size
        self._layouts: dict[Bucket, tuple[StepLayout, list[Views | None]]] = {}
        self._paged = [g for g, group in enumerate(plan.groups) if group.kind != "state"]
        self._state = [g for g, group in enumerate(plan.groups) if group.kind == "state"]
        self._count = np.arange(buckets.max_rows + 1, dtype=np.int32)

    def build(self, step: StepPlan, outputs: Outputs | None = None) -> StepBatch:
        """The step's batch, right after it was scheduled."""
        num_samples = len(step.decode) + sum(len(row.samples) for row in step.prefills)
        layout, cached = self._layout(step, num_samples, outputs or Outputs(all_logits=bool(step.prompts)))
        index = step.step_id % len(self._buffers)
        flat = self._buffers[index][: layout.size]
        views = cached[index]
        if views is None:
            views = cached[index] = layout.views(flat)
        batch = StepBatch(
            step.step_id,
            layout,
            self._plan,
            flat,
            step.num_tokens,
            step.num_requests,
            len(step.decode),
            num_samples,
        )
        self._pad(views, batch)
        self._fill_decode(views, step)
        self._fill_prefills(views, step)
        for c in step.checkpoints:
            views[f"checkpoint_offset.{c.group}"][c.row] = c.offset
            views[f"checkpoint_slot.{c.group}"][c.row] = c.slot
        views["counts"][:] = (batch.num_tokens, batch.num_requests, batch.num_decodes, num_samples)
        return batch

    def sampling(self, step: StepPlan) -> SamplingBatch:
        """The step's sampling parameters, before the next one is scheduled. Rows whose draw depends on their
        earlier output need `is_known`.
        """
        samples = np.array([s for row in step.prefills for s in row.samples], np.int32)
        slots = np.concatenate([step.decode, samples]) if len(samples) else step.decode
        return sampling_batch(self._table, slots, self._vocab_size)

    def is_known(self, step: StepPlan) -> bool:
        """Whether the host knows every token on which a draw of this step depends."""
        table = self._table
        if not table.special:
            return True
        waits = [
            s for s in step.decode.tolist() if (q := table.special.get(s)) and q.request.params.is_recurrent
        ]
        return bool((table.known[waits] >= table.computed[waits]).all())

    def _layout(
        self, step: StepPlan, num_samples: int, outputs: Outputs
    ) -> tuple[StepLayout, list[Views | None]]:
        """The step's layout, and its views of each buffer as far as they were needed."""
        longest = int(step.positions.max()) + 1 if len(step.positions) else 0
        bucket = self._buckets.choose(
            step.kind,
            step.num_tokens,
            max(step.num_requests, num_samples),
            max((row.count for row in step.prefills), default=1),
            max(longest, max((row.start + row.count for row in step.prefills), default=0)),
            outputs,
        )
        found = self._layouts.get(bucket)
        if found is None:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            layout = StepLayout.of(bucket, self._plan, self._rules)
            found = self._layouts[bucket] = (layout, [None] * len(self._buffers))
        return found

    def _pad(self, views: Views, batch: StepBatch) -> None:
        """Padding behind the real entries, and resets of fields that not every row sets."""
        bucket = batch.layout.bucket
        T, R, S = batch.num_tokens, batch.num_requests, batch.num_samples
        if (bucket.tokens, bucket.requests, bucket.requests) != (T, R, S):
            for field in batch.layout.fields:
                kind = field.name.split(".")[0]
                real = T if kind in _TOKEN_FIELDS else S if kind in _SAMPLE_FIELDS else R
                views[field.name][real:] = field.padding
            if bucket.kind == "decode":
                views["row_of_token"][T:] = self._count[T : bucket.tokens]
                views["query_start"][R:] = self._count[R : bucket.requests + 1]
            else:
                views["query_start"][R:] = T
        for g in self._state:
            views[f"checkpoint_offset.{g}"][:R] = 0
            views[f"checkpoint_slot.{g}"][:R] = 0
        for name in _OPTIONAL_FIELDS:
            if name in views:
                views[name][:R] = 0

    def _fill_decode(self, v: Views, step: StepPlan) -> None:
        slots, positions, n = step.decode, step.positions, len(step.decode)
        if not n:
            return
        v["token_ids"][:n] = 0
        v["token_source"][:n] = slots
        v["positions"][:n] = positions
        v["row_of_token"][:n] = self._count[:n]
        v["query_start"][: n + 1] = self._count[: n + 1]
        v["seq_lens"][:n] = positions + 1
        v["request_slots"][:n] = slots
        v["query_kind"][:n] = 0
        v["sample_rows"][:n] = self._count[:n]
        v["sample_slots"][:n] = slots
        for g in self._paged:
            size, table = self._plan.groups[g].block_size, self._blocks.tables[g]
            view = v[f"block_tables.{g}"]
            width = min(view.shape[1], table.shape[1])
            np.take(table[:, :width], slots, axis=0, out=view[:n, :width], mode="clip")
            view[:n, width:] = 0
            v[f"slots.{g}"][:n] = table[slots, positions // size] * size + positions % size
        for g in self._state:
            live = self._blocks.state_slots[g][slots]
            v[f"state_read.{g}"][:n] = live
            v[f"state_write.{g}"][:n] = live

    def _fill_prefills(self, v: Views, step: StepPlan) -> None:
        token, sample = len(step.decode), len(step.decode)
        for i, row in enumerate(step.prefills):
            r = len(step.decode) + i
            end = token + row.count
            v["query_start"][r : r + 2] = (token, end)
            v["token_ids"][token:end] = self._table.tokens[row.slot, row.start : row.start + row.count]
            v["token_source"][token:end] = -1
            v["row_of_token"][token:end] = r
            v["seq_lens"][r] = row.start + row.count
            v["request_slots"][r] = row.slot
            v["query_kind"][r] = PREFILL
            for slot in row.samples:
                v["sample_rows"][sample] = end - 1
                v["sample_slots"][sample] = slot
                sample += 1
            self._fill_caches(v, row, r, token)
            token = end

    def _fill_caches(self, v: Views, row: PrefillRow, r: int, token: int) -> None:
        positions = np.arange(row.start, row.start + row.count, dtype=np.int32)
        v["positions"][token : token + row.count] = positions
        for g in self._paged:
            size, blocks = self._plan.groups[g].block_size, self._blocks.tables[g][row.slot]
            view = v[f"block_tables.{g}"]
            width = min(view.shape[1], len(blocks))
            view[r, :width], view[r, width:] = blocks[:width], 0
            v[f"slots.{g}"][token : token + row.count] = blocks[positions // size] * size + positions % size
        for g in self._state:
            v[f"state_read.{g}"][r] = self._blocks.state_source(row.slot, g, row.start)
            v[f"state_write.{g}"][r] = self._blocks.state_slots[g][row.slot]
