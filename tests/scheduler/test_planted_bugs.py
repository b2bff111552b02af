"""Planted bugs: the simulator must notice each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core.block_manager import BlockManager
from core.contract.batch import StepBatch
from core.contract.types import SamplingBatch
from core.runner import builder as builder_module
from core.runner.builder import BatchBuilder, Views
from core.scheduler import Scheduler, Sequence, SlotTable, StepPlan
from tests.scheduler.profiles import EITHER, KINDS, MIXED, RECTANGLE, STATIC, Profile
from tests.scheduler.simulator import VOCAB
from tests.scheduler.test_profiles import run

Patch = Callable[[pytest.MonkeyPatch], None]


def skip_the_epoch_check(patch: pytest.MonkeyPatch) -> None:
    close = SlotTable.close

    def wrong(self: SlotTable, slot: int) -> None:
        close(self, slot)
        self.epoch[slot] -= 1

    patch.setattr(SlotTable, "close", wrong)


def ignore_fences(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_newest_step", property(lambda self: None))


def forget_to_trim(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "trim_window", lambda self, slot, num_computed, fence=None: None)


def trim_too_far(patch: pytest.MonkeyPatch) -> None:
    trim = BlockManager.trim_window
    patch.setattr(
        BlockManager, "trim_window", lambda self, slot, end, fence=None: trim(self, slot, end + 8, fence)
    )


def commit_before_the_wait(patch: pytest.MonkeyPatch) -> None:
    submit = Scheduler._submit

    def wrong(self: Scheduler, *args: Any) -> StepPlan:
        plan = submit(self, *args)
        self._confirm(self._in_flight[-1])
        return plan

    patch.setattr(Scheduler, "_submit", wrong)


def lose_copies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "take_copies", lambda self: [])


def lose_checkpoints(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: BatchBuilder, step: StepPlan, *args: Any) -> StepBatch:
        batch = build(self, step, *args)
        for g, group in enumerate(batch.plan.groups):
            if group.kind == "state":
                batch.views[f"checkpoint_offset.{g}"][:] = 0
        return batch

    build = BatchBuilder.build
    patch.setattr(BatchBuilder, "build", wrong)


def after_decode_rows(wrong: Callable[[Views, int], None]) -> Patch:
    """A patch that changes the fields of n decode rows after they were filled."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        fill = BatchBuilder._fill_decode

        def patched(self: BatchBuilder, v: Views, step: StepPlan) -> None:
            fill(self, v, step)
            wrong(v, len(step.decode))

        patch.setattr(BatchBuilder, "_fill_decode", patched)

    return plant


def _feed_back_the_neighbour(v: Views, n: int) -> None:
    v["token_source"][:n] = np.roll(v["token_source"][:n], 1)


def _swap_rows(v: Views, n: int) -> None:
    fields = ("positions", "seq_lens", "request_slots", "block_tables.0", "slots.0", "token_source")
    for name in (*fields, "sample_slots"):
        v[name][:n] = v[name][:n][::-1].copy()


feed_back_the_neighbour = after_decode_rows(_feed_back_the_neighbour)
swap_rows = after_decode_rows(_swap_rows)


def shift_sampling_positions(patch: pytest.MonkeyPatch) -> None:
    sampling = builder_module.sampling_batch

    def wrong(*args: Any) -> SamplingBatch:
        found = sampling(*args)
        found.position[:] = np.roll(found.position, 1)
        return found

    patch.setattr(builder_module, "sampling_batch", wrong)


def swap_seeds(patch: pytest.MonkeyPatch) -> None:
    sampling = builder_module.sampling_batch

    def wrong(*args: Any) -> SamplingBatch:
        found = sampling(*args)
        found.seed[:] = found.seed[::-1].copy()
        return found

    patch.setattr(builder_module, "sampling_batch", wrong)


def skip_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BatchBuilder, "_pad", lambda self, views, batch: None)


def leave_optional_fields(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(builder_module, "_OPTIONAL_FIELDS", ())


def use_one_host_buffer(patch: pytest.MonkeyPatch) -> None:
    init = BatchBuilder.__init__

    def wrong(self: BatchBuilder, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self._buffers = self._buffers[:1]

    patch.setattr(BatchBuilder, "__init__", wrong)


def exceed_the_budget_by_one(patch: pytest.MonkeyPatch) -> None:
    pick = Scheduler._pick_prefills
    patch.setattr(Scheduler, "_pick_prefills", lambda self, tokens, rows: pick(self, tokens + 1, rows))


def allow_one_row_more(patch: pytest.MonkeyPatch) -> None:
    init = Scheduler.__init__

    def wrong(self: Scheduler, *args: Any) -> None:
        init(self, *args)
        self._max_rows += 1

    patch.setattr(Scheduler, "__init__", wrong)


def skip_the_area_cap(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_within_limits", lambda self, ready: ready)


def chunk_as_it_comes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_whole", lambda self, wanted, most: min(wanted, most))


def never_cut_chunks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "growable", lambda self, slot: 0)


def forget_a_token(patch: pytest.MonkeyPatch) -> None:
    ids = Sequence.all_ids

    def wrong(self: Sequence) -> Any:
        found = ids(self)
        if self.num_preemptions and self.output_ids:
            found[-1] = (found[-1] + 1) % VOCAB
        return found

    patch.setattr(Sequence, "all_ids", wrong)


BUGS: dict[Patch, tuple[Profile, str, str]] = {
    skip_the_epoch_check: (MIXED, "full", "is closed; open it first"),
    ignore_fences: (MIXED, "full", "is reused before|for another request before"),
    forget_to_trim: (MIXED, "full and window", "left the window are still held"),
    trim_too_far: (MIXED, "full and window", "pad block|its next token sees"),
    commit_before_the_wait: (MIXED, "full", "in flight is cached already|step in flight writes for another"),
    lose_copies: (MIXED, "full", "does not hold"),
    lose_checkpoints: (MIXED, "all", "does not hold|is cached"),
    feed_back_the_neighbour: (MIXED, "full", "wrong input tokens"),
    swap_rows: (MIXED, "full", "rows are not in the order of the plan|sampling positions"),
    shift_sampling_positions: (MIXED, "full", "sampling positions"),
    swap_seeds: (MIXED, "full", "wrong input tokens|other output"),
    skip_padding: (STATIC, "all", "padding of"),
    leave_optional_fields: (MIXED, "full", "of a real row was never set"),
    use_one_host_buffer: (MIXED, "full", "host buffer was rewritten"),
    exceed_the_budget_by_one: (MIXED, "full", "tokens, .* allowed"),
    allow_one_row_more: (EITHER, "full", "rows"),
    skip_the_area_cap: (RECTANGLE, "full", "rows of"),
    chunk_as_it_comes: (RECTANGLE, "full", "a chunk of"),
    never_cut_chunks: (MIXED, "full and window", "nothing runs|do not end"),
    forget_a_token: (MIXED, "full", "wrong input tokens"),
}


def name_of(patch: Patch) -> str:
    return next(name for name, value in globals().items() if value is patch)


@pytest.mark.parametrize("plant", BUGS, ids=name_of)
def test_a_planted_bug_is_noticed(plant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, kinds, message = BUGS[plant]
    plant(monkeypatch)
    with pytest.raises(Exception, match=message):
        for seed in range(12):
            run(profile, KINDS[kinds], seed, depth=2, tight=seed % 2 == 1)
