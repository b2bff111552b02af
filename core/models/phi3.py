"""Phi-3 and Phi-4, the dense models: Llama with q | k | v and gate | up each stored as one matrix.

Phi-4-mini rotates a part of each head; some have a window in all layers; long contexts come by "longrope".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from core.contract.types import Part
from core.models import llama
from core.models.base import Constant, linear_param, norm_param
from core.models.config import ModelConfig, layer_windows, rope_config

ARCHITECTURES = ("Phi3ForCausalLM",)

adapt = llama.adapt
attention_specs = llama.attention_specs
cache_layers = llama.cache_layers
forward = llama.forward
head = llama.head
ignored = llama.ignored


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """See `core.models.base`."""
    hf = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, **hf}
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    part = float(rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0)
    # Files from before "longrope" had its name.
    if rope.get("type", rope.get("rope_type")) == "su":
        rope = {**rope, "rope_type": "longrope", "type": "longrope"}
        hf = {**hf, "rope_scaling": rope}
    plain = {**hf, "rope_scaling": None, "rope_parameters": None}
    c = llama.config({**plain, "layer_types": None, "attention_bias": False})
    return replace(
        c,
        family="phi3",
        rope=rope_config(hf, int(c.head_size * part)),
        windows=layer_windows({**hf, "layer_types": None}, c.num_layers),
    )


def params(c: ModelConfig) -> llama.Weights:
    """See `core.models.base`."""
    names = [f"{c.prefix}layers.{i}" for i in range(c.num_layers)]
    return llama.Weights(
        embed=llama.embedding(c),
        rope=Constant("rope", c.rope),
        layers=tuple(llama.Layer(_attention_params(c, n), _mlp_params(c, n)) for n in names),
        norm=norm_param(f"{c.prefix}norm.weight", c.hidden_size),
        head=llama.head_param(c),
    )


def _attention_params(c: ModelConfig, layer: str) -> llama.Attention:
    name, H, D = f"{layer}.self_attn.qkv_proj.weight", c.head_size, c.hidden_size
    q, kv = c.num_heads * H, c.num_kv_heads * H
    rows = ((0, q, "heads"), (q, kv, "kv_heads"), (q + kv, kv, "kv_heads"))
    parts = [Part(name, (n, D), (axis, "embed"), start=(at, 0), unit=(H, 1)) for at, n, axis in rows]
    return replace(llama.attention_params(c, layer), qkv=linear_param(*parts))


def _mlp_params(c: ModelConfig, layer: str) -> llama.Mlp:
    name, F, D = f"{layer}.mlp.gate_up_proj.weight", c.mlp_size, c.hidden_size
    parts = [Part(name, (F, D), ("mlp", "embed"), start=(at, 0)) for at in (0, F)]
    return replace(llama.mlp_params(c, layer), gate_up=linear_param(*parts))
