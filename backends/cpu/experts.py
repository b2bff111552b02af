"""Activations, routing and routed experts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from backends.cpu.packed import product
from core.contract.opspecs import Activation, ExpertsSpec, ExpertWeights, RouteSpec


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The activation of float32 x; "swigluoai" has no form with one argument."""
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "sigmoid":
        return torch.sigmoid(x)
    raise ValueError(f"activation {activation!r} needs a gate and an up part; use glu")


def glu(x: torch.Tensor, activation: Activation, limit: float | None) -> torch.Tensor:
    """[..., 2F] -> [..., F] in float32 with one rounding; `limit` is that of "swigluoai"."""
    gate, up = x.float().chunk(2, -1)
    if activation != "swigluoai":
        return activate(gate, activation).mul_(up).to(x.dtype)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)).to(x.dtype)


def route(
    logits: torch.Tensor, spec: RouteSpec, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `core.contract.ops.Ops.route`. Scores are float64: the choice must not hang on a rounding."""
    wide = logits.double()
    if spec.scoring == "softmax":
        scores = wide.softmax(-1)
    elif spec.scoring == "sigmoid":
        scores = wide.sigmoid()
    else:
        scores = wide
    select = scores if bias is None else scores + bias
    if spec.num_groups > 1:
        select = select.masked_fill(~_allowed_groups(select, spec), -math.inf)
    ids = _best(select, spec.top_k)
    weights = scores.gather(-1, ids)
    if spec.scoring == "softmax_topk":
        weights = weights.softmax(-1)
    if spec.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids.to(torch.int32), (weights * spec.scale).float()


def _allowed_groups(select: torch.Tensor, spec: RouteSpec) -> torch.Tensor:
    grouped = select.reshape(len(select), spec.num_groups, -1)  # [T, groups, E / groups]
    score = grouped.amax(-1) if spec.group_score == "max" else grouped.topk(2, -1).values.sum(-1)
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, _best(score, spec.top_groups), True)
    return keep[..., None].expand_as(grouped).flatten(-2)


def _best(x: torch.Tensor, count: int) -> torch.Tensor:
    # topk promises no order among equal values; a stable sort keeps the lowest index first.
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    packed: ExpertWeights,
    spec: ExpertsSpec,
    slot_of_expert: torch.Tensor | None,
) -> torch.Tensor:
    """See `core.contract.ops.Ops.experts`. An expert multiplies the rows that chose it; sums are float32."""
    slots = ids.flatten().long()  # [T * top_k]
    if slot_of_expert is not None:
        slots = slot_of_expert.long()[slots]
    order = slots.argsort(stable=True)
    factors = weights.flatten().float()[order]
    rows = order // ids.shape[-1]
    out = torch.zeros(x.shape, dtype=torch.float32)
    chosen, counts = torch.unique_consecutive(slots[order], return_counts=True)
    at = 0
    for slot, count in zip(chosen.tolist(), counts.tolist(), strict=True):
        mine, at = slice(at, at + count), at + count
        if slot >= 0:  # -1: an expert of another rank
            y = _expert(x[rows[mine]], factors[mine, None], slot, packed, spec)
            out.index_add_(0, rows[mine], y)
    return out.to(x.dtype)


def _expert(
    x: torch.Tensor, factor: torch.Tensor, slot: int, packed: ExpertWeights, spec: ExpertsSpec
) -> torch.Tensor:
    if spec.weights_on_input:
        x = (x.float() * factor).to(x.dtype)
    bias = packed.gate_up_bias
    h = product(x, packed.gate_up[slot], None if bias is None else bias[slot])
    h = glu(h, spec.activation, spec.limit)
    y = product(h, packed.down[slot]).float()
    if packed.down_bias is not None:
        y += packed.down_bias[slot]
    return y if spec.weights_on_input else y.mul_(factor)
