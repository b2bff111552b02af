"""Attention over a paged cache, one query and one head at a time, each over exactly the keys that it sees.

A query's keys are gathered into an array of their own. So its arithmetic is the same whether it comes in a
prefill, in a chunk of one, or as a decode step, and whatever else is in the step or in the cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.cpu_reference.allocator import Cache
from backends.cpu_reference.arithmetic import capped, wide
from backends.cpu_reference.rows import real_rows
from core.contract.batch import Step
from core.contract.opspecs import AttentionSpec, LatentSpec, QScale

Array = npt.NDArray[Any]


def visible(position: int, length: int, spec: AttentionSpec) -> Array:
    """Positions [n], ascending, of the keys that a query sees in a row of `length` keys."""
    first, end = 0, position + 1 if spec.causal else length
    if spec.window is not None:
        first = max(first, position - spec.window + 1)
    if spec.chunk is not None:
        chunk = position // spec.chunk
        first, end = max(first, chunk * spec.chunk), min(end, (chunk + 1) * spec.chunk)
    return np.arange(first, min(end, length))


def query_scale(position: int, q_scale: QScale | None) -> float:
    """The factor by which a query grows with its position."""
    if q_scale is None:
        return 1.0
    return 1.0 + q_scale.factor * math.log(1.0 + (position + 1) // q_scale.floor)


def weigh(scores: Array, values: Array, sink: float | None) -> tuple[Array, float]:
    """Softmax of scores [n], with one more term exp(sink) in the denominator, times values [n, Hv].

    Returns:
        The mean of the values, [Hv], and the logarithm of the denominator.
    """
    top = float(scores.max() if sink is None else np.maximum(scores.max(), sink))
    e = np.exp(scores - top)
    total = float(e.sum())
    if sink is not None:
        total += math.exp(sink - top)
    return e @ values / total, top + math.log(total)


def attend(
    q: Any,
    k: Any | None,
    v: Any | None,
    cache: Cache,
    step: Step,
    spec: AttentionSpec,
    sinks: Any | None = None,
) -> tuple[Array, Array, Cache]:
    """As `Ops.attend`, in float64: (out [T, N, Hv], lse [T, N], cache)."""
    if k is not None and v is not None:
        cache = cache.write(step, k, v)
    T, N = q.shape[:2]
    out, lse = np.zeros((T, N, spec.v_head_size)), np.full((T, N), -np.inf)
    for row in real_rows(step):
        for t in row.tokens:
            position = int(step.positions[t])
            seen = visible(position, row.length, spec)
            if not len(seen):
                continue
            keys, values = (wide(x.transpose(1, 0, 2)) for x in cache.read(step, row.number, seen))
            queries = wide(q[t]) * query_scale(position, spec.q_scale)  # [N, H]
            for n in range(N):
                kv = n // (N // spec.num_kv_heads)
                scores = spec.scale * (keys[kv] @ queries[n])
                if spec.soft_cap is not None:
                    scores = capped(scores, spec.soft_cap)
                sink = None if sinks is None else float(sinks[n])
                out[t, n], lse[t, n] = weigh(scores, values[kv], sink)
    return out, lse, cache


def attend_latent(
    q_nope: Any,
    q_rope: Any,
    latent: Any | None,
    k_rope: Any | None,
    w_k: Any,
    w_v: Any,
    cache: Cache,
    step: Step,
    spec: LatentSpec,
) -> tuple[Array, Array, Cache]:
    """As `Ops.attend_latent`, in float64: (out [T, N, Hv], lse [T, N], cache). Keys are expanded."""
    if latent is not None and k_rope is not None:
        cache = cache.write(step, np.concatenate([latent, k_rope], axis=-1))
    N, C = spec.num_heads, spec.latent_size
    to_keys, to_values = wide(w_k).reshape(N, -1, C), wide(w_v).reshape(N, -1, C)
    T = q_nope.shape[0]
    out, lse = np.zeros((T, N, spec.v_head_size)), np.full((T, N), -np.inf)
    for row in real_rows(step):
        for t in row.tokens:
            (entries,) = cache.read(step, row.number, np.arange(int(step.positions[t]) + 1))
            c, r = wide(entries[:, :C]), wide(entries[:, C:])
            for n in range(N):
                keys = c @ to_keys[n].T  # [n, Hn]
                scores = spec.scale * (keys @ wide(q_nope[t, n]) + r @ wide(q_rope[t, n]))
                mean, lse[t, n] = weigh(scores, c, None)
                out[t, n] = to_values[n] @ mean
    return out, lse, cache
