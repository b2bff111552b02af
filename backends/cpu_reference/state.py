"""Layers that keep a state per row in place of keys: short convolution and gated delta rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from backends.cpu_reference.allocator import Cache
from backends.cpu_reference.arithmetic import activate, sigmoid, softplus, wide
from backends.cpu_reference.rows import Row, real_rows
from core.contract.batch import Step
from core.contract.opspecs import ConvSpec, ScanSpec

Array = npt.NDArray[Any]


def _begin(cache: Cache, name: str, step: Step) -> list[tuple[Row, Array]]:
    """Each real row and a copy of the state that it continues from; all are read before any is written."""
    fields = step.state(cache.group)
    part = cache.parts[name]
    cache.touch([slot for slot in fields.read if slot >= 0])
    found = []
    for row in real_rows(step):
        slot = int(fields.read[row.number])
        found.append((row, np.zeros_like(part[0]) if slot < 0 else part[slot].copy()))
    return found


def _store(cache: Cache, name: str, slot: Any, state: Array) -> None:
    cache.touch([slot])
    cache.parts[name][slot] = state


def short_conv(
    x: Any, w: Any, bias: Any | None, cache: Cache, step: Step, spec: ConvSpec
) -> tuple[Array, Cache]:
    """As `Ops.short_conv`, in float64."""
    fields = step.state(cache.group)
    cache = cache.succeed()
    w, W = wide(w), spec.width
    out = np.zeros(x.shape)
    for row, before in _begin(cache, "conv", step):
        inputs = np.concatenate([before.T, x[row.tokens.start : row.tokens.stop]]).astype(np.float64)
        for i, t in enumerate(row.tokens):
            y = np.zeros(spec.channels) if bias is None else wide(bias)
            for j in range(W):
                y = y + w[:, j] * inputs[i + j]
            out[t] = y if spec.activation is None else activate(y, spec.activation)
        count = len(row.tokens)
        _store(cache, "conv", fields.write[row.number], inputs[count : count + W - 1].T)
        offset = int(fields.checkpoint_offset[row.number])
        if offset:
            slot = fields.checkpoint_slot[row.number]
            _store(cache, "conv", slot, inputs[offset : offset + W - 1].T)
    return out, cache


def gated_delta(
    q: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    a_log: Any,
    dt_bias: Any,
    cache: Cache,
    step: Step,
    spec: ScanSpec,
) -> tuple[Array, Cache]:
    """As `Ops.state_scan`, in float64.

    The state is rounded to its part's dtype after every token, so that cutting a row into chunks, which
    stores it in between, changes nothing.
    """
    fields = step.state(cache.group)
    cache = cache.succeed()
    N, per_key = spec.num_v_heads, spec.num_v_heads // spec.num_k_heads
    rate, shift = np.exp(wide(a_log)), wide(dt_bias)
    out = np.zeros(v.shape)
    for row, state in _begin(cache, "scan", step):
        offset = int(fields.checkpoint_offset[row.number])
        for i, t in enumerate(row.tokens):
            decay = np.exp(-rate * softplus(wide(a[t]) + shift))  # [N]
            beta = sigmoid(wide(b[t]))
            for n in range(N):
                query = _unit(q[t, n // per_key], spec.l2_norm_eps) * spec.scale
                key = _unit(k[t, n // per_key], spec.l2_norm_eps)
                S = wide(state[n]) * decay[n]
                S = S + np.outer(key, beta[n] * (wide(v[t, n]) - key @ S))
                out[t, n] = query @ S
                state[n] = S
            if i + 1 == offset:
                _store(cache, "scan", fields.checkpoint_slot[row.number], state)
        _store(cache, "scan", fields.write[row.number], state)
    return out, cache


def _unit(x: Any, eps: float | None) -> Array:
    x = wide(x)
    return x if eps is None else x / np.sqrt(x @ x + eps)
