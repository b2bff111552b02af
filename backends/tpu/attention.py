"""Paged and latent attention as gathers and masked products, without a loop over rows.

Decisions of this file:
- A cache layer is one array per part, [num_blocks * Z, ...]: stacked layers would be copied at every step.
- Queries are cut into tiles that belong to one row each. T tokens in R rows make at most T // tile + R tiles
  whatever the rows' lengths are, so the shape is static, and no token is multiplied with another row's keys.
- Keys are gathered per tile; tiles run in groups whose working set stays under `GROUP_BYTES`.
- Scores and values are both masked: a block holds unspecified values, and NaN * 0 is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from core.contract.batch import PagedStep, Step
from core.contract.opspecs import AttentionSpec, LatentSpec
from core.contract.types import Array, CacheLayerSpec, Packed

TILE = 32
GROUP_BYTES = 64 * 2**20

# On some devices the default would multiply float32 in bfloat16.
einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

# What identifies a cache handle is static; only its arrays are traced.
static_fields = ("group", "layer")


@partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=static_fields)
@dataclass(frozen=True)
class PagedCache:
    """One attention layer's cache, in its dtype: k [num_blocks * Z, K, H], v [num_blocks * Z, K, Hv]."""

    k: Array
    v: Array
    group: int
    layer: CacheLayerSpec


@partial(jax.tree_util.register_dataclass, data_fields=("c",), meta_fields=static_fields)
@dataclass(frozen=True)
class LatentCache:
    """One latent layer's cache: c [num_blocks * Z, C + P], the normed latent first."""

    c: Array
    group: int
    layer: CacheLayerSpec


def query_tiles(step: Step) -> tuple[Array, Array, int]:
    """The step's queries as tiles of one row each: (row [I], first query of the row [I], tile size).

    Tiles that the step does not need have row R.
    """
    bucket = step.bucket
    if bucket.kind == "decode":
        rows = jnp.arange(bucket.requests, dtype=jnp.int32)
        return rows, jnp.zeros_like(rows), 1
    tile = min(TILE, bucket.max_query)
    most = min(bucket.tokens // tile + bucket.requests, bucket.requests * -(-bucket.max_query // tile))
    lengths = step.query_start[1:] - step.query_start[:-1]  # [R]
    counts = (lengths + tile - 1) // tile
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    index = jnp.arange(most, dtype=jnp.int32)
    rows = jnp.sum(ends[None, :] <= index[:, None], axis=1, dtype=jnp.int32)  # [I]
    begins = (ends - counts)[jnp.minimum(rows, bucket.requests - 1)]
    return rows, (index - begins) * tile, tile


def visible_keys(positions: Array, seq_len: Array, num_keys: int, spec: AttentionSpec) -> Array:
    """Which keys [L] of its row each query [Q] sees: bool [Q, L]."""
    p = positions[:, None]
    j = jnp.arange(num_keys, dtype=jnp.int32)[None, :]
    seen = jnp.broadcast_to(j < seq_len, (positions.shape[0], num_keys))
    if spec.causal:
        seen &= j <= p
    if spec.window is not None:
        seen &= p - j < spec.window
    if spec.chunk is not None:
        seen &= j // spec.chunk == p // spec.chunk
    return seen


def _scores(q: Array, k: Array, positions: Array, spec: AttentionSpec) -> Array:
    """q [Q, K, G, H], k [L, K, H] -> float32 [K, G, Q, L], scaled and capped."""
    scores = einsum("qkgh,lkh->kgql", q, k) * spec.scale
    if spec.q_scale is not None:
        steps = ((positions + 1) // spec.q_scale.floor).astype(jnp.float32)
        scores *= (1.0 + spec.q_scale.factor * jnp.log1p(steps))[None, None, :, None]
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    return scores


def _attend_tile(
    q: Array, k: Array, v: Array, positions: Array, seen: Array, spec: AttentionSpec, sinks: Array | None
) -> tuple[Array, Array]:
    """q [Q, N, H], k [L, K, H], v [L, K, Hv], seen bool [Q, L] -> (float32 [Q, N, Hv], lse [Q, N])."""
    Q, N, H = q.shape
    K, Hv = v.shape[1], v.shape[2]
    scores = _scores(q.reshape(Q, K, N // K, H), k, positions, spec)
    scores = jnp.where(seen, scores, -jnp.inf)  # [K, G, Q, L]
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(K, N // K, 1, 1)
        top = jnp.maximum(top, sink)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sink - top)
    v = jnp.where(seen.any(0)[:, None, None], v.astype(jnp.float32), 0.0)
    out = einsum("kgql,lkv->kgqv", weights, v) / jnp.where(total > 0, total, 1.0)
    lse = jnp.where(seen.any(-1), (top + jnp.log(total))[..., 0], -jnp.inf)  # [K, G, Q]
    return out.transpose(2, 0, 1, 3).reshape(Q, N, Hv), lse.transpose(2, 0, 1).reshape(Q, N)


def attend_pages(
    q: Array,
    k: Array,
    v: Array | None,
    step: Step,
    paged: PagedStep,
    spec: AttentionSpec,
    sinks: Array | None = None,
) -> tuple[Array, Array]:
    """Attention of every token over its row's blocks: (float32 [T, N, Hv], lse float32 [T, N]).

    q [T, N, H]; k [num_blocks * Z, K, H]; v [num_blocks * Z, K, Hv], or None = the first Hv elements of k.
    """
    T, N = q.shape[:2]
    R, B = paged.block_table.shape
    L = B * paged.block_size
    rows, starts, tile = query_tiles(step)

    def pages(x: Array, row: Array) -> Array:
        blocks = x.reshape(-1, paged.block_size, *x.shape[1:])
        return blocks[paged.block_table[row]].reshape(L, *x.shape[1:])

    def one(item: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        row, start = jnp.minimum(item[0], R - 1), item[1]
        offsets = start + jnp.arange(tile, dtype=jnp.int32)
        first = step.query_start[row]
        real = (offsets < step.query_start[row + 1] - first) & (item[0] < R)
        tokens = jnp.clip(first + offsets, 0, T - 1)
        positions = step.positions[tokens]
        seen = visible_keys(positions, step.seq_lens[row], L, spec) & real[:, None]
        keys = pages(k, row)
        values = keys[..., : spec.v_head_size] if v is None else pages(v, row)
        out, lse = _attend_tile(q[tokens], keys, values, positions, seen, spec, sinks)
        return out, lse, jnp.where(real, tokens, T)

    tile_bytes = 4 * L * (spec.num_kv_heads * (spec.head_size + spec.v_head_size) + 2 * N * tile)
    group = max(1, GROUP_BYTES // tile_bytes)
    if group >= len(rows):
        out, lse, tokens = jax.vmap(one)((rows, starts))
    else:
        out, lse, tokens = lax.map(one, (rows, starts), batch_size=group)
    out, lse, tokens = out.reshape(-1, N, spec.v_head_size), lse.reshape(-1, N), tokens.reshape(-1)
    if step.bucket.kind == "decode":
        return out, lse
    return (
        jnp.zeros((T, N, spec.v_head_size), jnp.float32).at[tokens].set(out, mode="drop"),
        jnp.full((T, N), -jnp.inf, jnp.float32).at[tokens].set(lse, mode="drop"),
    )


class PagedAttention:
    """The kernel object of `attend`: any geometry, every feature of AttentionSpec."""

    @property
    def name(self) -> str:
        """Shown in reports."""
        return "plain"

    def supports(self, layer: CacheLayerSpec, attention: AttentionSpec | LatentSpec) -> bool:
        """Whether the layer is paged and the accumulator float32; latent layers have their own op."""
        return layer.kind in ("paged", "window") and (
            isinstance(attention, AttentionSpec) and attention.accumulator == "float32"
        )

    def attend(
        self,
        q: Array,
        k: Array | None,
        v: Array | None,
        cache: PagedCache,
        step: Step,
        spec: AttentionSpec,
        sinks: Array | None,
        want_lse: bool,
    ) -> tuple[Array, Array | None, PagedCache]:
        """As `Ops.attend`."""
        paged = step.paged(cache.group)
        if k is not None and v is not None:
            cache = PagedCache(
                cache.k.at[paged.slots].set(k.astype(cache.k.dtype)),
                cache.v.at[paged.slots].set(v.astype(cache.v.dtype)),
                cache.group,
                cache.layer,
            )
        out, lse = attend_pages(q, cache.k, cache.v, step, paged, spec, sinks)
        return out.astype(q.dtype), lse if want_lse else None, cache


def attend_latent(
    q_nope: Array,
    q_rope: Array,
    latent: Array | None,
    k_rope: Array | None,
    w_k: Packed,
    w_v: Packed,
    cache: LatentCache,
    step: Step,
    spec: LatentSpec,
    want_lse: bool,
) -> tuple[Array, Array | None, LatentCache]:
    """As `Ops.attend_latent`, absorbed: q is multiplied by w_k, so that all heads share one key per token."""
    N, C = spec.num_heads, spec.latent_size
    paged = step.paged(cache.group)
    if latent is not None and k_rope is not None:
        entry = jnp.concatenate([latent, k_rope], axis=-1).astype(cache.c.dtype)
        cache = LatentCache(cache.c.at[paged.slots].set(entry), cache.group, cache.layer)
    absorbed = einsum("tnh,nhc->tnc", q_nope, w_k.reshape(N, spec.nope_size, C))
    q = jnp.concatenate([absorbed, q_rope.astype(jnp.float32)], axis=-1)  # [T, N, C + P]
    one_head = AttentionSpec(
        scale=spec.scale, num_heads=N, num_kv_heads=1, head_size=C + spec.rope_size, v_head_size=C
    )
    out, lse = attend_pages(q, cache.c[:, None, :], None, step, paged, one_head)
    out = einsum("tnc,nvc->tnv", out, w_v.reshape(N, spec.v_head_size, C).astype(jnp.float32))
    return out.astype(q_nope.dtype), lse if want_lse else None, cache
