"""A bucket compiles once, whatever the real rows, lengths and sampled rows of its steps are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from backends.tpu import plugin
from backends.tpu.compiler import TpuProgram
from core.contract.batch import Step, StepBatch, StepLayout
from core.contract.interfaces import CompileRequest
from core.contract.ops import Ops
from core.contract.opspecs import AttentionSpec
from core.contract.requests import AllocatorRequest, DeviceRequest, OpsRequest
from core.contract.types import (
    Bucket,
    CacheGroupSpec,
    CacheLayerSpec,
    CachePlan,
    PackRequest,
    SampledTokens,
    SamplingBatch,
    State,
)

HEADS, KV_HEADS, HEAD_SIZE, VOCAB, BLOCK = 4, 2, 8, 12, 8
ATTENTION = AttentionSpec(
    scale=HEAD_SIZE**-0.5,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_size=HEAD_SIZE,
    v_head_size=HEAD_SIZE,
)
PLAN = CachePlan(
    layers=(
        CacheLayerSpec(
            kind="paged", dtype="float32", num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, v_head_size=HEAD_SIZE
        ),
    ),
    groups=(CacheGroupSpec(kind="paged", layers=(0,), block_size=BLOCK, num_blocks=9),),
    group_of=(0,),
    max_requests=4,
)
MIXED = Bucket(tokens=16, requests=4, widths=(2,), kind="mixed", max_query=16, max_seq=16)
DECODE = Bucket(tokens=4, requests=4, widths=(2,), kind="decode", max_query=1, max_seq=16)


def attention_step(ops: Ops, weights: Any, caches: Any, step: Step) -> Any:
    """One attention layer between an embedding and a head."""
    table, head = weights
    x = ops.embed_step(table, step)
    heads = x.reshape(-1, HEADS + 2 * KV_HEADS, HEAD_SIZE)
    q, k, v = heads[:, :HEADS], heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :]
    out, _, cache = ops.attend(q, k, v, caches[0], step, ATTENTION)
    out = ops.take(out.reshape(-1, HEADS * HEAD_SIZE), step.sample_rows)
    return ops.linear(out, head, wide=True), (cache,)


def aligned_buffer(size: int) -> np.ndarray:
    """int32 [size] at a multiple of 64 bytes: jax takes over such memory in place of copying it."""
    raw = np.zeros(size + 16, np.int32)
    first = (-raw.ctypes.data % 64) // 4
    return raw[first : first + size]


def batch_of(bucket: Bucket, queries: tuple[int, ...], past: int) -> StepBatch:
    """Row r has `queries[r]` new tokens after `past` earlier ones, in blocks 2r + 1 and 2r + 2."""
    layout = StepLayout.of(bucket, PLAN, plugin.SPEC.batch)
    flat = aligned_buffer(layout.size)
    layout.clear(flat)
    views = layout.views(flat)
    start = 0
    for r, count in enumerate(queries):
        positions = np.arange(past, past + count, dtype=np.int32)
        blocks = np.array([2 * r + 1, 2 * r + 2], np.int32)
        here = slice(start, start + count)
        views["token_ids"][here] = (positions * 5 + r) % VOCAB
        views["positions"][here] = positions
        views["row_of_token"][here] = r
        views["slots.0"][here] = blocks[positions // BLOCK] * BLOCK + positions % BLOCK
        views["query_start"][r] = start
        views["seq_lens"][r] = past + count
        views["request_slots"][r] = views["sample_slots"][r] = r
        views["block_tables.0"][r] = blocks
        start += count
        views["sample_rows"][r] = start - 1
    if bucket.kind != "decode":
        views["query_start"][len(queries) :] = start
    return StepBatch(0, layout, PLAN, flat, start, len(queries), 0, len(queries))


def sampling_of(rows: int, temperature: float) -> SamplingBatch:
    zeros = np.zeros(rows, np.int32)
    return SamplingBatch(
        temperature=np.full(rows, temperature, np.float32),
        top_k=zeros,
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        seed=np.zeros(rows, np.uint64),
        position=zeros,
        choice=zeros,
    )


def lowest_token(logits: np.ndarray, sampling: SamplingBatch) -> SampledTokens:
    return SampledTokens(logits.argmin(-1).astype(np.int32))


class Compilations:
    """Counts what jax's own compiler was asked for."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: str, duration: float, **details: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations() -> Iterator[Compilations]:
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)


@pytest.fixture
def make() -> Iterator[Any]:
    device = plugin.core_open_device(DeviceRequest(options={"platform": "cpu"}))
    allocator = plugin.core_memory_allocator(AllocatorRequest(device=device))
    rng = np.random.default_rng(3)
    shapes = {"table": (VOCAB, (HEADS + 2 * KV_HEADS) * HEAD_SIZE), "head": (VOCAB, HEADS * HEAD_SIZE)}
    weights = tuple(
        allocator.pack(
            PackRequest(array=rng.normal(size=shape), uses=("linear",), dtype="float32", name=name)
        )
        for name, shape in shapes.items()
    )

    def build(bucket: Bucket) -> tuple[TpuProgram, State]:
        state = allocator.allocate_state(PLAN)
        request = CompileRequest(
            device=device,
            fn=attention_step,
            ops=plugin.core_ops(OpsRequest(device=device, dtype="float32")),
            weights=weights,
            state=state,
            layout=StepLayout.of(bucket, PLAN, plugin.SPEC.batch),
            plan=PLAN,
            sampler=None,
            reference_sampler=lowest_token,
        )
        return plugin.core_compile(request), state

    yield build
    device.close()


STEPS = {
    "mixed": (MIXED, [(16,), (1,), (1, 1, 9), (3, 5), (1, 2, 3, 4), (1, 1, 1, 1)]),
    "decode": (DECODE, [(1,) * rows for rows in (1, 2, 3, 4)]),
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_bucket_compiles_once_for_every_real_row_count(
    make: Any, compilations: Compilations, kind: str
) -> None:
    bucket, steps = STEPS[kind]
    program, state = make(bucket)
    state = program.warm(state)
    assert program.compiles == 1
    compiled = compilations.count
    for queries, longest_past in itertools.product(steps, (False, True)):
        past = bucket.max_seq - max(queries) if longest_past else 0
        batch = batch_of(bucket, queries, past)
        tokens, state = program.run_and_sample(batch, sampling_of(len(queries), 0.0), state)
        assert tokens.get().tokens.shape == (len(queries),)
    assert program.compiles == 1
    assert compilations.count == compiled


@pytest.mark.parametrize("kind", STEPS)
def test_sampling_on_the_host_compiles_once_for_every_real_row_count(
    make: Any, compilations: Compilations, kind: str
) -> None:
    bucket, steps = STEPS[kind]
    program, state = make(bucket)
    counts = []
    for queries in steps:
        batch = batch_of(bucket, queries, 0)
        output, state = program.run(batch, state)
        tokens, state = program.sample(output, batch, sampling_of(len(queries), 1.0), state)
        expected = output.get().argmin(-1)
        assert tokens.get().tokens.tolist() == expected.tolist()
        assert np.asarray(state.last)[: len(queries)].tolist() == expected.tolist()
        counts.append(compilations.count)
    assert program.compiles == 1
    assert counts == counts[:1] * len(counts)


@pytest.mark.parametrize("kind", STEPS)
def test_a_rows_logits_depend_on_its_own_tokens_only(make: Any, kind: str) -> None:
    bucket = STEPS[kind][0]
    queries = (1,) * 4 if kind == "decode" else (3, 7, 1, 5)
    program, state = make(bucket)
    output, state = program.run(batch_of(bucket, queries, 0), state)
    wanted = output.get()
    for row in range(len(queries)):
        batch = batch_of(bucket, queries, 0)
        own = batch.row_of_token == row
        batch.token_ids[own] = (batch.token_ids[own] + 1) % VOCAB
        output, state = program.run(batch, state)
        changed = (output.get() != wanted).any(axis=1)
        assert changed.tolist() == [r == row for r in range(len(queries))]


def test_a_step_has_copied_its_buffer_when_run_returns(make: Any) -> None:
    program, state = make(MIXED)
    batch = batch_of(MIXED, (3, 4), 0)
    output, state = program.run(batch, state)
    wanted = output.get().argmax(-1)
    batch.flat[:] = 3
    tokens, state = program.sample(output, batch, sampling_of(2, 0.0), state)
    assert tokens.get().tokens.tolist() == wanted.tolist()
    assert np.asarray(state.last)[:2].tolist() == wanted.tolist()
