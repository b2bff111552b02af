"""Qwen3-MoE: Qwen3's attention, routed experts in place of most MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from core.contract.batch import Step
from core.contract.ops import Ops
from core.contract.opspecs import RouteSpec
from core.contract.types import Array, CacheHandle
from core.models import llama
from core.models.base import Constant, norm_param
from core.models.config import ModelConfig, MoeConfig, require
from core.models.moe import Moe, adapt_experts, moe_block, moe_of, moe_params

ARCHITECTURES = ("Qwen3MoeForCausalLM",)

attention_specs = llama.attention_specs
cache_layers = llama.cache_layers
head = llama.head
ignored = llama.ignored
adapt = adapt_experts


@dataclass(frozen=True)
class Layer:
    """One decoder layer; its second half is an MLP or a block of experts."""

    attention: llama.Attention
    mlp: llama.Mlp | Moe


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """See `core.models.base`."""
    experts = hf.get("num_experts") or hf.get("num_local_experts")
    # Unlike Qwen3's, a window here is every layer's.
    hf = {**hf, "num_experts": experts, "max_window_layers": 0, "layer_types": None}
    require(hf, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    dense = set(hf.get("mlp_only_layers") or ())
    every = int(hf.get("decoder_sparse_step") or 1)
    c = llama.config(hf)
    route = RouteSpec(
        num_experts=int(hf["num_experts"]),
        top_k=int(hf["num_experts_per_tok"]),
        normalize=bool(hf.get("norm_topk_prob", False)),
    )
    layers = tuple(i for i in range(c.num_layers) if i not in dense and (i + 1) % every == 0)
    moe = MoeConfig(route=route, layers=layers, mlp_size=int(hf["moe_intermediate_size"]))
    return replace(c, family="qwen3_moe", moe=moe)


def params(c: ModelConfig) -> llama.Weights:
    """See `core.models.base`."""
    names = [f"{c.prefix}layers.{i}" for i in range(c.num_layers)]
    experts = moe_of(c).layers
    return llama.Weights(
        embed=llama.embedding(c),
        rope=Constant("rope", c.rope),
        layers=tuple(
            Layer(llama.attention_params(c, n), moe_params(c, n) if i in experts else llama.mlp_params(c, n))
            for i, n in enumerate(names)
        ),
        norm=norm_param(f"{c.prefix}norm.weight", c.hidden_size),
        head=llama.head_param(c),
    )


def forward(
    ops: Ops, c: ModelConfig, w: llama.Weights, caches: tuple[CacheHandle, ...], step: Step
) -> tuple[Array, tuple[CacheHandle, ...]]:
    """See `core.models.base`."""
    cache = list(caches)
    rope = llama.rope_of(c, w.rope)
    h = ops.embed_step(w.embed, step)
    for i, layer in enumerate(w.layers):
        window = llama.window_of(c, i)
        h, cache[i] = llama.attend(ops, c, layer.attention, rope, h, cache[i], step, window)
        h = second_half(ops, c, layer.mlp, h)
    return h, tuple(cache)


def second_half(ops: Ops, c: ModelConfig, w: llama.Mlp | Moe, h: Array) -> Array:
    """The layer's experts, or its MLP."""
    return moe_block(ops, c, w, h) if isinstance(w, Moe) else llama.mlp(ops, c, w, h)
