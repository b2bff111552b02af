"""From the metadata of a GGUF file to a configuration in the form of Hugging Face's config.json.

What a file leaves out and its architecture fixes is filled in here: Gemma's query scale and window pattern,
the groups of DeepSeek's routers, Llama 3's rotary scaling (which a file holds as one divisor per frequency).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core.contract.errors import WeightError
from core.weights.gguf_header import Header, TensorInfo, end_ids
from core.weights.gguf_metadata import Metadata

# Llama 3.1's publication fixes these three; the factor alone differs between its models.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL_LENGTH = 1.0, 4.0, 8192
# Groups of experts and how many of them a token may use, by number of experts: DeepSeek-V2 and V3 as
# published. Files written before the format had keys for them do not say.
DEEPSEEK_GROUPS = {160: (8, 3), 256: (8, 4)}
_PARTLY_ROTATED = ("phi3", "deepseek2", "glm4moe")
MAX_LAYERS = 4096
SIGMOID = 2
"""Value of expert_gating_func."""

Factors = Mapping[str, npt.NDArray[np.float64]]
"""Rotary factors by tensor name."""
Config = dict[str, Any]


class ModelMetadata(Metadata):
    """Metadata of one file below its architecture's prefix, and its tensors' names."""

    def __init__(self, path: Path, header: Header) -> None:
        self.whole_file = Metadata(path, header.metadata)
        self.architecture = self.whole_file.text("general.architecture") or ""
        self.tensors = header.tensors
        super().__init__(path, header.metadata, f"{self.architecture}.")

    def holds(self, tensor: str) -> bool:
        """Whether the file has this tensor."""
        return tensor in self.tensors


def config_of(path: Path, header: Header, family: str, factors: Factors) -> Config:
    """The configuration of a file of a known family.

    Raises:
        WeightError: metadata is missing or contradicts itself; names file and key.
    """
    m = ModelMetadata(path, header)
    config = _base(m)
    scaling = _rope_scaling(m)
    if "rope_freqs.weight" in factors:
        scaling = _llama3_scaling(path, factors["rope_freqs.weight"], config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config | _OWN[family](m, config, factors)


def _base(m: ModelMetadata) -> Config:
    tensors = m.tensors
    if "token_embd.weight" not in tensors:
        raise WeightError(f"{m.path} has no tensor 'token_embd.weight'; convert the model again")
    hidden, heads = m.count("embedding_length", least=1), m.count("attention.head_count", least=1)
    head_size = m.whole("attention.key_length", least=1) or hidden // heads
    if not head_size:
        raise m.wrong("attention.head_count", f"{hidden} heads at most, one for each element of the width,")
    _check_rotary(m, head_size)
    end = end_ids(m.whole_file)
    return {
        "model_type": m.architecture,
        "hidden_size": hidden,
        "num_hidden_layers": _layers(m),
        "num_attention_heads": heads,
        "num_key_value_heads": m.count("attention.head_count_kv", heads, least=1),
        "head_dim": head_size,
        "intermediate_size": m.count("feed_forward_length", least=1),
        "hidden_act": "silu",
        "rms_norm_eps": m.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": m.number("rope.freq_base", 10000.0),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": m.count("context_length", least=1),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "bos_token_id": m.whole_file.whole("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(end) if len(end) > 1 else next(iter(end), None),
        "dtype": _dtype_name(tensors),
    }


def _layers(m: ModelMetadata) -> int:
    """Layers of the model itself: without those that guess further tokens."""
    count, extra = m.count("block_count", least=1, most=MAX_LAYERS), m.count("nextn_predict_layers", 0)
    if extra >= count:
        raise m.wrong("nextn_predict_layers", f"a number below block_count, which is {count},")
    return count - extra


def _check_rotary(m: ModelMetadata, head_size: int) -> None:
    """Refuse a part of each head that is rotated where the family rotates all of it."""
    rotated = m.whole("rope.dimension_count")
    if rotated not in (None, head_size) and m.architecture not in _PARTLY_ROTATED:
        raise m.wrong("rope.dimension_count", f"the head size, {head_size},")


def _dtype_name(tensors: Mapping[str, TensorInfo]) -> str:
    """bfloat16 or float16 where matrices are stored so, else float32."""
    kinds = {t.type for t in tensors.values() if len(t.shape) > 1}
    return {frozenset({"BF16"}): "bfloat16", frozenset({"F16"}): "float16"}.get(frozenset(kinds), "float32")


def _rope_scaling(m: ModelMetadata) -> Config | None:
    kind = m.text("rope.scaling.type") or "none"
    if kind in ("none", "longrope"):
        return None
    if kind not in ("linear", "yarn") or not m.has("rope.scaling.factor"):
        raise WeightError(
            f"{m.path}: {m.architecture}.rope.scaling.type is {kind!r}, and a factor is "
            f"{'there' if m.has('rope.scaling.factor') else 'missing'}; wanted none, longrope, or linear or "
            "yarn with a factor"
        )
    scaling: Config = {"rope_type": kind, "factor": m.number("rope.scaling.factor")}
    if m.has("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = m.count("rope.scaling.original_context_length")
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if kind == "yarn" and m.has(f"rope.scaling.{theirs}"):
            scaling[ours] = m.number(f"rope.scaling.{theirs}")
    return scaling


def _llama3_scaling(path: Path, factors: npt.NDArray[np.float64], config: Mapping[str, Any]) -> Config:
    """Llama 3's scaling parameters, from the number by which the file divides each frequency."""
    factor, size = float(factors.max()), int(config["head_dim"])
    if factors.shape != ((size + 1) // 2,):
        raise _not_llama3(path, factors)
    waves = LLAMA3_ORIGINAL_LENGTH / (2 * pi) * config["rope_theta"] ** (-np.arange(0, size, 2) / size)
    kept = np.clip((waves - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0, 1.0)
    expected = 1.0 / ((1.0 - kept) / factor + kept)
    if not np.allclose(factors, expected, rtol=1e-4, atol=0):
        raise _not_llama3(path, factors)
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_LENGTH,
    }


def _not_llama3(path: Path, factors: npt.NDArray[np.float64]) -> WeightError:
    return WeightError(
        f"{path}: tensor 'rope_freqs.weight' of shape {factors.shape} does not hold the rotary factors of "
        "Llama 3, the only ones known; take the model's safetensors folder"
    )


def _llama(m: ModelMetadata, config: Config, factors: Factors) -> Config:
    own: Config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": m.holds("blk.0.attn_q.bias"),
        "mlp_bias": m.holds("blk.0.ffn_gate.bias"),
    }
    if m.count("attention.sliding_window", 0):
        own |= {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": m.count("attention.sliding_window"),
        }
    return own


def _mixtral(m: ModelMetadata, config: Config, factors: Factors) -> Config:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": m.count("expert_count"),
        "num_experts_per_tok": m.count("expert_used_count"),
        "sliding_window": m.count("attention.sliding_window", 0) or None,
    }


def _qwen2(m: ModelMetadata, config: Config, factors: Factors) -> Config:
    return {"architectures": ["Qwen2ForCausalLM"], "mlp_bias": False}


def _qwen3(m: ModelMetadata, config: Config, factors: Factors) -> Config:
    return {"architectures": ["Qwen3ForCausalLM"], "mlp_bias": False}


def _qwen3_moe(m: ModelMetadata, config: Config, factors: Factors) -> Config:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": m.count("expert_count"),
        "num_experts_per_tok": m.count("expert_used_count"),
        "moe_intermediate_size": m.count("expert_feed_forward_length"),
        "norm_topk_prob": m.flag("expert_weights_norm", True),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(m: ModelMetadata, config: Config, pattern: int) -> Config:
    """What Gemma 2 and 3 share. Every `pattern`-th layer sees everything, the others a window."""
    layers, hidden, heads = (config[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    window = m.count("attention.sliding_window", 0)
    # The 27B models alone scale queries by the width per head, which their head size is not.
    is_27b = layers in (46, 62)
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if is_27b else config["head_dim"],
        "sliding_window": window or None,
        "layer_types": [
            "sliding_attention" if window and (i + 1) % pattern else "full_attention" for i in range(layers)
        ],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }


def _gemma2(m: ModelMetadata, config: Config, factors: Factors) -> Config:
    return _gemma(m, config, 2) | {
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": m.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.number("final_logit_softcapping", 30.0),
    }


def _gemma3(m: ModelMetadata, config: Config, factors: Factors) -> Config:
    return _gemma(m, config, m.count("attention.sliding_window_pattern", 6, least=1)) | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "rope_theta": m.number("rope.freq_base", 1e6),
        "rope_local_base_freq": m.number("rope.freq_base_swa", 10000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": m.number("final_logit_softcapping", 0.0) or None,
    }


def _phi3(m: ModelMetadata, config: Config, factors: Factors) -> Config:
    rotary = m.count("rope.dimension_count", config["head_dim"])
    own: Config = {
        "architectures": ["Phi3ForCausalLM"],
        "partial_rotary_factor": rotary / config["head_dim"],
        "sliding_window": m.count("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": m.count(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
    }
    long, short = (factors.get(f"rope_factors_{n}.weight") for n in ("long", "short"))
    if (long is None) != (short is None):
        raise WeightError(
            f"{m.path} has one of the tensors rope_factors_long.weight and rope_factors_short.weight; both "
            "or none are wanted: convert the model again"
        )
    if long is not None and short is not None:
        own["rope_scaling"] = {
            "rope_type": "longrope",
            "long_factor": [float(str(np.float32(x))) for x in long],
            "short_factor": [float(str(np.float32(x))) for x in short],
        }
    return own


def _deepseek2(m: ModelMetadata, config: Config, factors: Factors) -> Config:
    rotary, experts = m.count("rope.dimension_count"), m.count("expert_count", 0)
    # Files with kv_b_proj in two parts describe attention as multi-query, and the true heads in keys of
    # their own.
    key, value = (
        m.count(f"attention.{n}_length_mla", m.whole(f"attention.{n}_length")) for n in ("key", "value")
    )
    is_v3 = m.count("expert_gating_func", 1) == SIGMOID or any(".exp_probs_b." in name for name in m.tensors)
    own: Config = {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": rotary,
        "q_lora_rank": m.count("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": m.count("attention.kv_lora_rank"),
        "qk_nope_head_dim": key - rotary,
        "qk_rope_head_dim": rotary,
        "v_head_dim": value,
    }
    if "rope_scaling" in config:
        # The file holds 0.1 x mscale_all_dim; mscale itself equals it in every published model.
        scale = float(str(np.float32(m.number("rope.scaling.yarn_log_multiplier", 0.0) * 10)))
        own["rope_scaling"] = config["rope_scaling"] | {"mscale": scale, "mscale_all_dim": scale}
    if not experts:
        return own | {"n_routed_experts": None}
    groups, top = DEEPSEEK_GROUPS.get(experts, (1, 1))
    groups, top = m.count("expert_group_count", groups), m.count("expert_group_used_count", top)
    return own | {
        "n_routed_experts": experts,
        "n_shared_experts": m.count("expert_shared_count", 0),
        "num_experts_per_tok": m.count("expert_used_count"),
        "moe_intermediate_size": m.count("expert_feed_forward_length"),
        "first_k_dense_replace": m.count("leading_dense_block_count", 0),
        "routed_scaling_factor": m.number("expert_weights_scale", 1.0),
        "norm_topk_prob": m.flag("expert_weights_norm", False),
        "scoring_func": "sigmoid" if is_v3 else "softmax",
        "topk_method": "noaux_tc" if is_v3 else "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups,
        "topk_group": top,
    }


def _gpt_oss(m: ModelMetadata, config: Config, factors: Factors) -> Config:
    own: Config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "intermediate_size": m.count("expert_feed_forward_length"),
        "num_local_experts": m.count("expert_count"),
        "num_experts_per_tok": m.count("expert_used_count"),
        "sliding_window": m.count("attention.sliding_window"),
        "layer_types": [
            "full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])
        ],
        "swiglu_limit": 7.0,
    }
    if "rope_scaling" in config:
        own["rope_scaling"] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False} | config[
            "rope_scaling"
        ]
    return own


def _glm4_moe(m: ModelMetadata, config: Config, factors: Factors) -> Config:
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": m.holds("blk.0.attn_q.bias"),
        "use_qk_norm": m.holds("blk.0.attn_q_norm.weight"),
        "partial_rotary_factor": m.count("rope.dimension_count") / config["head_dim"],
        "n_routed_experts": m.count("expert_count"),
        "n_shared_experts": m.count("expert_shared_count", 0),
        "num_experts_per_tok": m.count("expert_used_count"),
        "moe_intermediate_size": m.count("expert_feed_forward_length"),
        "first_k_dense_replace": m.count("leading_dense_block_count", 0),
        "routed_scaling_factor": m.number("expert_weights_scale", 1.0),
        "norm_topk_prob": m.flag("expert_weights_norm", True),
        "n_group": m.count("expert_group_count", 1),
        "topk_group": m.count("expert_group_used_count", 1),
        "num_nextn_predict_layers": m.count("nextn_predict_layers", 0),
    }


_OWN: Mapping[str, Callable[[ModelMetadata, Config, Factors], Config]] = {
    "llama": _llama,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "deepseek2": _deepseek2,
    "gpt-oss": _gpt_oss,
    "glm4moe": _glm4_moe,
}
