"""The null backend tells its tokens beforehand and sees each misuse that it promises to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from core_test_plugins.null import BACKEND, SPEC
from core_test_plugins.null_device import NullAllocator, NullDevice, null_token

from core.contract.batch import PREFILL, StepBatch, StepLayout
from core.contract.errors import ConfigError, DeviceError, OutOfMemoryError
from core.contract.interfaces import CompileRequest, DeviceTokens, Program
from core.contract.requests import AllocatorRequest, DeviceRequest, OpsRequest
from core.contract.types import Bucket, CacheGroupSpec, CacheLayerSpec, CachePlan, Outputs, SamplingBatch
from core.sampling.reference import sample

Z = 4
PLAN = CachePlan(
    layers=(CacheLayerSpec(kind="paged", dtype="float32", num_kv_heads=1, head_size=8, v_head_size=8),),
    groups=(CacheGroupSpec(kind="paged", layers=(0,), block_size=Z, num_blocks=12),),
    group_of=(0,),
    max_requests=4,
)
Row = tuple[int, int, int, tuple[int, ...]]
"""Request slot, first position, tokens, block table."""


class Bench:
    """A device with its state; steps are submitted row by row."""

    def __init__(self, **options: str) -> None:
        device = BACKEND.core_open_device(DeviceRequest(options=options))
        assert isinstance(device, NullDevice)
        self.device = device
        self.allocator = BACKEND.core_memory_allocator(AllocatorRequest(device=device))
        self.state = self.allocator.allocate_state(PLAN)
        self.num_steps = 0

    def program(self, layout: StepLayout) -> Program:
        return BACKEND.core_compile(
            CompileRequest(
                device=self.device,
                fn=never_called,
                ops=BACKEND.core_ops(OpsRequest(device=self.device, dtype="float32")),
                weights=(),
                state=self.state,
                layout=layout,
                plan=PLAN,
                sampler=None,
                reference_sampler=sample,
            )
        )

    def batch(self, *rows: Row, feed: bool = False) -> StepBatch:
        """`feed`: each row's first token comes from `last`."""
        T, R = sum(row[2] for row in rows), len(rows)
        bucket = Bucket(tokens=T, requests=R, widths=(3,), kind="mixed", max_query=T, max_seq=3 * Z)
        layout = StepLayout.of(bucket, PLAN, SPEC.batch)
        flat = np.zeros(layout.size, np.int32)
        layout.clear(flat)
        batch = StepBatch(self.num_steps, layout, PLAN, flat, T, R, 0, R)
        self.num_steps += 1
        at = 0
        for r, (slot, start, count, table) in enumerate(rows):
            positions = np.arange(start, start + count)
            here = slice(at, at + count)
            batch.query_start[r : r + 2] = (at, at + count)
            batch.positions[here], batch.row_of_token[here] = positions, r
            batch.slots(0)[here] = np.array(table)[positions // Z] * Z + positions % Z
            batch.seq_lens[r], batch.query_kind[r] = start + count, PREFILL
            batch.request_slots[r] = batch.sample_slots[r] = slot
            batch.block_table(0)[r, : len(table)] = table
            if feed:
                batch.token_source[at] = slot
            at += count
            batch.sample_rows[r] = at - 1
        return batch

    def submit(self, *rows: Row, feed: bool = False) -> DeviceTokens:
        return self.submit_batch(self.batch(*rows, feed=feed))

    def submit_batch(self, batch: StepBatch) -> DeviceTokens:
        ends = [int(batch.positions[t]) + 1 for t in batch.sample_rows]
        tokens, self.state = self.program(batch.layout).run_and_sample(batch, greedy(ends), self.state)
        return tokens


def never_called(*arguments: object) -> None:
    raise AssertionError("the null backend calls no step function")


def greedy(positions: list[int]) -> SamplingBatch:
    n = len(positions)
    return SamplingBatch(
        temperature=np.zeros(n, np.float32),
        top_k=np.zeros(n, np.int32),
        top_p=np.ones(n, np.float32),
        min_p=np.zeros(n, np.float32),
        seed=np.zeros(n, np.uint64),
        position=np.array(positions, np.int32),
        choice=np.zeros(n, np.int32),
    )


def test_tokens_are_a_function_of_the_position_alone() -> None:
    bench = Bench(vocab="50")
    tokens = bench.submit((0, 0, 5, (1, 2)), (3, 0, 2, (4,))).get().tokens
    assert tokens.tolist() == [null_token(5, 50), null_token(2, 50)]
    assert bench.state.last[[0, 3]].tolist() == tokens.tolist()
    assert bench.device.violations == []


def test_the_logits_choose_the_same_tokens() -> None:
    bench = Bench()
    batch = bench.batch((0, 0, 5, (1, 2)), (1, 0, 2, (3,)))
    output, bench.state = bench.program(batch.layout).run(batch, bench.state)
    assert output.get().argmax(-1).tolist() == [null_token(5, 256), null_token(2, 256)]
    small = bench.batch((2, 0, 3, (5,)))
    wide = replace(small.bucket, outputs=Outputs(all_logits=True))
    small = replace(small, layout=StepLayout.of(wide, PLAN, SPEC.batch))
    output, bench.state = bench.program(small.layout).run(small, bench.state)
    assert output.get().argmax(-1).tolist() == [null_token(p, 256) for p in (1, 2, 3)]


@pytest.mark.parametrize("every", [1, 4])
def test_the_end_token_comes_at_its_positions_and_nowhere_else(every: int) -> None:
    tokens = [null_token(p, 10, eos=3, eos_every=every) for p in range(60)]
    assert [p for p, token in enumerate(tokens) if token == 3] == list(range(every - 1, 60, every))
    bench = Bench(vocab="10", eos="3", eos_every=str(every))
    assert bench.submit((0, 0, 7, (1, 2))).get().tokens.tolist() == [tokens[7]]


def test_tokens_are_ready_after_so_many_further_steps_or_a_release() -> None:
    bench = Bench(delay="2")
    first = bench.submit((0, 0, 1, (1,)))
    second = bench.submit((0, 1, 1, (1,)), feed=True)
    assert not first.is_ready() and not second.is_ready()
    third = bench.submit((0, 2, 1, (1,)), feed=True)
    assert first.is_ready() and not second.is_ready()
    bench.device.release()
    assert second.is_ready() and third.is_ready()
    assert bench.device.violations == []


def test_waiting_for_a_step_finishes_it_and_those_before_it() -> None:
    bench = Bench(delay="9")
    first = bench.submit((0, 0, 1, (1,)))
    second = bench.submit((0, 1, 1, (1,)), feed=True)
    third = bench.submit((0, 2, 1, (1,)), feed=True)
    second.get()
    assert first.is_ready() and second.is_ready() and not third.is_ready()
    assert [record.is_done for record in bench.device.log] == [True, True, False]
    bench.device.synchronize()
    assert third.is_ready()


def test_the_log_keeps_what_was_submitted() -> None:
    bench = Bench()
    batch = bench.batch((2, 0, 5, (7, 8)))
    bench.submit_batch(batch).get()
    batch.flat[:] = 0
    (record,) = bench.device.log
    assert (record.num_tokens, record.num_requests, record.num_samples) == (5, 1, 1)
    assert record.views["block_tables.0"].tolist() == [[7, 8, 0]]
    assert record.sampling is not None and record.tokens is not None
    assert record.tokens.tolist() == [null_token(5, 256)]
    assert bench.device.violations == []


def good(bench: Bench) -> None:
    bench.submit((0, 0, 6, (1, 2)), (1, 0, 3, (3,)))
    bench.submit((0, 6, 1, (1, 2)), (1, 3, 1, (3,)), feed=True)
    bench.device.synchronize()
    bench.submit((2, 0, 4, (1,)))  # a block comes back after its last step was waited for


def buffer_changed_in_flight(bench: Bench) -> None:
    batch = bench.batch((0, 0, 3, (1,)))
    tokens = bench.submit_batch(batch)
    batch.token_ids[1] = 9
    tokens.get()


def block_of_two_requests_in_flight(bench: Bench) -> None:
    bench.submit((0, 0, 3, (1,)))
    bench.submit((1, 0, 3, (1,)))


def block_of_two_rows(bench: Bench) -> None:
    bench.submit((0, 0, 2, (1,)), (1, 0, 2, (1,)))


def request_slot_of_two_sequences_in_flight(bench: Bench) -> None:
    bench.submit((0, 0, 3, (1,)))
    bench.submit((0, 0, 2, (2,)))


def pad_block_written(bench: Bench) -> None:
    bench.submit((0, 0, 3, (0,)))


def block_read_that_was_never_written(bench: Bench) -> None:
    bench.submit((0, 4, 2, (1, 2)))


def block_read_that_another_sequence_overwrote(bench: Bench) -> None:
    bench.submit((0, 0, 5, (1, 2))).get()
    bench.submit((1, 4, 1, (3, 1))).get()
    bench.device.violations.clear()
    bench.submit((0, 5, 1, (1, 2)), feed=True)


def token_taken_from_another_position(bench: Bench) -> None:
    bench.submit((0, 0, 3, (1,))).get()
    bench.submit((0, 2, 1, (1,)), feed=True)


def sampled_position_that_is_not_the_next(bench: Bench) -> None:
    batch = bench.batch((0, 0, 3, (1,)))
    _, bench.state = bench.program(batch.layout).run_and_sample(batch, greedy([7]), bench.state)


def program_of_another_bucket(bench: Bench) -> None:
    bench.device.serves_any_shape = False
    other = bench.batch((0, 0, 2, (1,)))
    batch = bench.batch((0, 0, 3, (1,)))
    _, bench.state = bench.program(other.layout).run_and_sample(batch, greedy([3]), bench.state)


@pytest.mark.parametrize(
    ("misuse", "told"),
    [
        (buffer_changed_in_flight, "had its host buffer changed while it was in flight"),
        (block_of_two_requests_in_flight, "writes block 1 of group 0 for slots [1] while step 0"),
        (block_of_two_rows, "writes block 1 of group 0 for slots [0, 1]"),
        (request_slot_of_two_sequences_in_flight, "starts request slot 0 at position 0"),
        (pad_block_written, "to the pad block of 0"),
        (block_read_that_was_never_written, "row 0 reads position 0 in group 0"),
        (block_read_that_another_sequence_overwrote, "row 0 reads position 0 in group 0"),
        (
            token_taken_from_another_position,
            "takes position 2 from last[0], which holds the token of position 3",
        ),
        (sampled_position_that_is_not_the_next, "samples positions [3] as"),
        (program_of_another_bucket, "was given to the program of"),
    ],
)
def test_misuse_is_seen(misuse: Callable[[Bench], None], told: str) -> None:
    bench = Bench()
    misuse(bench)
    assert any(told in violation for violation in bench.device.violations), bench.device.violations


def test_right_use_is_no_misuse() -> None:
    bench = Bench()
    good(bench)
    assert bench.device.violations == []


def test_the_one_program_of_a_dynamic_backend_takes_any_bucket() -> None:
    bench = Bench()
    assert bench.device.serves_any_shape
    batch = bench.batch((0, 0, 3, (1,)))
    program = bench.program(bench.batch((0, 0, 2, (1,))).layout)
    _, bench.state = program.run_and_sample(batch, greedy([3]), bench.state)
    assert bench.device.violations == []


def test_copied_imported_and_zeroed_blocks_are_followed() -> None:
    bench = Bench()
    bench.submit((0, 0, 4, (1,))).get()
    bench.state = bench.allocator.copy_blocks(bench.state, 0, [1], [2])
    bench.submit((1, 4, 1, (2, 3))).get()
    exported = bench.allocator.export_blocks(bench.state, 0, [1, 2]).get()
    assert [part.shape for part in exported] == [(2, Z, 1, 8)] * 2
    bench.state = bench.allocator.import_blocks(bench.state, 0, [4], tuple(part[:1] for part in exported))
    bench.submit((2, 4, 1, (4, 5))).get()
    assert bench.device.violations == []
    bench.state = bench.allocator.zero_blocks(bench.state, 0, [2])
    bench.submit((1, 5, 1, (2, 3))).get()
    assert len(bench.device.violations) == 1
    names = [name for name, _ in bench.device.memory_calls]
    assert names == ["copy_blocks", "export_blocks", "import_blocks", "zero_blocks"]


def test_options_are_checked_and_failures_come_as_asked() -> None:
    with pytest.raises(ConfigError, match="no option 'dealy'"):
        Bench(dealy="1")
    bench = Bench(fail_step="1")
    bench.submit((0, 0, 1, (1,)))
    with pytest.raises(DeviceError, match="fails at step 1"):
        bench.submit((0, 1, 1, (1,)), feed=True)


def test_memory_is_bounded() -> None:
    bench = Bench(memory="4096")
    allocator = bench.allocator
    assert isinstance(allocator, NullAllocator)
    free = bench.device.memory().free_bytes
    assert free == 4096 - 12 * allocator.block_bytes(PLAN.layers[0], Z) >= 0
    with pytest.raises(OutOfMemoryError):
        allocator.allocate_state(PLAN)
    assert bench.device.memory().free_bytes == free, "a refused allocation takes nothing"
    allocator.free_state(bench.state)
    assert bench.device.memory().free_bytes == 4096
    allocator.allocate_state(PLAN)


def test_a_closed_device_is_refused() -> None:
    bench = Bench()
    bench.device.close()
    bench.device.close()
    with pytest.raises(DeviceError, match="closed"):
        bench.submit((0, 0, 1, (1,)))
