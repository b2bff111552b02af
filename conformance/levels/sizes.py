"""L2 at sizes of real models and loads: kernels that are right for small ones may hold a limit within.

Ids beyond 16 bits, sums over thousands of products, rows by the dozen, contexts of many tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from conformance.bench import Bench, Input
from conformance.check import Check, Context
from conformance.levels.addressing import attention
from conformance.levels.kernels import rule_a
from conformance.opcases import cached
from conformance.opcases.base import Case, activations, product_use, table
from conformance.opcases.cached import attention_spec, layer_of
from conformance.world import World
from core.contract.spec import BackendSpec

VOCABULARY = 70_001
DEPTH = 8192
ROWS = {33: True, 250: False}
"""Requests of a step, and whether a quick run has them; a number up to 256 is exact in every dtype."""
CONTEXTS = {1030: True, 2053: False}
SCANS = {300: True, 1030: False}


def product(context: Context, tokens: int, outputs: int, depth: int, most: int) -> None:
    """Integers whose sums float32 holds exactly, and no narrower format."""
    rng = context.rng()
    x = rng.integers(-most, most + 1, (tokens, depth)).astype(float)
    w = rng.integers(-most, most + 1, (outputs, depth)).astype(float)

    def fn(ops: Any, weights: Any, caches: Any, step: Any) -> Any:
        (given,) = activations(ops, weights, step, [slice(None)])
        return ops.linear(given, weights["w"], None, wide=True), caches

    inputs = {"x": table(x)[0], "w": product_use(w)}
    bench = Bench(context.subject, context.dtype, World((tokens,)).fitted(context.spec), inputs, fn)
    context.equal(bench.run(bench.world.whole()), x @ w.T, f"{outputs} sums of {depth} products of integers")


def late_rows(context: Context, first: int) -> None:
    """Rows of a table whose ids need more than 15 or 16 bits."""
    tokens = 8
    ids = np.arange(VOCABULARY)
    rows = np.stack([ids % 100, ids // 100 % 100, ids // 10_000, *np.zeros((5, VOCABULARY))], 1)

    def fn(ops: Any, weights: Any, caches: Any, step: Any) -> Any:
        return ops.embed(weights["table"], ops.select_tokens(step) + first), caches

    inputs = {"table": Input(rows, ("embed",))}
    bench = Bench(context.subject, context.dtype, World((tokens,)).fitted(context.spec), inputs, fn)
    wanted = rows[first : first + tokens]
    context.equal(
        bench.run(bench.world.whole()), wanted, f"rows from {first} of an embedding of {VOCABULARY}"
    )


def many_rows(context: Context, rows: int) -> None:
    most = context.spec.batch.max_requests or rows
    attention(context, "grouped", None, "leaving", False, (5,) * min(rows, most))


def long_context(length: int) -> Case:
    """Attention over many tiles, the last tokens of which come one by one."""
    world = World((length, 5), (layer_of(attention_spec()),))
    return next(cached.attention_cases({f"long-{length}": (attention_spec(), None)}, world))


def long_scan(length: int) -> Case:
    """A scan over many chunks, the last tokens of which come one by one."""
    return cached.scan_case(f"state_scan-{length}", (length, 7), cached.SCAN)


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    about = "logits of a large vocabulary are sums in float32, of every id"
    yield Check(
        f"L2/linear/outputs-{VOCABULARY}",
        partial(product, tokens=2, outputs=VOCABULARY, depth=16, most=7),
        about,
    )
    about = "sums over a large width are exact and leave nothing out"
    yield Check(f"L2/linear/depth-{DEPTH}", partial(product, tokens=3, outputs=5, depth=DEPTH, most=2), about)
    for first in (32_764, 65_532, VOCABULARY - 8):
        about = "rows of a large embedding are looked up as they are"
        yield Check(f"L2/embed/rows-from-{first}", partial(late_rows, first=first), about)
    for rows, is_quick in ROWS.items():
        about = "each of many requests in a step reads its own blocks"
        run = partial(many_rows, rows=rows)
        yield Check(f"L2/attend/rows-{rows}", run, about, is_quick=is_quick, is_waivable=False)
    for sizes, make, profile in ((CONTEXTS, long_context, "dense"), (SCANS, long_scan, "state")):
        for length, is_quick in sizes.items():
            case = make(length)
            yield Check(
                f"L2/{case.op}/{case.name}",
                rule_a(case, "leaving"),
                f"{case.op}: every element of {length} tokens within the theoretical bound",
                supported=case.supported,
                profile=profile,
                is_quick=is_quick,
            )
