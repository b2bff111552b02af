"""What holds of every step: the rules that a backend declared, and the padding that the contract names."""

from __future__ import annotations

import numpy as np

from core.contract.batch import PREFILL, StepBatch
from core.contract.spec import BackendSpec, BatchRules
from core.contract.types import CachePlan, SamplingBatch
from core.scheduler import StepPlan


def check_rules(spec: BackendSpec, plan: StepPlan, batch: StepBatch, *, max_tokens: int, block: int) -> None:
    """The step breaks no declared rule. `max_tokens`: the engine's own limit."""
    rules, bucket, n = spec.batch, batch.bucket, len(plan.decode)
    assert 0 < plan.num_tokens <= max_tokens, f"{plan.num_tokens} tokens, {max_tokens} allowed"
    assert rules.max_tokens is None or bucket.tokens <= rules.max_tokens, f"padded to {bucket.tokens} tokens"
    assert rules.max_requests is None or bucket.requests <= rules.max_requests, f"{bucket.requests} rows"
    assert rules.mixed or not (n and plan.prefills), "prefill and decode rows in one step"
    if rules.max_prefills is not None:
        assert len(plan.prefills) <= rules.max_prefills, "too many prefill rows"
    for row in plan.prefills:
        assert row.samples or row.count % rules.prefill_multiple == 0, f"a chunk of {row.count} tokens"
    if rules.max_rows_x_context is not None and n:
        context = -(-(int(plan.positions.max()) + 1) // block) * block
        rows = max(n, rules.min_decode_rows)
        assert rows * context <= rules.max_rows_x_context, f"{n} rows of {context} tokens"
    kinds = batch.query_kind[: batch.num_requests]
    assert (np.diff(kinds) >= 0).all(), "decode rows do not come first"
    assert ((kinds == PREFILL) == (np.arange(batch.num_requests) >= n)).all(), "wrong kinds of rows"
    check_shape(spec, batch)


def check_shape(spec: BackendSpec, batch: StepBatch) -> None:
    """The bucket holds the step, and is one that the backend declared."""
    shapes, bucket = spec.shapes, batch.bucket
    counts = np.diff(batch.query_start[: batch.num_requests + 1])
    assert bucket.tokens >= batch.num_tokens, "more tokens than the bucket"
    assert bucket.requests >= max(batch.num_requests, batch.num_samples), "more rows than the bucket"
    assert bucket.max_query >= counts.max(), "a row is longer than the bucket's max_query"
    assert bucket.max_seq >= batch.seq_lens.max(), "a context is longer than the bucket's max_seq"
    for group, width in zip(batch.plan.groups, bucket.widths, strict=True):
        is_wide = group.kind == "state" or width * group.block_size >= batch.seq_lens.max()
        assert is_wide, f"{width} columns do not hold the longest row"
        assert not shapes.width_buckets or width in (0, *shapes.width_buckets), f"{width} columns"
    if shapes.request_buckets:
        assert bucket.requests in shapes.request_buckets, f"{bucket.requests} rows"
    if bucket.kind == "decode":
        assert bucket.tokens == bucket.requests >= spec.batch.min_decode_rows, "not a decode bucket's shape"
        assert bucket.max_query == 1, "a decode bucket has one token per row"
    elif shapes.token_buckets:
        assert bucket.tokens in shapes.token_buckets, f"{bucket.tokens} tokens"
    if shapes.kind == "dynamic" and bucket.kind != "decode":
        assert bucket.tokens == batch.num_tokens, "a dynamic backend gets padding"


def expected_padding(batch: StepBatch) -> dict[str, tuple[int, object]]:
    """Per field how many entries are real, and what the others hold; as the contract's table says."""
    T, R, S = batch.num_tokens, batch.num_requests, batch.num_samples
    bucket, plan = batch.bucket, batch.plan
    is_decode = bucket.kind == "decode"
    tokens = np.arange(T, bucket.tokens)
    starts = np.arange(R + 1, bucket.requests + 1)
    wanted: dict[str, tuple[int, object]] = {
        "counts": (4, 0),
        "token_ids": (T, 0),
        "token_source": (T, -1),
        "positions": (T, 0),
        "row_of_token": (T, tokens if is_decode else bucket.requests),
        "query_start": (R + 1, starts if is_decode else T),
        "seq_lens": (R, 0),
        "request_slots": (R, plan.max_requests),
        "query_kind": (R, 0),
        "sample_rows": (S, 0),
        "sample_slots": (S, plan.max_requests),
        "adapter_slots": (R, 0),
        "prefix_group": (R, 0),
        "prefix_blocks": (R, 0),
    }
    for g in range(len(plan.groups)):
        wanted |= {f"block_tables.{g}": (R, 0), f"slots.{g}": (T, 0), f"state_read.{g}": (R, -1)}
        wanted |= {f"{name}.{g}": (R, 0) for name in ("state_write", "checkpoint_offset", "checkpoint_slot")}
    return wanted


def check_padding(batch: StepBatch, rules: BatchRules) -> None:
    """Every field has its declared shape, and its padding what the table says."""
    bucket, wanted = batch.bucket, expected_padding(batch)
    for name, view in batch.views.items():
        real, padding = wanted[name]
        assert (view[real:] == padding).all(), f"padding of {name} is {view[real:]}, wanted {padding}"
    for name in ("adapter_slots", "prefix_group", "prefix_blocks"):
        if name in batch.views:
            assert (batch.views[name] == 0).all(), f"{name} of a real row was never set"
    declared = {"adapter_slots": rules.adapters, "prefix_group": rules.prefix_groups}
    for name, is_declared in declared.items():
        assert (name in batch.views) == is_declared, f"{name} is there: {not is_declared}"
    counts = (batch.num_tokens, batch.num_requests, batch.num_decodes, batch.num_samples)
    assert tuple(batch.views["counts"]) == counts, "wrong counts"
    assert batch.positions.shape == (bucket.tokens,), "fields of tokens have another shape than the bucket"
    assert batch.query_start.shape == (bucket.requests + 1,), "fields of rows have another shape"


def check_books(plan: CachePlan, batch: StepBatch) -> None:
    """The real entries agree with one another."""
    T, R = batch.num_tokens, batch.num_requests
    starts = batch.query_start[: R + 1]
    assert starts[0] == 0 and starts[-1] == T and (np.diff(starts) > 0).all(), "query_start is wrong"
    assert (batch.row_of_token[:T] == np.repeat(np.arange(R), np.diff(starts))).all(), "row_of_token is wrong"
    slots = batch.request_slots[:R]
    assert len(set(slots.tolist())) == R, "a request has two rows"
    samples = batch.sample_slots[: batch.num_samples].tolist()
    assert len(set(samples)) == len(samples), "two sampled rows write one slot"
    row = batch.row_of_token[:T]
    for g, group in enumerate(plan.groups):
        if group.kind != "state":
            size, position = group.block_size, batch.positions[:T]
            block = batch.block_table(g)[row, position // size]
            assert (block > 0).all(), f"group {g}: a token is written to the pad block"
            assert (batch.slots(g)[:T] == block * size + position % size).all(), "slots and tables disagree"


def check_sampling(batch: StepBatch, sampling: SamplingBatch) -> None:
    """One entry per sampled row, with the type that the contract names."""
    n = batch.num_samples
    types = dict(temperature="f4", top_k="i4", top_p="f4", min_p="f4", seed="u8", position="i4", choice="i4")
    for name, dtype in types.items():
        array = getattr(sampling, name)
        assert array.shape == (n,) and array.dtype == np.dtype(dtype), f"{name}: {array.shape} {array.dtype}"
    wanted = batch.positions[batch.sample_rows[:n]] + 1
    assert (sampling.position == wanted).all(), "sampling positions are not those of the tokens to draw"
