"""GLM-4.5 to 4.7: grouped-query attention rotated in part, sigmoid-routed experts after the first dense
layers.

Biases on q, k, v and norms on each head's q and k where the config has them. Experts are chosen as
DeepSeek-V3's are: the selection alone adds a bias, groups score by their best two; shared experts see every
token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from core.contract.opspecs import RouteSpec
from core.models import deepseek, llama, qwen3_moe
from core.models.base import Constant, norm_param
from core.models.config import ModelConfig, MoeConfig, require, rope_config
from core.models.moe import MoeNames, adapt_experts, moe_of, moe_params

ARCHITECTURES = ("Glm4MoeForCausalLM",)

adapt = adapt_experts
attention_specs = llama.attention_specs
cache_layers = llama.cache_layers
forward = qwen3_moe.forward
head = llama.head
ignored = deepseek.ignored

_NAMES = MoeNames(shared="shared_experts")


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """See `core.models.base`."""
    require(hf, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    c = llama.config({"rms_norm_eps": 1e-5, **hf})
    route = RouteSpec(
        num_experts=int(hf["n_routed_experts"]),
        top_k=int(hf["num_experts_per_tok"]),
        scoring="sigmoid",
        normalize=bool(hf.get("norm_topk_prob", True)),
        scale=float(hf.get("routed_scaling_factor", 1.0)),
        num_groups=int(hf.get("n_group") or 1),
        top_groups=int(hf.get("topk_group") or 1),
        group_score="top2_sum",
    )
    size = int(hf["moe_intermediate_size"])
    return replace(
        c,
        family="glm4_moe",
        windows=(),
        rope=rope_config(hf, _rotary_size(hf, c.head_size)),
        output_bias=False,
        mlp_bias=False,
        qk_norm=bool(hf.get("use_qk_norm", False)),
        moe=MoeConfig(
            route=route,
            layers=tuple(range(int(hf.get("first_k_dense_replace", 1)), c.num_layers)),
            mlp_size=size,
            shared_mlp_size=size * int(hf.get("n_shared_experts", 1)),
            route_bias=True,
        ),
    )


def _rotary_size(hf: Mapping[str, Any], head_size: int) -> int:
    found = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    return int(
        head_size * float(found.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 0.5)
    )


def params(c: ModelConfig) -> llama.Weights:
    """See `core.models.base`."""
    names = [f"{c.prefix}layers.{i}" for i in range(c.num_layers)]
    experts = moe_of(c).layers
    return llama.Weights(
        embed=llama.embedding(c),
        rope=Constant("rope", c.rope),
        layers=tuple(
            qwen3_moe.Layer(
                llama.attention_params(c, n),
                moe_params(c, n, names=_NAMES) if i in experts else llama.mlp_params(c, n),
            )
            for i, n in enumerate(names)
        ),
        norm=norm_param(f"{c.prefix}norm.weight", c.hidden_size),
        head=llama.head_param(c),
    )
