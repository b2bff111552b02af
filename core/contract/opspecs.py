"""What a model tells an op besides arrays: frozen, static records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from core.contract.spec import needs
from core.contract.types import Array, Packed

Activation = Literal["silu", "gelu", "gelu_tanh", "sigmoid", "swigluoai"]


@dataclass(frozen=True, kw_only=True)
class QScale:
    """Queries grow with their position: q *= 1 + factor * log(1 + floor((position + 1) / floor))."""

    factor: float
    floor: int


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What `attend` computes; static. Geometry of the cache is `CacheLayerSpec`, not this.

    Attributes:
        scale: factor on q . k.
        window: a query at position p sees keys in (p - window, p].
        chunk: a query sees keys of its own chunk only: key // chunk == query // chunk.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        sinks: an array `sinks` [N] is given: one more term exp(sink) in each head's denominator.
        causal: False = a query sees every key of its row.
    """

    scale: float
    num_heads: int
    num_kv_heads: int
    head_size: int
    v_head_size: int
    window: int | None = field(default=None, metadata=needs("attention.window"))
    chunk: int | None = field(default=None, metadata=needs("attention.chunk"))
    soft_cap: float | None = field(default=None, metadata=needs("attention.soft_cap"))
    sinks: bool = field(default=False, metadata=needs("attention.sinks"))
    causal: bool = field(default=True, metadata=needs("attention.non_causal"))
    q_scale: QScale | None = field(default=None, metadata=needs("attention.q_scale"))
    accumulator: str = "float32"


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """What `attend_latent` computes; static. Heads share one latent vector per token."""

    scale: float
    num_heads: int
    nope_size: int
    rope_size: int
    v_head_size: int
    latent_size: int
    accumulator: str = "float32"


@dataclass(frozen=True, kw_only=True)
class ConvSpec:
    """A causal depthwise convolution over `width` tokens, then the activation (None = none)."""

    channels: int
    width: int
    activation: Activation | None = "silu"


@dataclass(frozen=True, kw_only=True)
class ScanSpec:
    """A linear-attention recurrence.

    Attributes:
        kind: "gated_delta" (Yang et al., Gated Delta Networks, 2024).
        l2_norm_eps: q and k are divided by sqrt(sum of squares + eps); None = not.
        scale: factor on q after that.
    """

    kind: Literal["gated_delta"]
    num_k_heads: int
    num_v_heads: int
    k_size: int
    v_size: int
    scale: float
    l2_norm_eps: float | None = 1e-6


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of the first `rotary_size` elements of each head.

    `interleaved`: pairs are (2i, 2i + 1); otherwise (i, i + rotary_size / 2).
    """

    rotary_size: int
    interleaved: bool = False


class Rope(NamedTuple):
    """A rotary table and how to apply it. `table`: [positions, rotary_size], cosines then sines, float32 or
    wider.
    """

    table: Array
    spec: RopeSpec


@dataclass(frozen=True, kw_only=True)
class RouteSpec:
    """How router logits choose experts.

    In order: scores = softmax or sigmoid of the logits ("softmax_topk": softmax over the chosen logits only,
    last); the selection adds `bias` where given; with `num_groups` > 1 only the `top_groups` groups with the
    best group score stay (the maximum, or the sum of the best two); the `top_k` best are taken, ties to the
    lowest id; weights are the scores without bias, divided by their sum (+ 1e-20) where `normalize`, times
    `scale`.
    """

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid", "softmax_topk"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """What each expert computes: down(activation(gate) * up).

    Attributes:
        weights_on_input: routing weights multiply the experts' input in place of their output.
        limit: clamp of gate (above) and up (both sides) before the activation "swigluoai"; None = no clamp.
    """

    num_experts: int
    activation: Activation = "silu"
    weights_on_input: bool = False
    limit: float | None = None


class ExpertWeights(NamedTuple):
    """Packed experts: gate_up [E, 2F, D], gate first; down [E, D, F]; biases [E, 2F], [E, D] or None."""

    gate_up: Packed
    down: Packed
    gate_up_bias: Packed | None = None
    down_bias: Packed | None = None
