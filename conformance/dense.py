"""The ops once more, over whole sequences and with no cache: what the reference backend is checked against.

Float64, in the array form of the textbooks: masks over full score matrices, products of whole matrices. Each
function also gives the bound of rule A for its result, from the exact intermediate values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from conformance.tolerance import (
    Error,
    Precision,
    Scores,
    activation_error,
    attention_error,
    linear_error,
    lse_error,
    norm_error,
    product_error,
    rotation_error,
    sum_error,
)
from core.contract.opspecs import Activation, AttentionSpec, LatentSpec, ScanSpec

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bounded:
    """An exact value and the absolute error that its computation may have."""

    value: Array
    error: Error = 0.0

    def __getitem__(self, index: Any) -> Bounded:
        error = np.broadcast_to(self.error, self.value.shape)
        return Bounded(self.value[index], error[index])

    def reshape(self, *shape: int) -> Bounded:
        error = np.broadcast_to(self.error, self.value.shape)
        return Bounded(self.value.reshape(shape), error.reshape(shape))


def linear(x: Bounded, w: Array, p: Precision, bias: Array | None = None) -> Bounded:
    y = x.value @ w.T + (0.0 if bias is None else bias)
    return Bounded(y, linear_error(x.value, w, y, p, x.error))


def norm(x: Bounded, n: Array | None, eps: float, p: Precision) -> Bounded:
    n = np.ones(x.value.shape[-1]) if n is None else n
    y = x.value * n / np.sqrt(np.mean(x.value**2, -1, keepdims=True) + eps)
    return Bounded(y, norm_error(x.value, n, y, eps, p, x.error))


def rope(x: Bounded, positions: Array, size: int, interleaved: bool, table: Array, p: Precision) -> Bounded:
    """x [T, N, H] as complex numbers, multiplied by unit vectors."""
    half = size // 2
    turn = (table[:, :half] + 1j * table[:, half:])[positions][:, None, :]
    head, rest = x.value[..., :size], x.value[..., size:]
    pairs = (
        head.reshape(*head.shape[:-1], half, 2) if interleaved else np.stack(np.split(head, 2, -1), axis=-1)
    )
    z = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
    parts = (z.real, z.imag)
    turned = np.stack(parts, -1).reshape(head.shape) if interleaved else np.concatenate(parts, -1)
    y = np.concatenate([turned, rest], -1)
    return Bounded(y, rotation_error(x.value, y, half, p, x.error))


_erfc: Any = np.frompyfunc(math.erfc, 1, 1)
erf = np.vectorize(math.erf, otypes=[np.float64])
"""The error function, element by element."""


def activate(x: Bounded, activation: Activation, p: Precision) -> Bounded:
    v = x.value
    formulas: dict[str, Callable[[], Any]] = {
        "silu": lambda: v / (1 + np.exp(-v)),
        "sigmoid": lambda: 1 / (1 + np.exp(-v)),
        "gelu": lambda: v * _erfc(-v / math.sqrt(2)).astype(np.float64) / 2,
        "gelu_tanh": lambda: v / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    }
    y = formulas[activation]()
    return Bounded(y, activation_error(v, p, x.error))


def multiply(a: Bounded, b: Bounded, p: Precision) -> Bounded:
    y = a.value * b.value
    return Bounded(y, product_error(a.value, b.value, p, a.error, b.error) + 0.0 * y)


def add(a: Bounded, b: Bounded, p: Precision) -> Bounded:
    return Bounded(a.value + b.value, sum_error(a.value, b.value, p, a.error, b.error))


def glu(x: Bounded, activation: Activation, p: Precision, limit: float | None = 7.0) -> Bounded:
    F = x.value.shape[-1] // 2
    a, up = x[..., :F], x[..., F:]
    if activation != "swigluoai":
        return multiply(activate(a, activation, p), up, p)
    if limit is not None:
        a = Bounded(np.minimum(a.value, limit), a.error)
        up = Bounded(np.clip(up.value, -limit, limit), up.error)
    slope = 1.702
    swish = activate(Bounded(slope * a.value, slope * a.error), "silu", p)
    swish = Bounded(swish.value / slope, swish.error)
    return multiply(swish, add(up, Bounded(np.ones(F)), p), p)


def seen(n: int, spec: AttentionSpec) -> npt.NDArray[np.bool_]:
    """Which keys (columns) each query (rows) of a sequence of n tokens sees."""
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    mask = np.ones((n, n), np.bool_)
    if spec.causal:
        mask &= j <= i
    if spec.window is not None:
        mask &= i - j < spec.window
    if spec.chunk is not None:
        mask &= i // spec.chunk == j // spec.chunk
    return mask


def attend(
    q: Bounded, k: Bounded, v: Bounded, spec: AttentionSpec, sinks: Array | None, p: Precision
) -> tuple[Bounded, Bounded]:
    """One sequence: q [n, N, H], k [n, K, H], v [n, K, Hv] -> (out [n, N, Hv], lse [n, N])."""
    n, N, H = q.value.shape
    heads = np.arange(N) // (N // spec.num_kv_heads)
    grown = np.ones(n)
    if spec.q_scale is not None:
        grown += spec.q_scale.factor * np.log1p((np.arange(n) + 1) // spec.q_scale.floor)
    qv = q.value * grown[:, None, None]
    kv, vv = k.value[:, heads], v.value[:, heads]
    q_error = np.broadcast_to(q.error, qv.shape) * grown[:, None, None]
    if spec.q_scale is not None:
        q_error = q_error + (p.exp + 2) * p.u_acc * np.abs(qv)
    k_error = np.broadcast_to(k.error, k.value.shape)[:, heads]
    v_error = np.broadcast_to(v.error, v.value.shape)[:, heads]
    scores = spec.scale * np.einsum("inh,jnh->nij", qv, kv)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
    scores = np.where(seen(n, spec), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - scores.max(-1, keepdims=True))
    lse = (scores.max(-1, keepdims=True) + np.log(total))[..., 0].T  # [n, N]
    weights = weights / total
    out = np.einsum("nij,jnh->inh", weights, vv)
    sizes = abs(spec.scale) * np.einsum("inh,jnh->nij", np.abs(qv), np.abs(kv))
    carried = abs(spec.scale) * (
        np.einsum("inh,jnh->nij", q_error, np.abs(kv)) + np.einsum("inh,jnh->nij", np.abs(qv), k_error)
    )
    error, error_lse = np.zeros_like(out), np.zeros_like(lse)
    for i in range(n):
        keys = seen(n, spec)[i]
        for h in range(N):
            s = Scores(
                scores[h, i, keys],
                sizes[h, i, keys],
                weights[h, i, keys],
                H,
                float(carried[h, i, keys].max()),
                spec.soft_cap,
            )
            error[i, h] = attention_error(s, vv[keys, h], out[i, h], p, v_error[keys, h])
            error_lse[i, h] = lse_error(s, lse[i, h], p)
    return Bounded(out, error), Bounded(lse, error_lse)


def attend_latent(
    q_nope: Bounded,
    q_rope: Bounded,
    latent: Bounded,
    k_rope: Bounded,
    w_k: Array,
    w_v: Array,
    spec: LatentSpec,
    p: Precision,
) -> tuple[Bounded, Bounded]:
    """One sequence of n tokens, by absorbing: attention of N heads over one key [C + P] with values [C].

    Bounds hold for either order of the three-fold product: its sums have Hn and then C terms.
    """
    N, C = spec.num_heads, spec.latent_size
    to_keys, to_values = w_k.reshape(N, -1, C), w_v.reshape(N, -1, C)
    n = len(latent.value)
    absorbed = np.einsum("inh,nhc->inc", q_nope.value, to_keys)
    sizes = np.einsum("inh,nhc->inc", np.abs(q_nope.value), np.abs(to_keys))
    error = np.einsum("inh,nhc->inc", np.broadcast_to(q_nope.error, q_nope.value.shape), np.abs(to_keys))
    error = error + (p.sums(spec.nope_size) + p.u_out) * sizes
    q = Bounded(
        np.concatenate([absorbed, q_rope.value], -1),
        np.concatenate([error, np.broadcast_to(q_rope.error, q_rope.value.shape)], -1),
    )
    c, r = latent.reshape(n, 1, C), k_rope.reshape(n, 1, spec.rope_size)
    k = Bounded(
        np.concatenate([c.value, r.value], -1),
        np.concatenate([np.broadcast_to(x.error, x.value.shape) for x in (c, r)], -1),
    )
    one_head = AttentionSpec(
        scale=spec.scale, num_heads=N, num_kv_heads=1, head_size=C + spec.rope_size, v_head_size=C
    )
    mean, lse = attend(q, k, c, one_head, None, p)
    heads = [linear(mean[:, h], to_values[h], p) for h in range(N)]
    out = Bounded(np.stack([x.value for x in heads], 1), np.stack([x.error for x in heads], 1))
    return out, lse


def short_conv(
    x: Array, w: Array, bias: Array | None, activation: Activation | None, p: Precision
) -> Bounded:
    """One sequence x [n, C] with w [C, W]."""
    n, W = len(x), w.shape[1]
    padded = np.concatenate([np.zeros((W - 1, x.shape[1])), x])
    y = sum(w[:, i] * padded[i : i + n] for i in range(W)) + (0.0 if bias is None else bias)
    size = sum(np.abs(w[:, i] * padded[i : i + n]) for i in range(W)) + np.abs(y)
    out = Bounded(np.asarray(y), p.sums(W + 1) * np.asarray(size))
    if activation is not None:
        out = activate(out, activation, p)
    return Bounded(out.value, out.error + p.u_out * np.abs(out.value) + p.tiny)


def gated_delta(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    a_log: Array,
    dt_bias: Array,
    spec: ScanSpec,
    p: Precision,
) -> Bounded:
    """One sequence. The state's error obeys the recurrence of the state itself, with absolute values."""
    N, repeat = spec.num_v_heads, spec.num_v_heads // spec.num_k_heads
    q, k = (np.repeat(x, repeat, axis=1) for x in (q, k))
    unit = 0.0
    if spec.l2_norm_eps is not None:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + spec.l2_norm_eps) for x in (q, k))
        unit = p.sums(spec.k_size) / 2 + 3 * p.u_acc
    q = q * spec.scale
    g = -np.exp(a_log) * np.log1p(np.exp(a + dt_bias))
    beta = 1 / (1 + np.exp(-b))
    off_beta = p.exp + 2 + 2 * np.abs(b)
    sums = p.sums(spec.k_size) + 3 * p.u_acc
    out, error = np.zeros(v.shape), np.zeros(v.shape)
    S, E = np.zeros((2, N, spec.k_size, spec.v_size))
    for t in range(len(v)):
        decay = np.exp(g[t])[:, None, None]
        off_decay = (3 * p.exp + np.abs(a_log) + 3 * np.abs(g[t]) * (p.exp + 2))[:, None, None] * p.u_acc
        E = decay * E + off_decay * np.abs(decay * S)
        S = decay * S
        key, b_t = np.abs(k[t])[:, :, None], beta[t][:, None]
        kS, sized = np.einsum("nk,nkv->nv", k[t], S), np.einsum("nk,nkv->nv", np.abs(k[t]), np.abs(S))
        update = b_t * (v[t] - kS)
        off = b_t * (np.einsum("nk,nkv->nv", np.abs(k[t]), E) + (sums + unit) * sized)
        off = off + np.abs(update) * (unit + p.u_acc * (off_beta[t][:, None] + 4))
        E = E + key * off[:, None, :]
        S = S + k[t][:, :, None] * update[:, None, :]
        E = E + (2 * p.u_acc + p.u_wide) * np.abs(S)
        out[t] = np.einsum("nk,nkv->nv", q[t], S)
        error[t] = np.einsum("nk,nkv->nv", np.abs(q[t]), E + (sums + unit) * np.abs(S))
    return Bounded(out, error + p.u_out * np.abs(out) + p.tiny)
