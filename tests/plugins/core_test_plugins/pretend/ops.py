"""The dense plain ops in torch, without one look at a value: what a traced device needs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from core.contract.batch import Step
from core.contract.ops import Ops
from core.contract.opspecs import Activation, AttentionSpec, Rope
from core_test_plugins.pretend.device import Cache


class PretendOps(Ops):
    """See `core.contract.ops.Ops`; every fused op is its composite."""

    def select_tokens(self, step: Step) -> torch.Tensor:
        """See `Ops`."""
        source = step.token_source
        return torch.where(source < 0, step.token_ids, step.last.index_select(0, source.clamp(min=0)))

    def embed(self, w: torch.Tensor, ids: torch.Tensor, first: int = 0) -> torch.Tensor:
        """See `Ops`."""
        local = ids - first
        inside = (local >= 0) & (local < w.shape[0])
        return w.index_select(0, local.clamp(0, w.shape[0] - 1)) * inside[:, None]

    def take(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See `Ops`."""
        return x.index_select(0, rows)

    def linear(
        self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, *, wide: bool = False
    ) -> torch.Tensor:
        """See `Ops`."""
        return F.linear(x, w, bias)

    def norm(self, x: torch.Tensor, n: torch.Tensor | None, eps: float) -> torch.Tensor:
        """See `Ops`."""
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return y if n is None else y * n

    def rope(self, x: torch.Tensor, rope: Rope, step: Step) -> torch.Tensor:
        """See `Ops`."""
        size = rope.spec.rotary_size
        angles = rope.table.index_select(0, step.positions)[:, None]  # [T, 1, rotary_size]
        cos, sin = angles[..., : size // 2], angles[..., size // 2 :]
        turned = x[..., :size]
        if rope.spec.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            out = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned[..., : size // 2], turned[..., size // 2 :]
            out = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([out, x[..., size:]], -1)

    def glu(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """See `Ops`."""
        half = x.shape[-1] // 2
        gate, up = x[..., :half], x[..., half:]
        if activation == "swigluoai":
            return (up.clamp(-7.0, 7.0) + 1) * _activate(gate, activation)
        return _activate(gate, activation) * up

    def gate(self, x: torch.Tensor, g: torch.Tensor, activation: Activation) -> torch.Tensor:
        """See `Ops`."""
        return x * _activate(g, activation)

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        """See `Ops`."""
        return torch.tanh(x / cap) * cap

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
        """See `Ops`. Each token meets every column of its row's table; what it may not see is masked."""
        paged = step.paged(cache.group)
        keys, values = cache.k.flatten(0, 1), cache.v.flatten(0, 1)  # [slots, K, H]
        if k is not None and v is not None:
            keys.index_copy_(0, paged.slots.long(), k)
            values.index_copy_(0, paged.slots.long(), v)
        T, N, H = q.shape
        K, R, Z = spec.num_kv_heads, step.bucket.requests, paged.block_size
        row = step.row_of_token.clamp(max=R - 1)
        length = paged.block_table.shape[1] * Z
        j = torch.arange(length, dtype=torch.int32, device=q.device)
        slots = paged.block_table.index_select(1, j // Z) * Z + j % Z  # [R, L]
        slots = slots.index_select(0, row)  # [T, L]
        position = step.positions[:, None]
        seen = (j <= position) & (j < step.seq_lens.index_select(0, row)[:, None])
        if spec.window is not None:
            seen = seen & (position - j < spec.window)
        seen = seen[:, :, None]
        zero = torch.zeros((), device=q.device)
        k_row = torch.where(seen[..., None], keys[slots], zero)  # [T, L, K, H]
        v_row = torch.where(seen[..., None], values[slots], zero)
        scores = torch.einsum("tkgh,tlkh->tlkg", q.reshape(T, K, N // K, H), k_row) * spec.scale
        if spec.soft_cap is not None:
            scores = self.soft_cap(scores, spec.soft_cap)
        scores = scores.reshape(T, length, N).masked_fill(~seen, -math.inf)
        lse = scores.logsumexp(1)  # [T, N]
        p = torch.where(seen, torch.exp(scores - lse[:, None]), zero)
        out = torch.einsum("tlkg,tlkh->tkgh", p.reshape(T, length, K, N // K), v_row)
        return out.reshape(T, N, -1), lse if want_lse else None, cache


def _activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return F.silu(x)
    if activation == "sigmoid":
        return torch.sigmoid(x)
    if activation == "swigluoai":
        gate = x.clamp(max=7.0)
        return gate * torch.sigmoid(1.702 * gate)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
