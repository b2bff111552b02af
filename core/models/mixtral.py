"""Mixtral: Llama's attention, with a window where the config has one, and routed experts in every layer.

Weights are the softmax over all experts of the chosen ones, divided by their sum. Published files hold
experts one by one, as w1 (gate), w3 (up) and w2 (down) below `block_sparse_moe`; others stack them below
`mlp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from core.contract.opspecs import RouteSpec
from core.models import llama, qwen3_moe
from core.models.base import Constant, norm_param
from core.models.config import ModelConfig, MoeConfig, layer_windows, require
from core.models.moe import MoeNames, adapt_experts, moe_of, moe_params

ARCHITECTURES = ("MixtralForCausalLM",)

adapt = adapt_experts
attention_specs = llama.attention_specs
cache_layers = llama.cache_layers
forward = qwen3_moe.forward
head = llama.head
ignored = llama.ignored

_NAMES = MoeNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """See `core.models.base`."""
    require(hf, "num_local_experts", "num_experts_per_tok")
    c = llama.config({"rope_theta": 1e6, "rms_norm_eps": 1e-5, **hf})
    route = RouteSpec(num_experts=int(hf["num_local_experts"]), top_k=int(hf["num_experts_per_tok"]))
    return replace(
        c,
        family="mixtral",
        windows=layer_windows({**hf, "layer_types": None}, c.num_layers),
        moe=MoeConfig(route=route, layers=tuple(range(c.num_layers)), mlp_size=c.mlp_size),
    )


def params(c: ModelConfig) -> llama.Weights:
    """See `core.models.base`."""
    names = [f"{c.prefix}layers.{i}" for i in range(c.num_layers)]
    moe = MoeNames() if moe_of(c).fused else _NAMES
    return llama.Weights(
        embed=llama.embedding(c),
        rope=Constant("rope", c.rope),
        layers=tuple(
            qwen3_moe.Layer(llama.attention_params(c, n), moe_params(c, n, names=moe)) for n in names
        ),
        norm=norm_param(f"{c.prefix}norm.weight", c.hidden_size),
        head=llama.head_param(c),
    )
