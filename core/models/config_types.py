"""Types of what a config.json says, before a family reads it: 4.5 heads would be 4, and "false" true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from core.contract.errors import ConfigError
from core.values import is_number

_COUNTS = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "intermediate_size_mlp",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
        "decoder_sparse_step",
        "interleave_moe_layer_step",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "sliding_window",
        "max_window_layers",
        "sliding_window_pattern",
        "attention_chunk_size",
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "full_attention_interval",
        "no_rope_layer_interval",
    ]
)
_NUMBERS = frozenset(
    [
        "rope_theta",
        "rms_norm_eps",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "routed_scaling_factor",
        "partial_rotary_factor",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "swiglu_limit",
        "swiglu_alpha",
        "attn_scale",
        "floor_scale",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
    ]
)
_SWITCHES = frozenset(
    [
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "norm_topk_prob",
        "use_qk_norm",
        "use_sliding_window",
        "rope_interleave",
    ]
)
_OTHERS = ("quantization_config", "vision_config", "audio_config")
"""Parts that are of no text model."""


def check_types(hf: Mapping[str, Any]) -> None:
    """Refuse a Hugging Face config with a value of a type that its key cannot have; null is as if left out.

    Raises:
        ConfigError: names key, found, wanted.
    """
    names = hf.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise ConfigError(f"the config's architectures is {names!r}, but a list of texts is wanted")
    for key, value in _walk(hf):
        if value is None:
            continue
        if key in _COUNTS and not _is_whole(value):
            raise ConfigError(f"the config's {key} is {value!r}, but a whole number is wanted")
        if key in _NUMBERS and not (is_number(value) and isfinite(value)):
            raise ConfigError(f"the config's {key} is {value!r}, but a finite number is wanted")
        if key in _SWITCHES and not isinstance(value, bool):
            raise ConfigError(f"the config's {key} is {value!r}, but true or false is wanted")


def _walk(hf: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in hf.items():
        if key in _OTHERS:
            continue
        if isinstance(value, Mapping):
            yield from _walk(value)
        else:
            yield key, value


def _is_whole(value: Any) -> bool:
    return is_number(value) and isfinite(value) and value == int(value)
