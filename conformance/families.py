"""Tiny models of every family: configurations whose weights are drawn; sizes are small and uneven."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

VOCAB = 251
WINDOW = 24

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
_GROUPED = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
}
_LATENT = {
    **_GROUPED,
    "num_key_value_heads": 4,
    "q_lora_rank": 28,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
}
_LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.25},
}
FAMILIES: Mapping[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    "llama": ("LlamaForCausalLM", {"rope_parameters": _LLAMA3, "attention_bias": True}, "dense", ()),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, "dense", ()),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}, "dense", ()),
    "mistral": ("MistralForCausalLM", {"sliding_window": WINDOW}, "dense", ("attention.window",)),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": True,
        },
        "dense",
        ("attention.window", "attention.soft_cap"),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 3,
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 30000.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
            "tie_word_embeddings": True,
        },
        "dense",
        ("attention.window",),
    ),
    "phi3": ("Phi3ForCausalLM", {"partial_rotary_factor": 0.75}, "dense", ()),
    "mixtral": ("MixtralForCausalLM", _EXPERTS, "moe", ("routed_experts",)),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True, "decoder_sparse_step": 2},
        "moe",
        ("routed_experts",),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**_EXPERTS, "head_dim": 32, "sliding_window": WINDOW},
        "moe",
        ("routed_experts", "attention.window", "attention.sinks"),
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0, 1, 0],
            "attention_chunk_size": WINDOW,
            "attn_temperature_tuning": True,
            "floor_scale": 8,
            "attn_scale": 0.4,
            "rope_parameters": _LLAMA3,
        },
        "moe",
        ("routed_experts", "attention.chunk", "attention.q_scale"),
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {
            **_GROUPED,
            "num_hidden_layers": 3,
            "head_dim": 32,
            "attention_bias": True,
            "use_qk_norm": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.25},
        },
        "moe",
        ("routed_experts",),
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _LATENT, "latent", ("routed_experts", "attention.latent")),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {**_LATENT, "q_lora_rank": None, "norm_topk_prob": False, "topk_method": "group_limited_greedy"},
        "latent",
        ("routed_experts", "attention.latent"),
    ),
    "qwen3_5": ("Qwen3_5ForCausalLM", _LINEAR, "state", ("state_kinds",)),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 40},
        "state",
        ("state_kinds", "routed_experts"),
    ),
}
"""Name -> architecture, what its config has besides, profile, and features that a backend needs."""


def sized(family: str, head_sizes: Collection[int]) -> str:
    """The family's name, with a head size that a backend has where it has not the family's own:
    "llama@128". `head_sizes`: () = any.
    """
    _, own, profile, _ = FAMILIES[family]
    size = own.get("head_dim", _COMMON["hidden_size"] // _COMMON["num_attention_heads"])
    if not head_sizes or size in head_sizes or profile == "latent":
        return family
    return f"{family}@{min(head_sizes)}"


def write_folder(name: str, folder: Path, **changes: Any) -> Path:
    """A folder with the family's config.json; its weights are those of `load_format` "dummy".

    `name`: as `sized` gives it.
    """
    family, _, size = name.partition("@")
    architecture, own, _, _ = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [architecture], **_COMMON, **own, **changes}
    if size:
        config["head_dim"] = int(size)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
