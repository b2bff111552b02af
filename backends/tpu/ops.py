"""The op table in jax.numpy. Every op computes in float32 and rounds once to the activation dtype.

Fused ops are inherited: inside one compiled step the compiler joins what the composites keep apart.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from backends.tpu import state as state_ops
from backends.tpu.attention import LatentCache, PagedAttention, PagedCache, attend_latent
from backends.tpu.plugin import SPEC
from backends.tpu.state import StateCache
from core.contract.batch import Step
from core.contract.errors import UnsupportedError
from core.contract.interfaces import AttentionKernel
from core.contract.ops import Ops
from core.contract.opspecs import (
    Activation,
    AttentionSpec,
    ConvSpec,
    ExpertsSpec,
    ExpertWeights,
    LatentSpec,
    Rope,
    RouteSpec,
    ScanSpec,
)
from core.contract.types import Array, Packed

GLU_LIMIT = 7.0

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "sigmoid": jax.nn.sigmoid,
}


def _activate(x: Array, activation: Activation) -> Array:
    """float32 in and out; "swigluoai" has no form with one argument."""
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(
            f"activation {activation!r} works in glu and experts only; use another one here"
        )
    return _ACTIVATIONS[activation](x)


def _glu(x: Array, activation: Activation, limit: float | None) -> Array:
    """float32 [..., 2F] -> [..., F]; `limit` clamps for "swigluoai" only."""
    gate, up = jnp.split(x, 2, axis=-1)
    if activation != "swigluoai":
        return _activate(gate, activation) * up
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1.0) * gate * jax.nn.sigmoid(1.702 * gate)


def _product(x: Array, w: Array) -> Array:
    """x [..., D] with w [O, D] -> float32 [..., O]."""
    if x.dtype != w.dtype:
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(
        x, w, contract, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _one_expert(x: Array, packed: ExpertWeights, slot: Array, spec: ExpertsSpec) -> Array:
    """x [n, D] through the expert at `slot` -> float32 [n, D]."""
    y = _product(x, packed.gate_up[slot])
    if packed.gate_up_bias is not None:
        y += packed.gate_up_bias[slot].astype(jnp.float32)
    y = _product(_glu(y, spec.activation, spec.limit).astype(x.dtype), packed.down[slot])
    return y if packed.down_bias is None else y + packed.down_bias[slot].astype(jnp.float32)


class TpuOps(Ops):
    """Op table for one compute dtype; `attention` is the kernel of `attend` (None = the plain one)."""

    def __init__(self, dtype: str, attention: AttentionKernel | None = None) -> None:
        if dtype not in SPEC.dtypes:
            raise UnsupportedError(
                f"dtype {dtype!r} was asked for, but backend 'tpu' declares {SPEC.dtypes}; use one of these"
            )
        self.dtype = jnp.dtype(dtype)
        self.attention: AttentionKernel = PagedAttention() if attention is None else attention

    def select_tokens(self, step: Step) -> Array:
        return jnp.where(step.token_source < 0, step.token_ids, step.last[jnp.maximum(step.token_source, 0)])

    def embed(self, w: Packed, ids: Array, first: int = 0) -> Array:
        rows = ids - first
        held = (rows >= 0) & (rows < w.shape[0])
        return jnp.where(held[:, None], w[jnp.where(held, rows, 0)], 0).astype(self.dtype)

    def embed_step(self, w: Packed, step: Step, scale: float | None = None) -> Array:
        h = self.embed(w, self.select_tokens(step))
        # jax would round the factor to h's dtype before multiplying.
        return h if scale is None else (h.astype(jnp.float32) * scale).astype(h.dtype)

    def take(self, x: Array, rows: Array) -> Array:
        return x[rows]

    def linear(self, x: Array, w: Packed, bias: Packed | None = None, *, wide: bool = False) -> Array:
        y = _product(x, w)
        if bias is not None:
            y += bias.astype(jnp.float32)
        return y if wide else y.astype(x.dtype)

    def norm(self, x: Array, n: Packed | None, eps: float) -> Array:
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)
        return (y if n is None else y * n.astype(jnp.float32)).astype(x.dtype)

    def rope(self, x: Array, rope: Rope, step: Step) -> Array:
        size = rope.spec.rotary_size
        table = rope.table[step.positions].astype(jnp.float32)[:, None, :]  # [T, 1, rotary_size]
        cos, sin = table[..., : size // 2], table[..., size // 2 :]
        part = x[..., :size].astype(jnp.float32)
        if rope.spec.interleaved:
            a, b = part[..., 0::2], part[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(part.shape)
        else:
            a, b = part[..., : size // 2], part[..., size // 2 :]
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return jnp.concatenate([turned.astype(x.dtype), x[..., size:]], axis=-1)

    def glu(self, x: Array, activation: Activation) -> Array:
        return _glu(x.astype(jnp.float32), activation, GLU_LIMIT).astype(x.dtype)

    def gate(self, x: Array, g: Array, activation: Activation) -> Array:
        return (x.astype(jnp.float32) * _activate(g.astype(jnp.float32), activation)).astype(x.dtype)

    def soft_cap(self, x: Array, cap: float) -> Array:
        return (cap * jnp.tanh(x.astype(jnp.float32) / cap)).astype(x.dtype)

    def attend(
        self,
        q: Array,
        k: Array | None,
        v: Array | None,
        cache: PagedCache,
        step: Step,
        spec: AttentionSpec,
        sinks: Array | None = None,
        want_lse: bool = False,
    ) -> tuple[Array, Array | None, PagedCache]:
        return self.attention.attend(q, k, v, cache, step, spec, sinks, want_lse)

    def attend_latent(
        self,
        q_nope: Array,
        q_rope: Array,
        latent: Array | None,
        k_rope: Array | None,
        w_k: Packed,
        w_v: Packed,
        cache: LatentCache,
        step: Step,
        spec: LatentSpec,
        want_lse: bool = False,
    ) -> tuple[Array, Array | None, LatentCache]:
        return attend_latent(q_nope, q_rope, latent, k_rope, w_k, w_v, cache, step, spec, want_lse)

    def short_conv(
        self, x: Array, w: Packed, bias: Packed | None, cache: StateCache, step: Step, spec: ConvSpec
    ) -> tuple[Array, StateCache]:
        y, cache = state_ops.short_conv(x, w, bias, cache, step, spec)
        if spec.activation is not None:
            y = _activate(y, spec.activation)
        return y.astype(x.dtype), cache

    def state_scan(
        self,
        q: Array,
        k: Array,
        v: Array,
        a: Array,
        b: Array,
        a_log: Packed,
        dt_bias: Packed,
        cache: StateCache,
        step: Step,
        spec: ScanSpec,
    ) -> tuple[Array, StateCache]:
        y, cache = state_ops.state_scan(q, k, v, a, b, a_log, dt_bias, cache, step, spec)
        return y.astype(q.dtype), cache

    def route(self, logits: Array, spec: RouteSpec, bias: Packed | None = None) -> tuple[Array, Array]:
        logits = logits.astype(jnp.float32)
        scores = logits
        if spec.scoring != "softmax_topk":
            scores = jax.nn.softmax(logits, axis=-1) if spec.scoring == "softmax" else jax.nn.sigmoid(logits)
        choice = scores if bias is None else scores + bias.astype(jnp.float32)
        if spec.num_groups > 1:
            grouped = choice.reshape(-1, spec.num_groups, spec.num_experts // spec.num_groups)
            best = lax.top_k(grouped, min(2, grouped.shape[-1]))[0]
            group_scores = best[..., 0] if spec.group_score == "max" else best.sum(-1)
            kept = jax.nn.one_hot(lax.top_k(group_scores, spec.top_groups)[1], spec.num_groups).sum(1) > 0
            choice = jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
        ids = lax.top_k(choice, spec.top_k)[1].astype(jnp.int32)  # ties go to the lowest id
        weights = jnp.take_along_axis(scores, ids, axis=-1)
        if spec.scoring == "softmax_topk":
            weights = jax.nn.softmax(weights, axis=-1)
        if spec.normalize:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return ids, weights * spec.scale

    def experts(
        self,
        x: Array,
        ids: Array,
        weights: Array,
        packed: ExpertWeights,
        spec: ExpertsSpec,
        slot_of_expert: Array | None = None,
        tokens_per_rank: Array | None = None,
    ) -> Array:
        if tokens_per_rank is not None:
            raise UnsupportedError("backend 'tpu' has no expert parallelism yet; run with one rank")
        slots = ids if slot_of_expert is None else slot_of_expert[ids]  # [T, top_k]
        T, top_k = slots.shape
        wide = x.astype(jnp.float32)
        on_input = spec.weights_on_input

        def contribution(rows: Array, slot: Array, chosen: Array, weight: Array) -> Array:
            """rows [n, D], chosen bool [n], weight [n] -> float32 [n, D]."""
            given = (rows * weight[:, None] if on_input else rows).astype(x.dtype)
            y = _one_expert(given, packed, slot, spec)
            return jnp.where(chosen[:, None], y if on_input else y * weight[:, None], 0.0)

        num_slots = packed.gate_up.shape[0]
        if T * top_k <= num_slots:
            # Few tokens: read only the experts that were chosen.
            def pair(i: Array) -> Array:
                slot = slots[i // top_k, i % top_k]
                weight = weights[i // top_k, i % top_k]
                row = wide[i // top_k]
                return contribution(row[None], jnp.maximum(slot, 0), slot[None] >= 0, weight[None])[0]

            parts = lax.map(pair, jnp.arange(T * top_k, dtype=jnp.int32))
            return parts.reshape(T, top_k, -1).sum(1).astype(x.dtype)

        def add(total: Array, slot: Array) -> tuple[Array, None]:
            hit = slots == slot
            weight = jnp.where(hit, weights, 0.0).sum(-1)
            return total + contribution(wide, slot, hit.any(-1), weight), None

        zero = jnp.zeros(x.shape, jnp.float32)
        return lax.scan(add, zero, jnp.arange(num_slots, dtype=jnp.int32))[0].astype(x.dtype)
