"""The ops in torch float64 over whole sequences: a second reference, in torch's own functions where it has
them, which shares no text with the NumPy ones. A cache is a list that remembers what was written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.contract.batch import Step
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

ONE_ARGUMENT = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


def sequences(step: Step) -> list[slice]:
    """Tokens of each row; every row is a whole sequence."""
    starts = step.query_start.tolist()
    assert not any(step.positions[starts[r]] for r, n in enumerate(step.seq_lens) if n > 0)
    return [slice(starts[r], starts[r + 1]) for r, n in enumerate(step.seq_lens) if n > 0]


def reach(n: int, spec: AttentionSpec) -> Tensor:
    """bool [n, n]: which keys each query sees."""
    apart = torch.arange(n)[:, None] - torch.arange(n)
    mask = apart >= 0 if spec.causal else torch.ones(n, n, dtype=torch.bool)
    if spec.window is not None:
        mask = mask & (apart < spec.window)
    if spec.chunk is not None:
        chunks = torch.arange(n).div(spec.chunk, rounding_mode="floor")
        mask = mask & (chunks[:, None] == chunks)
    return mask


class TorchOps(Ops):
    """See `core.contract.ops.Ops`."""

    def select_tokens(self, step: Step) -> Tensor:
        assert (step.token_source < 0).all()
        return torch.from_numpy(np.array(step.token_ids)).long()

    def embed(self, w: Tensor, ids: Any, first: int = 0) -> Tensor:
        ids = torch.as_tensor(ids).long() - first
        padded = torch.cat([w, torch.zeros(1, w.shape[1], dtype=w.dtype)])
        return F.embedding(torch.where((ids >= 0) & (ids < len(w)), ids, len(w)), padded)

    def take(self, x: Tensor, rows: Any) -> Tensor:
        return x[torch.as_tensor(rows).long()]

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
        return F.linear(x, w, bias)

    def norm(self, x: Tensor, n: Tensor | None, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), n, eps)

    def rope(self, x: Tensor, rope: Rope, step: Step) -> Tensor:
        size = rope.spec.rotary_size
        cos, sin = rope.table[torch.from_numpy(np.array(step.positions)).long()].chunk(2, -1)
        turn = torch.complex(cos.contiguous(), sin.contiguous())[:, None]
        head = x[..., :size]
        if rope.spec.interleaved:
            pairs = head.unflatten(-1, (-1, 2))
        else:
            pairs = head.unflatten(-1, (2, -1)).transpose(-1, -2)
        y = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        y = y.flatten(-2) if rope.spec.interleaved else y.transpose(-1, -2).flatten(-2)
        return torch.cat([y, x[..., size:]], -1)

    def glu(self, x: Tensor, activation: Activation, limit: float | None = 7.0) -> Tensor:
        a, up = x.chunk(2, -1)
        if activation != "swigluoai":
            return ONE_ARGUMENT[activation](a) * up
        if limit is not None:
            a, up = a.clamp(max=limit), up.clamp(-limit, limit)
        return F.silu(1.702 * a) / 1.702 * (1 + up)

    def gate(self, x: Tensor, g: Tensor, activation: Activation) -> Tensor:
        return x * ONE_ARGUMENT[activation](g)

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        return (x / cap).tanh() * cap

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: Any,
        step: Step,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
        want_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None, Any]:
        if k is not None:
            cache[:] = [k, v]
        out = q.new_zeros(*q.shape[:2], spec.v_head_size)
        lse = q.new_zeros(q.shape[:2])
        repeat = spec.num_heads // spec.num_kv_heads
        for t in sequences(step):
            x, keys, values = q[t], *(part[t].repeat_interleave(repeat, 1) for part in cache)
            n = len(x)
            if spec.q_scale is not None:
                steps = torch.arange(1, n + 1).div(spec.q_scale.floor, rounding_mode="floor").double()
                x = x * (1 + spec.q_scale.factor * torch.log(1 + steps))[:, None, None]
            x, keys, values = (y.transpose(0, 1) for y in (x, keys, values))
            scores = spec.scale * torch.einsum("nih,njh->nij", x, keys)
            if spec.soft_cap is not None:
                scores = self.soft_cap(scores, spec.soft_cap)
            scores = scores.masked_fill(~reach(n, spec), -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None, None].expand(-1, n, 1)], -1)
            lse[t] = torch.logsumexp(scores, -1).T
            if sinks is None and spec.soft_cap is None:
                mask = reach(n, spec)
                y = F.scaled_dot_product_attention(x, keys, values, attn_mask=mask, scale=spec.scale)
            else:
                y = scores.softmax(-1)[..., :n] @ values
            out[t] = y.transpose(0, 1)
        return out, lse if want_lse else None, cache

    def attend_latent(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor | None,
        k_rope: Tensor | None,
        w_k: Tensor,
        w_v: Tensor,
        cache: Any,
        step: Step,
        spec: LatentSpec,
        want_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None, Any]:
        if latent is not None:
            cache[:] = [latent, k_rope]
        latent, k_rope = cache
        heads = (spec.num_heads, -1)
        keys = torch.cat(
            [F.linear(latent, w_k).unflatten(-1, heads), k_rope[:, None].expand(-1, spec.num_heads, -1)], -1
        )
        plain = AttentionSpec(
            scale=spec.scale,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_heads,
            head_size=keys.shape[-1],
            v_head_size=spec.v_head_size,
        )
        values = F.linear(latent, w_v).unflatten(-1, heads)
        q = torch.cat([q_nope, q_rope], -1)
        out, lse, _ = self.attend(q, keys, values, [], step, plain, None, want_lse)
        return out, lse, cache

    def short_conv(
        self, x: Tensor, w: Tensor, bias: Tensor | None, cache: Any, step: Step, spec: ConvSpec
    ) -> tuple[Tensor, Any]:
        out = torch.zeros_like(x)
        for t in sequences(step):
            padded = F.pad(x[t].T[None], (spec.width - 1, 0))
            y = F.conv1d(padded, w[:, None], bias, groups=spec.channels)[0].T
            out[t] = y if spec.activation is None else ONE_ARGUMENT[spec.activation](y)
        return out, cache

    def state_scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        cache: Any,
        step: Step,
        spec: ScanSpec,
    ) -> tuple[Tensor, Any]:
        """With no state before: all updates u solve (1 + beta tril(decay k k^T, -1)) u = beta v."""
        repeat = spec.num_v_heads // spec.num_k_heads
        out = torch.zeros_like(v)
        for t in sequences(step):
            x, keys = (y[t].repeat_interleave(repeat, 1).transpose(0, 1) for y in (q, k))
            if spec.l2_norm_eps is not None:
                x, keys = (
                    y * (y.square().sum(-1, keepdim=True) + spec.l2_norm_eps) ** -0.5 for y in (x, keys)
                )
            beta, values = b[t].sigmoid().T[..., None], v[t].transpose(0, 1)
            g = (-(a_log.exp()) * F.softplus(a[t] + dt_bias)).T.cumsum(-1)
            decay = (g[:, :, None] - g[:, None, :]).tril().exp().tril()
            system = torch.eye(x.shape[1], dtype=x.dtype) + beta * (decay * (keys @ keys.mT)).tril(-1)
            update = torch.linalg.solve(system, beta * values)
            out[t] = (spec.scale * (decay * (x @ keys.mT)) @ update).transpose(0, 1)
        return out, cache

    def route(self, logits: Tensor, spec: RouteSpec, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid()}.get(spec.scoring, logits)
        choice = scores if bias is None else scores + bias
        groups = choice.unflatten(-1, (spec.num_groups, -1))
        best = groups.topk(1 if spec.group_score == "max" else 2, -1).values.sum(-1)
        order = best.sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_groups]
        kept = F.one_hot(order, spec.num_groups).sum(1).bool()
        choice = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_k]
        weights = scores.gather(-1, ids)
        if spec.scoring == "softmax_topk":
            weights = weights.softmax(-1)
        if spec.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * spec.scale

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        packed: ExpertWeights,
        spec: ExpertsSpec,
        slot_of_expert: Any = None,
        tokens_per_rank: Any = None,
    ) -> Tensor:
        """Every token through every expert, weighed by 0 where it was not chosen."""
        E = spec.num_experts
        slots = ids if slot_of_expert is None else torch.as_tensor(np.array(slot_of_expert)).long()[ids]
        factor = x.new_zeros(len(x), E).scatter_add(1, slots.clamp(min=0), weights * (slots >= 0))
        given = x[:, None].expand(-1, E, -1)
        if spec.weights_on_input:
            given = given * factor[..., None]
        h = torch.einsum("ted,efd->tef", given, packed.gate_up)
        if packed.gate_up_bias is not None:
            h = h + packed.gate_up_bias
        y = torch.einsum("tef,edf->ted", self.glu(h, spec.activation, spec.limit), packed.down)
        if packed.down_bias is not None:
            y = y + packed.down_bias
        if spec.weights_on_input:
            return (y * (factor != 0)[..., None]).sum(1)
        return (y * factor[..., None]).sum(1)
