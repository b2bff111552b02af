"""L2: scores that are far apart, sinks beyond all scores, and inputs of a convolution stored on the way."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from conformance.bench import Array, Bench
from conformance.check import Check, Context
from conformance.levels.addressing import code_size
from conformance.levels.kernels import expected, in_dtype
from conformance.opcases import cached
from conformance.opcases.base import activations, bias_use, table
from conformance.opcases.cached import attention_spec, layer_of
from conformance.world import Row, World
from core.contract.opspecs import AttentionSpec
from core.contract.spec import BackendSpec

STEP = 64.0
"""Scores of neighbouring keys are 64^2 apart: e^-4096 is 0 in every format, e^4096 in none finite."""
SINK = 1e6
LENGTHS = (11, 3)


def apart(context: Context, sign: float, sinks: tuple[float, float] | None) -> None:
    """Scores thousands apart: the largest takes all, unless a sink is larger still.

    Args:
        sign: 1 = the newest key has the largest score, -1 = the oldest. sinks: of the two heads.
    """
    H = code_size(context.spec)
    spec = attention_spec(N=2, K=1, H=H, sinks=sinks is not None)
    world = World(LENGTHS, (layer_of(spec),)).fitted(context.spec)
    at = np.concatenate([np.arange(n) for n in LENGTHS])
    n = len(at)
    q, k, v = np.zeros((n, 2, H)), np.zeros((n, 1, H)), np.zeros((n, 1, H))
    q[:, :, 0], k[:, 0, 0] = sign * STEP / spec.scale, STEP * at
    v[:, 0, 0], v[:, 0, 1] = at + 1, 1
    found = _attention(context, world, spec, q, k, v, sinks).reshape(n, 2, H)
    best = at if sign > 0 else 0 * at
    wanted = np.zeros((n, 2, 2))
    for head in range(2):
        if sinks is None or sinks[head] < 0:
            wanted[:, head, 0], wanted[:, head, 1] = best + 1, 1
    context.equal(found[:, :, :2], wanted, "what is read at scores thousands apart")


def _attention(
    context: Context,
    world: World,
    spec: AttentionSpec,
    q: Array,
    k: Array,
    v: Array,
    sinks: tuple[float, float] | None,
) -> Array:
    N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_size
    source, slices = table(q, k, v)
    inputs = {"x": source, "sinks": bias_use(np.array(sinks or (0.0, 0.0)))}

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        a, b, c = activations(ops, w, step, slices)
        a, b, c = a.reshape(-1, N, H), b.reshape(-1, K, H), c.reshape(-1, K, H)
        given = w["sinks"] if spec.sinks else None
        out, _, cache = ops.attend(a, b, c, caches[0], step, spec, given, False)
        return out.reshape(-1, N * H), (cache,)

    bench = Bench(context.subject, context.dtype, in_dtype(world, context.dtype), inputs, fn)
    return bench.run(world.mixed())


def checkpoints(context: Context, op: str, offset: int) -> None:
    """Two rows of a step store their states, each after so many tokens, and go on as if never stopped."""
    case = next(case for case in cached.cases() if case.op == op)
    world = case.world.fitted(context.spec)
    bench = Bench(context.subject, context.dtype, in_dtype(world, context.dtype), case.inputs, case.fn)
    offsets = {0: offset, 2: 13 - offset}
    rows = [
        Row(s, 0, 12, checkpoint_offset=at, checkpoint=world.checkpoint_slot(s)) for s, at in offsets.items()
    ]
    found: dict[tuple[int, int], Array] = {}
    for step in world.legal([rows], bench.rules):
        found |= bench.step(step)
    for s in offsets:
        found |= bench.step([Row(s, 12, 6)])
    again: dict[tuple[int, int], Array] = {}
    for s, at in offsets.items():
        again |= bench.step([Row(s, at, 11 if s == 0 else 18 - at)], read=world.checkpoint_slot(s))
    wanted = expected(case, world, "whole")
    error = np.broadcast_to(np.asarray(case.exact(context.precision).error), wanted.shape)
    for (sequence, position), row in [*found.items(), *again.items()]:
        t = world.first_id(sequence) + position
        context.within(row, wanted[t], error[t], f"sequence {sequence}: the token at position {position}")


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    for sign, name in ((1.0, "newest"), (-1.0, "oldest")):
        about = f"the {name} key takes all where its score is thousands above the others"
        yield Check(f"L2/extremes/apart-{name}", partial(apart, sign=sign, sinks=None), about)
        about = "a sink far above all scores leaves nothing, one far below changes nothing"
        yield Check(
            f"L2/extremes/sinks-{name}",
            partial(apart, sign=sign, sinks=(SINK, -SINK)),
            about,
            ("attention.sinks",),
        )
    for op, name, about in (
        ("state_scan", "offset", "a state stored within a chunk is that after so many tokens, of each row"),
        (
            "short_conv",
            "conv-offset",
            "a convolution's inputs stored within a chunk are those of so many tokens",
        ),
    ):
        for offset in (1, 7, 12):
            yield Check(
                f"L2/checkpoints/{name}-{offset}",
                partial(checkpoints, op=op, offset=offset),
                about,
                ("state_kinds",),
                profile="state",
            )
