"""What is wrong with a step under the rules that a backend declares; written from the rules alone.

Nothing here is shared with the scheduler or the bucket ladder, which are what is checked.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from core.contract import derive
from core.contract.batch import DECODE, PREFILL, StepBatch
from core.contract.spec import BackendSpec


def violations(spec: BackendSpec, batch: StepBatch, is_compiled: bool) -> Iterator[str]:
    """Sentences, each with what was found and what is allowed.

    Args:
        is_compiled: the step's program was compiled before the first step was served.
    """
    yield from _rows(spec, batch)
    yield from _decode(spec, batch)
    yield from _shape(spec, batch, is_compiled)
    yield from _cache(spec, batch)
    yield from _padding(batch)


def _rows(spec: BackendSpec, batch: StepBatch) -> Iterator[str]:
    rules, R, T = spec.batch, batch.num_requests, batch.num_tokens
    kinds, starts = batch.query_kind[:R], batch.query_start[: R + 1]
    prefills = np.flatnonzero(kinds == PREFILL)
    others = R - len(prefills)
    if (np.diff(kinds == PREFILL) < 0).any() if R else False:
        yield "a decode row comes after a prefill row"
    if not rules.mixed and len(prefills) and others:
        yield f"{len(prefills)} prefill and {others} decode rows share a step, but steps are not mixed"
    if rules.max_prefills is not None and len(prefills) > rules.max_prefills:
        yield f"the step has {len(prefills)} prefill rows, but {rules.max_prefills} are allowed"
    for what, count, most in (
        ("tokens", max(T, batch.bucket.tokens), rules.max_tokens),
        ("rows", max(R, batch.bucket.requests), rules.max_requests),
    ):
        if most is not None and count > most:
            yield f"the step has {count} {what}, padding included, but {most} are allowed"
    ends = set(batch.sample_rows[: batch.num_samples].tolist())
    for row in prefills:
        count, last = int(starts[row + 1] - starts[row]), int(starts[row + 1]) - 1
        if count % rules.prefill_multiple and last not in ends:
            yield (
                f"row {row} is a chunk of {count} tokens and not its prompt's last, but multiples of "
                f"{rules.prefill_multiple} are wanted"
            )


def _decode(spec: BackendSpec, batch: StepBatch) -> Iterator[str]:
    rules, R = spec.batch, batch.num_requests
    if not R or (batch.query_kind[:R] != DECODE).any():
        return
    sizes = [group.block_size for group in batch.plan.groups if group.kind != "state"]
    longest, size = int(batch.seq_lens[:R].max()), max(sizes, default=1)
    area = max(R, rules.min_decode_rows) * -(-longest // size) * size
    if rules.max_rows_x_context is not None and area > rules.max_rows_x_context:
        yield (
            f"{R} decode rows of up to {longest} tokens take {area} rows x context, but "
            f"{rules.max_rows_x_context} are allowed"
        )
    if batch.bucket.kind != "decode":
        yield f"a step of decode rows alone has a bucket of kind {batch.bucket.kind}"
    if batch.bucket.requests < rules.min_decode_rows:
        yield (
            f"a decode bucket has {batch.bucket.requests} rows, but at least {rules.min_decode_rows} are "
            "wanted"
        )
    if rules.rectangular_decode:
        for g, group in enumerate(batch.plan.groups):
            if group.kind == "state":
                continue
            try:
                derive.left_padded_rectangle(batch, g, batch.bucket.widths[g])
            except ValueError as error:
                yield str(error)


def _shape(spec: BackendSpec, batch: StepBatch, is_compiled: bool) -> Iterator[str]:
    shapes, bucket = spec.shapes, batch.bucket
    if shapes.kind == "dynamic":
        return
    if shapes.kind == "static" and not is_compiled:
        yield f"{bucket} was not compiled before serving"
    ladders = [("rows", bucket.requests, shapes.request_buckets)]
    if bucket.kind != "decode":
        ladders.append(("tokens", bucket.tokens, shapes.token_buckets))
    elif bucket.tokens != bucket.requests:
        yield f"a decode bucket has {bucket.tokens} tokens and {bucket.requests} rows; as many are wanted"
    for g, group in enumerate(batch.plan.groups):
        if group.kind != "state":
            ladders.append((f"columns of group {g}", bucket.widths[g], shapes.width_buckets))
    for what, value, ladder in ladders:
        # Without a ladder of its own a backend gets powers of two, or a limit of the engine's.
        if ladder and value not in ladder:
            yield f"the bucket has {value} {what}, but {ladder} are the sizes there are"


def _cache(spec: BackendSpec, batch: StepBatch) -> Iterator[str]:
    rules = spec.cache
    for g, group in enumerate(batch.plan.groups):
        if group.kind == "state":
            continue
        if group.block_size not in rules.block_sizes:
            yield f"blocks of {group.block_size} tokens, but {rules.block_sizes} are the sizes there are"
        if group.num_blocks % rules.num_blocks_multiple:
            yield f"{group.num_blocks} blocks, but multiples of {rules.num_blocks_multiple} are wanted"
        table = batch.block_table(g)
        if rules.max_table_bytes is not None and table.nbytes > rules.max_table_bytes:
            yield f"a block table of {table.nbytes} bytes, but {rules.max_table_bytes} are allowed"


def _padding(batch: StepBatch) -> Iterator[str]:
    T, R = batch.num_tokens, batch.num_requests
    if batch.seq_lens[R:].any():
        yield "a padded row has a length"
    for g, group in enumerate(batch.plan.groups):
        if group.kind == "state":
            continue
        if (batch.slots(g)[T:] >= group.block_size).any():
            yield f"a padded token writes outside the pad block of group {g}"
        used = -(-batch.seq_lens[:R] // group.block_size)
        is_real = np.arange(batch.bucket.widths[g]) < used[:, None]
        if batch.block_table(g)[:R][~is_real].any() or batch.block_table(g)[R:].any():
            yield f"a block table of group {g} has a block where the pad block is wanted"
