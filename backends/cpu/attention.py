"""Attention over block tables: keys and values are gathered per sequence, then attended in one call.

What torch's own kernel can express runs there; windows and chunks are masks or ranges, so they do too.
Soft-capping, sinks, grown queries, a log-sum-exp or values of another head size take a float32 product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from backends.cpu.allocator import Cache
from backends.cpu.rows import HostRows, Reach, Span, StepMemo, single_queries, spans
from core.contract.batch import Step
from core.contract.opspecs import AttentionSpec, LatentSpec
from core.contract.types import CacheLayerSpec

MAX_SCORES = 1 << 24
"""Scores (float32) that the explicit form holds at once: 64 MiB; longer rows go in pieces of queries."""


class CpuAttention:
    """See `core.contract.interfaces.AttentionKernel`."""

    name = "torch-sdpa"

    def __init__(self, memo: StepMemo | None = None) -> None:
        self._memo = memo or StepMemo()

    def supports(self, layer: CacheLayerSpec, attention: AttentionSpec | LatentSpec) -> bool:
        """Paged and window layers, any head size."""
        return isinstance(attention, AttentionSpec) and layer.kind in ("paged", "window")

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        cache: Cache,
        step: Step,
        spec: AttentionSpec,
        sinks: torch.Tensor | None = None,
        want_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Cache]:
        """See `core.contract.ops.Ops.attend`. Padding gives 0."""
        rows = host_rows(self._memo, step)
        keys, values = cache.flat("k"), cache.flat("v")
        if k is not None and v is not None:
            slots = write_slots(self._memo, step, cache.group)
            keys[slots] = k[: rows.num_tokens]
            values[slots] = v[: rows.num_tokens]
        if spec.q_scale is not None:
            grown = ((step.positions + 1) // spec.q_scale.floor).to(torch.float32)
            x = q * (1 + spec.q_scale.factor * torch.log1p(grown))[:, None, None]  # float32
        else:
            x = q
        out, lse = attend_cached(self._memo, x, keys, values, cache.group, step, spec, sinks, want_lse)
        return out.to(q.dtype), lse, cache


def host_rows(memo: StepMemo, step: Step) -> HostRows:
    """The step's rows, read once."""
    rows: HostRows = memo.get(step, "rows", lambda: HostRows.of(step))
    return rows


def write_slots(memo: StepMemo, step: Step, group: int) -> torch.Tensor:
    """int64 [num_tokens], where the real tokens' entries go."""
    num_tokens = host_rows(memo, step).num_tokens
    slots: torch.Tensor = memo.get(
        step, ("slots", group), lambda: step.paged(group).slots[:num_tokens].to(torch.int64)
    )
    return slots


def attend_cached(
    memo: StepMemo,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: int,
    step: Step,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend with q [T, N, H] over keys [slots, K, H] and values [slots, K, Hv] -> [T, N, Hv], lse [T, N]."""
    T, N, H = q.shape
    rows = host_rows(memo, step)
    reach: Reach = (spec.window, spec.chunk, spec.causal)
    plan: list[Span] = memo.get(step, ("spans", group, reach), lambda: spans(step, rows, group, reach))
    explicit = want_lse or sinks is not None or spec.soft_cap is not None or spec.q_scale is not None
    explicit = explicit or values.shape[-1] != H
    out = q.new_zeros((T, N, values.shape[-1]))
    lse = torch.full((T, N), -math.inf) if want_lse else None
    todo = list(reversed(plan))
    while todo:
        span = todo.pop()
        k = _gather(keys, span)  # [b, K, L, H]
        v = _gather(values, span)
        if span.row is not None and not _all_finite(k, v):
            # A key that a query may not see still meets it as 0 * v in a batched product, and 0 * nan is nan.
            todo += single_queries(step, rows, group, reach, span.row)
            continue
        x = q[span.tokens].reshape(span.batch, -1, N, H).transpose(1, 2)  # [b, N, n, H]
        if explicit:
            y, y_lse = explicit_attention(x, k, v, span, spec, sinks)
            if lse is not None:
                lse[span.tokens] = y_lse.transpose(1, 2).reshape(-1, N)
        else:
            y = _sdpa(x, k, v, span, spec.scale)
        out[span.tokens] = y.transpose(1, 2).reshape(-1, N, v.shape[-1])
    return out, lse


def _gather(entries: torch.Tensor, span: Span) -> torch.Tensor:
    found = entries.index_select(0, span.slots)  # [b * L, K, H]
    return found.reshape(span.batch, span.length, *entries.shape[1:]).transpose(1, 2)


def _all_finite(k: torch.Tensor, v: torch.Tensor) -> bool:
    # The sum is cheaper than a test of each element; when it overflows, the slow way is right too.
    return bool(torch.isfinite(k.sum(dtype=torch.float32) + v.sum(dtype=torch.float32)))


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span, scale: float) -> torch.Tensor:
    b, N, n, H = q.shape
    if n > 1:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=span.mask, is_causal=span.causal, scale=scale, enable_gqa=True
        )
    # One query each: the heads of a group are the queries of their KV head, so that keys are read once.
    q = q.reshape(b, k.shape[1], -1, H)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=span.mask, scale=scale).reshape(b, N, 1, -1)


def explicit_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    span: Span,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [b, N, n, H], k [b, K, L, H], v [b, K, L, Hv] -> (out [b, N, n, Hv], lse float32 [b, N, n])."""
    b, N, n, _ = q.shape
    k, v = k.float(), v.float()
    piece = max(1, MAX_SCORES // (b * N * k.shape[2]))
    outs, lses = [], []
    for at in range(0, n, piece):
        x = q[:, :, at : at + piece].float()
        mask = None if span.mask is None else span.mask[:, :, at : at + piece]
        if span.causal:
            i = torch.arange(at, at + x.shape[2])
            mask = (torch.arange(span.length) <= i[:, None])[None, None]
        out, lse = _softmax_product(x, k, v, mask, spec, sinks)
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _softmax_product(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    b, N, n, H = q.shape
    K, L = k.shape[1:3]
    scores = q.reshape(b, K, -1, H) @ k.transpose(-1, -2)  # [b, K, G * n, L]
    scores = scores.reshape(b, N, n, L).mul_(spec.scale)
    if spec.soft_cap is not None:
        scores = scores.div_(spec.soft_cap).tanh_().mul_(spec.soft_cap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf)
    top = scores.amax(-1, keepdim=True)  # [b, N, n, 1]
    if sinks is not None:
        sink = sinks.float()[None, :, None, None]
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -math.inf, 0.0)
    p = scores.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sink - top).exp()
    out = (p.reshape(b, K, -1, L) @ v).reshape(b, N, n, -1)
    out = (out / total).masked_fill_(total == 0, 0.0)
    return out, (top + total.log())[..., 0]
