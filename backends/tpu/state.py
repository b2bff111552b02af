"""State layers: short convolution and gated delta rule, with one state slot per row and optional checkpoints.

Slot 0 is the pad slot, so padded rows and rows without a checkpoint write there unconditionally.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from backends.tpu.attention import einsum, static_fields
from core.contract.batch import StateStep, Step
from core.contract.errors import UnsupportedError
from core.contract.opspecs import ConvSpec, ScanSpec
from core.contract.types import Array, CacheLayerSpec, Packed


@partial(jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=static_fields)
@dataclass(frozen=True)
class StateCache:
    """One state layer's slots: for each part of `layer.state`, an array [num_blocks, *shape]."""

    parts: tuple[Array, ...]
    group: int
    layer: CacheLayerSpec

    def part(self, name: str) -> tuple[int, Array]:
        """Index and array of a part.

        Raises:
            UnsupportedError: the layer has no such part.
        """
        for i, spec in enumerate(self.layer.state):
            if spec.name == name:
                return i, self.parts[i]
        held = [spec.name for spec in self.layer.state]
        raise UnsupportedError(
            f"the state layer holds {held}, but the op needs {name!r}; add it to the layer"
        )

    def store(self, index: int, fields: StateStep, last: Array, checkpoint: Array) -> StateCache:
        """The cache with the rows' states [R, *shape] in their slots."""
        part = self.parts[index]
        part = part.at[fields.write].set(last.astype(part.dtype))
        part = part.at[fields.checkpoint_slot].set(checkpoint.astype(part.dtype))
        return replace(self, parts=(*self.parts[:index], part, *self.parts[index + 1 :]))


def _read(part: Array, slots: Array) -> Array:
    """The rows' states [R, *shape] before the step; zeros where the slot is -1."""
    fresh = (slots < 0).reshape(-1, *(1,) * (part.ndim - 1))
    return jnp.where(fresh, 0, part[jnp.maximum(slots, 0)])


def _places(step: Step) -> tuple[Array, Array]:
    """Of every token: its row, clipped for padding, and its offset in the row; both int32 [T]."""
    rows = jnp.minimum(step.row_of_token, step.bucket.requests - 1)
    tokens = jnp.arange(step.bucket.tokens, dtype=jnp.int32)
    return rows, jnp.maximum(tokens - step.query_start[rows], 0)


def short_conv(
    x: Array, w: Packed, bias: Packed | None, cache: StateCache, step: Step, spec: ConvSpec
) -> tuple[Array, StateCache]:
    """As `Ops.short_conv`, without the activation: float32 [T, C]. Every token gathers its own window."""
    fields = step.state(cache.group)
    index, part = cache.part("conv")
    T, keep = step.bucket.tokens, spec.width - 1
    old = _read(part, fields.read)  # [R, C, W - 1]
    rows, offsets = _places(step)
    tokens = jnp.arange(T, dtype=jnp.int32)
    y = (
        jnp.zeros(x.shape, jnp.float32)
        if bias is None
        else jnp.broadcast_to(bias, x.shape).astype(jnp.float32)
    )
    for i in range(spec.width):
        back = keep - i
        value = x[jnp.maximum(tokens - back, 0)]
        if back:
            before = old[rows, :, jnp.clip(offsets + i, 0, keep - 1)]
            value = jnp.where((offsets >= back)[:, None], value, before)
        y += w[:, i].astype(jnp.float32) * value.astype(jnp.float32)

    def after(count: Array) -> Array:
        """The last W - 1 inputs of each row after `count` [R] of its tokens: [R, C, W - 1]."""
        at = count[:, None] - keep + jnp.arange(keep, dtype=jnp.int32)  # [R, W - 1]
        new = x[jnp.clip(step.query_start[:-1, None] + at, 0, T - 1)].transpose(0, 2, 1)
        kept = jnp.take_along_axis(old, jnp.clip(at + keep, 0, keep - 1)[:, None, :], axis=2)
        return jnp.where((at >= 0)[:, None, :], new, kept)

    lengths = step.query_start[1:] - step.query_start[:-1]
    return y, cache.store(index, fields, after(lengths), after(fields.checkpoint_offset))


def _unit(x: Array, eps: float | None) -> Array:
    x = x.astype(jnp.float32)
    return x if eps is None else x * lax.rsqrt((x * x).sum(-1, keepdims=True) + eps)


def state_scan(
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
    """As `Ops.state_scan`: all rows advance together, one token per turn, as far as each row has tokens."""
    fields = step.state(cache.group)
    index, part = cache.part("scan")
    T = step.bucket.tokens
    per_key = spec.num_v_heads // spec.num_k_heads
    q = jnp.repeat(_unit(q, spec.l2_norm_eps) * spec.scale, per_key, axis=1)  # [T, N, Hk]
    k = jnp.repeat(_unit(k, spec.l2_norm_eps), per_key, axis=1)
    v = v.astype(jnp.float32)
    decay = jnp.exp(-jnp.exp(a_log.astype(jnp.float32)) * jax.nn.softplus(a.astype(jnp.float32) + dt_bias))
    beta = jax.nn.sigmoid(b.astype(jnp.float32))
    begins = step.query_start[:-1]
    lengths = step.query_start[1:] - begins
    start = _read(part, fields.read).astype(jnp.float32)  # [R, N, Hk, Hv]

    def advance(carry: tuple[Array, Array], turn: Array) -> tuple[tuple[Array, Array], Array]:
        state, checkpoint = carry
        at = jnp.minimum(begins + turn, T - 1)  # [R]
        new = state * decay[at][:, :, None, None]
        error = (v[at] - einsum("rnk,rnkv->rnv", k[at], new)) * beta[at][:, :, None]
        new += k[at][..., None] * error[:, :, None, :]
        state = jnp.where((turn < lengths)[:, None, None, None], new, state)
        stored = (turn + 1 == fields.checkpoint_offset)[:, None, None, None]
        out = einsum("rnk,rnkv->rnv", q[at], state)
        return (state, jnp.where(stored, state, checkpoint)), out

    turns = 1 if step.bucket.kind == "decode" else step.bucket.max_query
    (state, checkpoint), out = lax.scan(advance, (start, start), jnp.arange(turns, dtype=jnp.int32))
    rows, offsets = _places(step)
    y = out[jnp.minimum(offsets, turns - 1), rows]  # [T, N, Hv]
    return y, cache.store(index, fields, state, checkpoint)
