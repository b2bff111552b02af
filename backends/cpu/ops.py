"""The op table in torch: plain ops, and the fused ones that save a pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from backends.cpu.allocator import Cache
from backends.cpu.arrays import torch_dtype
from backends.cpu.attention import CpuAttention, attend_cached, host_rows, write_slots
from backends.cpu.experts import activate, experts, glu, route
from backends.cpu.packed import PackedWeight, Weight, product
from backends.cpu.rows import StepMemo
from backends.cpu.state import gated_delta_scan, short_conv
from core.contract.batch import Step
from core.contract.errors import UnsupportedError
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

SMALL_PRODUCT = 1 << 20
"""Elements of a weight up to which a wide product converts it to float32 (a router's, say)."""


class CpuOps(Ops):
    """See `core.contract.ops.Ops`. `attention`: the kernel for `attend`; None = torch's.

    A table remembers what it derived from the step it saw last (spans of rows, rotary angles), so one table
    serves one step at a time.

    Raises:
        UnsupportedError: the dtype is not one of this backend's.
    """

    def __init__(self, dtype: str, attention: Any | None = None) -> None:
        self._dtype = torch_dtype(dtype, "the model")
        self._memo = StepMemo()
        self._attention = attention or CpuAttention(self._memo)

    def select_tokens(self, step: Step) -> torch.Tensor:
        """See `Ops`."""
        source = step.token_source
        return torch.where(source < 0, step.token_ids, step.last[source.clamp(min=0)])

    def embed(self, w: Weight, ids: torch.Tensor, first: int = 0) -> torch.Tensor:
        """See `Ops`."""
        local = ids - first
        inside = (local >= 0) & (local < w.shape[0])
        rows = local.clamp(0, w.shape[0] - 1)
        if isinstance(w, PackedWeight):
            found = w.index_select(rows).to(self._dtype)
        else:
            found = w.index_select(0, rows)
        return found.masked_fill_(~inside[:, None], 0)

    def take(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See `Ops`."""
        return x.index_select(0, rows)

    def linear(
        self, x: torch.Tensor, w: Weight, bias: torch.Tensor | None = None, *, wide: bool = False
    ) -> torch.Tensor:
        """See `Ops`.

        torch has no product of bfloat16 matrices with a float32 result on the CPU. For a wide one, small
        weights are converted; for large ones the rounded product y is followed by x w - y, which the same
        kernel sums in float32 before it rounds, so that y and the remainder together hold twice the bits.
        """
        if wide and x.dtype != torch.float32:
            return self._wide_linear(x, w, bias)
        return product(x, w, bias)

    def _wide_linear(self, x: torch.Tensor, w: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        if isinstance(w, PackedWeight):
            return product(x.float(), w, bias)
        if w.numel() <= SMALL_PRODUCT:
            return F.linear(x.float(), w.float(), bias)
        x2 = x.reshape(-1, x.shape[-1])
        y = F.linear(x2, w)
        remainder = torch.addmm(y, x2, w.T, beta=-1)
        out = y.float().add_(remainder).reshape(*x.shape[:-1], -1)
        return out if bias is None else out.add_(bias)

    def norm(self, x: torch.Tensor, n: torch.Tensor | None, eps: float) -> torch.Tensor:
        """See `Ops`."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), n, eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide if n is None else wide.mul_(n)).to(x.dtype)

    def rope(self, x: torch.Tensor, rope: Rope, step: Step) -> torch.Tensor:
        """See `Ops`."""
        table, spec = rope
        # The value holds the table too, so that its id stays its own for the whole step.
        _, cos, sin = self._memo.get(
            step,
            ("angles", id(table), spec.interleaved),
            lambda: (table, *_angles(table, step.positions, spec.interleaved)),
        )
        rotated = x[..., : spec.rotary_size].float()
        out = rotated * cos + _partner(rotated, spec.interleaved) * sin
        if spec.rotary_size == x.shape[-1]:
            return out.to(x.dtype)
        return torch.cat([out.to(x.dtype), x[..., spec.rotary_size :]], -1)

    def glu(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """See `Ops`."""
        return glu(x, activation, limit=7.0)

    def gate(self, x: torch.Tensor, g: torch.Tensor, activation: Activation) -> torch.Tensor:
        """See `Ops`."""
        return (x.float() * activate(g.float(), activation)).to(x.dtype)

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        """See `Ops`."""
        return ((x.float() / cap).tanh_() * cap).to(x.dtype)

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
        """See `Ops`."""
        out: tuple[torch.Tensor, torch.Tensor | None, Cache] = self._attention.attend(
            q, k, v, cache, step, spec, sinks, want_lse
        )
        return out

    def attend_latent(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor | None,
        k_rope: torch.Tensor | None,
        w_k: torch.Tensor,
        w_v: torch.Tensor,
        cache: Cache,
        step: Step,
        spec: LatentSpec,
        want_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Cache]:
        """See `Ops`. Absorbed: attention of N query heads over one key head [C + P], whose values are [C]."""
        entries = cache.flat("latent")
        if latent is not None and k_rope is not None:
            slots = write_slots(self._memo, step, cache.group)
            num_tokens = host_rows(self._memo, step).num_tokens
            entries[slots, : spec.latent_size] = latent[:num_tokens]
            entries[slots, spec.latent_size :] = k_rope[:num_tokens]
        heads = (spec.num_heads, -1, spec.latent_size)
        absorbed = q_nope.transpose(0, 1) @ w_k.view(heads)  # [N, T, C]
        q = torch.cat([absorbed.transpose(0, 1), q_rope], -1)  # [T, N, C + P]
        one_head = AttentionSpec(
            scale=spec.scale,
            num_heads=spec.num_heads,
            num_kv_heads=1,
            head_size=q.shape[-1],
            v_head_size=spec.latent_size,
        )
        keys = entries[:, None]
        mixed, lse = attend_cached(
            self._memo, q, keys, keys[..., : spec.latent_size], cache.group, step, one_head, None, want_lse
        )
        out = mixed.transpose(0, 1) @ w_v.view(heads).transpose(1, 2)  # [N, T, Hv]
        return out.transpose(0, 1).contiguous(), lse, cache

    def short_conv(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        cache: Cache,
        step: Step,
        spec: ConvSpec,
    ) -> tuple[torch.Tensor, Cache]:
        """See `Ops`."""
        return short_conv(self._memo, x, w, bias, cache, step, spec), cache

    def state_scan(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        a_log: torch.Tensor,
        dt_bias: torch.Tensor,
        cache: Cache,
        step: Step,
        spec: ScanSpec,
    ) -> tuple[torch.Tensor, Cache]:
        """See `Ops`."""
        return gated_delta_scan(self._memo, q, k, v, a, b, a_log, dt_bias, cache, step, spec), cache

    def route(
        self, logits: torch.Tensor, spec: RouteSpec, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Ops`."""
        return route(logits, spec, bias)

    def experts(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        packed: ExpertWeights,
        spec: ExpertsSpec,
        slot_of_expert: torch.Tensor | None = None,
        tokens_per_rank: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Ops`."""
        if tokens_per_rank is not None:
            raise UnsupportedError(
                "experts got tokens_per_rank, but backend 'cpu' computes on a rank's own tokens; gather them "
                "before the op and pass None"
            )
        return experts(x, ids, weights, packed, spec, slot_of_expert)

    def linear_add(
        self, x: torch.Tensor, w: Weight, h: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Ops`. Consumes h. Without a bias the sum is rounded once; with one, the product is too."""
        if isinstance(w, PackedWeight):
            y = w.product(x)
            return h.add_(y if bias is None else y.add_(bias))
        return h.addmm_(x, w.T) if bias is None else h.add_(product(x, w, bias))


def _angles(
    table: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines, and sines signed for `_partner`: each float32 [T, 1, rotary_size]."""
    cos, sin = table.float().index_select(0, positions).chunk(2, -1)
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return cos[:, None], sin[:, None]


def _partner(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Each element's other half of its pair."""
    if interleaved:
        return x.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return x.roll(x.shape[-1] // 2, -1)
