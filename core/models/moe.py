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
from core.models.base import bias_param, linear_param, norm_param, weight
from core.models.config import ModelConfig, MoeConfig


@dataclass(frozen=True, kw_only=True)
class MoeNames:
    """What a family's checkpoints call the tensors of a block; `block` is below the layer, the others below
    it.
    """

    block: str = "mlp"
    router: str = "gate"
    shared: str = "shared_expert"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


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
    router_bias: Any = None
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


_NAMES = MoeNames()


def moe_params(
    c: ModelConfig,
    layer: str,
    *,
    names: MoeNames = _NAMES,
    experts: ExpertWeights | None = None,
    zero_centred: bool = False,
) -> Moe:
    """Parameters of the block below `layer`; `experts` for a family that stores them in a way of its own."""
    moe, m, D = moe_of(c), f"{layer}.{names.block}", c.hidden_size
    router, E = f"{m}.{names.router}", moe.route.num_experts
    bias = Part(f"{router}.e_score_correction_bias", (E,), ("",))
    if experts is None:
        experts = _fused_experts(c, m) if moe.fused else _split_experts(c, m, names)
    return Moe(
        norm=norm_param(f"{layer}.post_attention_layernorm.weight", D, zero_centred=zero_centred),
        router=linear_param(weight(router, E, "", D, "embed")),
        experts=experts,
        router_bias=bias_param((router, E, "", 1)) if moe.router_bias else None,
        route_bias=Param((bias,), ("bias",)) if moe.route_bias else None,
        shared=_shared_params(c, m, names) if moe.shared_mlp_size else None,
    )


def _split_experts(c: ModelConfig, m: str, names: MoeNames) -> ExpertWeights:
    moe, D = moe_of(c), c.hidden_size
    E, F = moe.route.num_experts, moe.mlp_size
    gate_up = tuple(
        weight(f"{m}.experts.{e}.{n}", F, "mlp", D, "embed") for e in range(E) for n in (names.gate, names.up)
    )
    down = tuple(weight(f"{m}.experts.{e}.{names.down}", D, "embed", F, "mlp") for e in range(E))
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


def _shared_params(c: ModelConfig, m: str, names: MoeNames) -> SharedExpert:
    moe, s, D = moe_of(c), f"{m}.{names.shared}", c.hidden_size
    F = moe.shared_mlp_size
    return SharedExpert(
        gate_up=linear_param(
            weight(f"{s}.{names.gate}", F, "mlp", D, "embed"), weight(f"{s}.{names.up}", F, "mlp", D, "embed")
        ),
        down=linear_param(weight(f"{s}.{names.down}", D, "embed", F, "mlp")),
        gate=linear_param(weight(f"{m}.shared_expert_gate", 1, "", D, "embed")) if moe.shared_gate else None,
    )


def moe_block(ops: Ops, c: ModelConfig, w: Moe, h: Array) -> Array:
    """h + experts(norm(h)): [T, D]."""
    moe = moe_of(c)
    x = ops.norm(h, w.norm, c.norm_eps)
    logits = ops.linear(x, w.router, w.router_bias, wide=True)  # [T, E]
    ids, weights = ops.route(logits, moe.route, w.route_bias)  # [T, top_k]
    spec = ExpertsSpec(
        num_experts=moe.route.num_experts,
        activation=c.activation,
        weights_on_input=moe.weights_on_input,
        limit=moe.limit,
    )
    y = ops.experts(x, ids, weights, w.experts, spec)
    if w.shared is not None:
        shared = ops.linear(ops.glu(ops.linear(x, w.shared.gate_up), c.activation), w.shared.down)
        if w.shared.gate is not None:
            shared = ops.gate(shared, ops.linear(x, w.shared.gate), "sigmoid")
        y = y + shared
    return ops.residual_add(h, y)
