"""The block of routed experts that several families put in place of the MLP.

norm, router in float32, routed experts, and a shared expert that every token passes (behind a gate where the
family has one).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from core.contract.errors import ConfigError
from core.contract.ops import Ops
from core.contract.opspecs import ExpertsSpec, ExpertWeights
from core.contract.types import Array, Param, Part
from core.models.base import linear_param, norm_param, weight
from core.models.config import ModelConfig, MoeConfig


@dataclass(frozen=True)
class SharedExpert:
    """A gated MLP for every token; `gate` [1, D] scales its output."""

    gate_up: Any
    down: Any
    gate: Any = None


@dataclass(frozen=True)
class Moe:
    """Weights of one block."""

    norm: Any
    router: Any
    experts: ExpertWeights
    route_bias: Any = None
    shared: SharedExpert | None = None


def moe_of(c: ModelConfig) -> MoeConfig:
    """The config's experts.

    Raises:
        ConfigError: it has none.
    """
    if c.moe is None:
        raise ConfigError(f"{c.architecture} needs routed experts, but its config has none")
    return c.moe


def adapt_experts(c: ModelConfig, names: Collection[str]) -> ModelConfig:
    """The config, knowing whether the checkpoint stacks a layer's experts in one tensor."""
    if c.moe is None:
        return c
    return replace(c, moe=replace(c.moe, fused=any(n.endswith("mlp.experts.gate_up_proj") for n in names)))


def moe_params(
    c: ModelConfig, layer: str, *, shared: str = "shared_expert", zero_centred: bool = False
) -> Moe:
    """Parameters below `layer`.mlp; `shared` names the shared expert."""
    moe, m, D = moe_of(c), f"{layer}.mlp", c.hidden_size
    bias = Part(f"{m}.gate.e_score_correction_bias", (moe.route.num_experts,), ("",))
    return Moe(
        norm=norm_param(f"{layer}.post_attention_layernorm.weight", D, zero_centred=zero_centred),
        router=linear_param(weight(f"{m}.gate", moe.route.num_experts, "", D, "embed")),
        experts=_fused_experts(c, m) if moe.fused else _split_experts(c, m),
        route_bias=Param((bias,), ("bias",)) if moe.route_bias else None,
        shared=_shared_params(c, m, shared) if moe.shared_mlp_size else None,
    )


def _split_experts(c: ModelConfig, m: str) -> ExpertWeights:
    moe, D = moe_of(c), c.hidden_size
    E, F = moe.route.num_experts, moe.mlp_size
    gate_up = tuple(
        weight(f"{m}.experts.{e}.{n}", F, "mlp", D, "embed")
        for e in range(E)
        for n in ("gate_proj", "up_proj")
    )
    down = tuple(weight(f"{m}.experts.{e}.down_proj", D, "embed", F, "mlp") for e in range(E))
    return ExpertWeights(Param(gate_up, ("experts",), stack=E), Param(down, ("experts",), stack=E))


def _fused_experts(c: ModelConfig, m: str) -> ExpertWeights:
    moe, D = moe_of(c), c.hidden_size
    E, F = moe.route.num_experts, moe.mlp_size
    gate_up = tuple(
        Part(f"{m}.experts.gate_up_proj", (E, F, D), ("expert", "mlp", "embed"), start=(0, at, 0))
        for at in (0, F)
    )
    down = Part(f"{m}.experts.down_proj", (E, D, F), ("expert", "embed", "mlp"))
    return ExpertWeights(Param(gate_up, ("experts",), join=1), Param((down,), ("experts",)))


def _shared_params(c: ModelConfig, m: str, name: str) -> SharedExpert:
    moe, s, D = moe_of(c), f"{m}.{name}", c.hidden_size
    F = moe.shared_mlp_size
    return SharedExpert(
        gate_up=linear_param(
            weight(f"{s}.gate_proj", F, "mlp", D, "embed"), weight(f"{s}.up_proj", F, "mlp", D, "embed")
        ),
        down=linear_param(weight(f"{s}.down_proj", D, "embed", F, "mlp")),
        gate=linear_param(weight(f"{m}.shared_expert_gate", 1, "", D, "embed")) if moe.shared_gate else None,
    )


def moe_block(ops: Ops, c: ModelConfig, w: Moe, h: Array) -> Array:
    """h + experts(norm(h)): [T, D]."""
    moe = moe_of(c)
    x = ops.norm(h, w.norm, c.norm_eps)
    ids, weights = ops.route(ops.linear(x, w.router, wide=True), moe.route, w.route_bias)  # [T, top_k]
    spec = ExpertsSpec(num_experts=moe.route.num_experts, activation=c.activation)
    y = ops.experts(x, ids, weights, w.experts, spec)
    if w.shared is not None:
        shared = ops.linear(ops.glu(ops.linear(x, w.shared.gate_up), c.activation), w.shared.down)
        if w.shared.gate is not None:
            shared = ops.gate(shared, ops.linear(x, w.shared.gate), "sigmoid")
        y = y + shared
    return ops.residual_add(h, y)
