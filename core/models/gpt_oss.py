"""gpt-oss: sinks in every head, windows in every second layer, biases everywhere, experts in every layer.

The router takes a softmax over the chosen logits only. Experts compute a clamped swiglu; their tensors are
stored [E, in, out] with the columns of gate and up taking turns. Published files hold them in MXFP4, which
`core.weights.mxfp4` shows in that same form.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from core.contract.errors import ConfigError
from core.contract.opspecs import AttentionSpec, ExpertWeights, RouteSpec
from core.contract.types import Param, Part
from core.models import llama, qwen3_moe
from core.models.base import Constant, norm_param
from core.models.config import ModelConfig, MoeConfig, layer_windows, require
from core.models.moe import MoeNames, moe_of, moe_params

ARCHITECTURES = ("GptOssForCausalLM",)

cache_layers = llama.cache_layers
forward = qwen3_moe.forward
head = llama.head
ignored = llama.ignored

_NAMES = MoeNames(router="router")
_ALPHA = 1.702
"""Slope of the sigmoid in "swigluoai"."""


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """See `core.models.base`."""
    require(hf, "num_local_experts", "num_experts_per_tok", "sliding_window")
    alpha = float(hf.get("swiglu_alpha", _ALPHA))
    if alpha != _ALPHA:
        raise ConfigError(f"swiglu_alpha is {alpha}, but gpt-oss is known here with {_ALPHA} only")
    biased = bool(hf.get("attention_bias", True))
    c = llama.config({"rope_theta": 150000.0, "rms_norm_eps": 1e-5, **hf, "attention_bias": biased})
    route = RouteSpec(
        num_experts=int(hf["num_local_experts"]),
        top_k=int(hf["num_experts_per_tok"]),
        scoring="softmax_topk",
        normalize=False,
    )
    moe = MoeConfig(
        route=route,
        layers=tuple(range(c.num_layers)),
        mlp_size=c.mlp_size,
        router_bias=True,
        limit=float(hf.get("swiglu_limit", 7.0)),
        fused=True,
    )
    windows = layer_windows(hf, c.num_layers, every=2)
    return replace(c, family="gpt_oss", windows=windows, activation="swigluoai", moe=moe)


def adapt(c: ModelConfig, names: Collection[str]) -> ModelConfig:
    """See `core.models.base`."""
    return c


def params(c: ModelConfig) -> llama.Weights:
    """See `core.models.base`."""
    names = [f"{c.prefix}layers.{i}" for i in range(c.num_layers)]
    return llama.Weights(
        embed=llama.embedding(c),
        rope=Constant("rope", c.rope),
        layers=tuple(
            qwen3_moe.Layer(
                _attention_params(c, n),
                moe_params(c, n, names=_NAMES, experts=_experts(c, f"{n}.mlp.experts")),
            )
            for n in names
        ),
        norm=norm_param(f"{c.prefix}norm.weight", c.hidden_size),
        head=llama.head_param(c),
    )


def attention_specs(c: ModelConfig) -> tuple[AttentionSpec, ...]:
    """See `core.models.base`."""
    return tuple(replace(spec, sinks=True) for spec in llama.attention_specs(c))


def _attention_params(c: ModelConfig, layer: str) -> llama.Attention:
    sinks = Param((Part(f"{layer}.self_attn.sinks", (c.num_heads,), ("heads",)),), ("bias",))
    return replace(llama.attention_params(c, layer), sinks=sinks)


def _experts(c: ModelConfig, name: str) -> ExpertWeights:
    E, D, F = moe_of(c).route.num_experts, c.hidden_size, moe_of(c).mlp_size
    turns = [(2, first, 1) for first in (0, 1)]
    gate_up = tuple(
        Part(
            f"{name}.gate_up_proj",
            (E, D, F),
            ("expert", "embed", "mlp"),
            pick=turn,
            pick_axis=2,
            transform="transpose",
        )
        for turn in turns
    )
    gate_up_bias = tuple(
        Part(f"{name}.gate_up_proj_bias", (E, F), ("expert", "mlp"), pick=turn, pick_axis=1) for turn in turns
    )
    down = Part(f"{name}.down_proj", (E, F, D), ("expert", "mlp", "embed"), transform="transpose")
    down_bias = Part(f"{name}.down_proj_bias", (E, D), ("expert", "embed"))
    return ExpertWeights(
        Param(gate_up, ("experts",), join=1),
        Param((down,), ("experts",)),
        Param(gate_up_bias, ("experts", "bias"), join=1),
        Param((down_bias,), ("experts", "bias")),
    )
