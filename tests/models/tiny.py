"""Tiny random models written by transformers: the ground truth for `core.models`.

A family is a small but complete model: every tensor is random, every bias is non-zero, no norm weight is
the neutral one, `rms_norm_eps` is large enough to see, and every removable feature in `FEATURES` moves the
logits (test_tiny.py proves it). So an engine that forgets a feature cannot agree with `reference_logits`.

`reference_logits` runs the published model code without its hidden float32 steps (norms, softmax, rotary
tables, router scores, the gated delta rule): `_Exact` turns each request for float32 into one for float64. A
float64 engine can then be held to a bound near 1e-10, one that has no room for somebody else's rounding.
`as_published=True` leaves the float32 steps in.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch.overrides import TorchFunctionMode

VOCAB = 256
WINDOW = 24
# Longer than WINDOW, than every original_max_position_embeddings below, and than the 64 tokens after which
# the chunked delta rule starts a second chunk; no multiple of 16 or 64.
LENGTH = 83


@dataclass(frozen=True)
class Feature:
    """One thing that an engine can get wrong.

    name: what to switch off on the engine's side.
    field: the config field it hangs on, dotted from the text config; "" when the family always has it.
    off: value of `field` with which transformers runs without the feature; None when no value does that.
    tensor: pattern of the checkpoint tensors that `fill` makes neutral; "" when `off` does it.
    """

    name: str
    field: str = ""
    off: object = None
    tensor: str = ""
    fill: float = 0.0

    @property
    def removable(self) -> bool:
        """Whether `without` can build the model that lacks this feature."""
        return self.off is not None or bool(self.tensor)


@dataclass(frozen=True)
class Tiny:
    """One family: its name here, the `architectures` entry of its config.json, the names of its features."""

    name: str
    architecture: str
    features: tuple[str, ...]


_EPS = Feature("norm_eps", "rms_norm_eps", 1e-6)
_THETA = Feature("rope_theta", "rope_parameters.rope_theta", 10000.0)
_SCALING = Feature("rope_scaling", "rope_parameters.rope_type", "default")
_TIED = Feature("tied head", "tie_word_embeddings")
_QKV_BIAS = Feature("qkv_bias", "", None, "*.self_attn.[qkv]_proj.bias")
_QK_NORM = Feature("qk_norm", "", None, "*.self_attn.[qk]_norm.weight", 1.0)
_QK_NORM_ZERO = Feature("qk_norm", "", None, "*.self_attn.[qk]_norm.weight", 0.0)
_NORM_TOPK = Feature("norm_topk", "norm_topk_prob", False)
_TOP_K = Feature("top_k", "num_experts_per_tok", 1)
_HYBRID = (
    _EPS,
    _THETA,
    Feature("partial_rotary", "rope_parameters.partial_rotary_factor", 1.0),
    _QK_NORM_ZERO,
    Feature("attention_gate"),
    Feature("short_conv", "linear_conv_kernel_dim", None, "*.linear_attn.conv1d.weight", 1.0),
    Feature("decay", "", None, "*.linear_attn.A_log", -30.0),
    Feature("dt_bias", "", None, "*.linear_attn.dt_bias"),
    Feature("beta", "", None, "*.linear_attn.in_proj_b.weight"),
    Feature("gated_norm", "", None, "*.linear_attn.norm.weight", 1.0),
    Feature("output_gate", "", None, "*.linear_attn.in_proj_z.weight"),
    Feature("value_head_groups", "linear_num_key_heads"),
)
_HYBRID_MOE = (
    _TOP_K,
    Feature("norm_topk"),
    Feature("shared_expert", "shared_expert_intermediate_size", None, "*.shared_expert.down_proj.weight"),
    Feature("shared_expert_gate", "", None, "*.shared_expert_gate.weight"),
)
_DEEPSEEK = (
    _EPS,
    _THETA,
    _TOP_K,
    Feature("grouped_routing", "topk_group", 4),
    Feature("routed_scale", "routed_scaling_factor", 1.0),
    Feature("shared_expert", "n_shared_experts", None, "*.shared_experts.down_proj.weight"),
    Feature("kv_norm", "", None, "*.kv_a_layernorm.weight", 1.0),
)
_ROUTER_BIAS = Feature("expert_bias", "", None, "*.e_score_correction_bias")
_LLAMA4 = (
    _EPS,
    _THETA,
    Feature("chunk", "attention_chunk_size", 512),
    Feature("unrotated layers", "no_rope_layers", [1, 1, 1, 1]),
    Feature("qk_norm", "use_qk_norm", False),
    Feature("temperature_tuning", "attn_temperature_tuning", False),
    Feature("temperature_floor", "floor_scale", 60),
    Feature("shared_expert", "", None, "*.shared_expert.down_proj.weight"),
    Feature("routed experts", "", None, "*.experts.down_proj"),
    Feature("weights_on_input"),
    Feature("sigmoid routing"),
    Feature("dense layers", "", None, "*.feed_forward.down_proj.weight"),
    Feature("top_k", "num_experts_per_tok", 2),
)
_GEMMA = (
    _EPS,
    _TIED,
    Feature("query scale", "query_pre_attn_scalar", 32),
    Feature("window", "sliding_window", 512),
    Feature("gelu"),
    Feature("norm of attention's output", "", None, "*.post_attention_layernorm.weight"),
    Feature("norm of the MLP's output", "", None, "*.post_feedforward_layernorm.weight"),
    Feature("norms around zero"),
    Feature("embedding scale"),
)
_LOGIT_CAP = Feature("logit cap", "final_logit_softcapping", 1e9)
_GEMMA3 = (
    *_GEMMA,
    _QK_NORM_ZERO,
    Feature("rope_theta", "rope_parameters.full_attention.rope_theta", 10000.0),
    Feature("rope_scaling", "rope_parameters.full_attention.rope_type", "default"),
    Feature("local rope_theta", "rope_parameters.sliding_attention.rope_theta", 50000.0),
)
FEATURES: dict[str, tuple[Feature, ...]] = {
    "llama": (_EPS, _THETA),
    "mistral": (_EPS, _THETA, Feature("window", "sliding_window", 512)),
    "phi3": (
        _EPS,
        _THETA,
        Feature("rope_scaling", "rope_parameters.rope_type", "default"),
        Feature("partial_rotary"),
        Feature("long factors"),
        Feature("rope_attention_factor", "rope_parameters.attention_factor", 1.0),
        Feature("window", "sliding_window", 512),
    ),
    "gemma2": (*_GEMMA, _LOGIT_CAP, _THETA, Feature("attention cap", "attn_logit_softcapping", 1e9)),
    "gemma3": _GEMMA3,
    "gemma3_text": (*_GEMMA3, _LOGIT_CAP),
    "llama3_rope": (_EPS, _THETA, _SCALING, _TIED),
    "llama_bias": (
        _EPS,
        _THETA,
        Feature("qkv_bias", "attention_bias", None, "*.self_attn.[qkv]_proj.bias"),
        Feature("o_bias", "attention_bias", None, "*.self_attn.o_proj.bias"),
        Feature("mlp_bias", "mlp_bias", None, "*.mlp.*.bias"),
    ),
    "qwen2": (_EPS, _THETA, _QKV_BIAS, _TIED),
    "qwen2_window": (_EPS, _THETA, _QKV_BIAS, Feature("window", "use_sliding_window", False)),
    "qwen3": (_EPS, _THETA, _QK_NORM, _TIED),
    "qwen3_one_kv_head": (_QK_NORM,),
    "qwen3_moe": (_EPS, _THETA, _QK_NORM, _NORM_TOPK, _TOP_K),
    "qwen3_5": (*_HYBRID, _TIED),
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe": (*_HYBRID, *_HYBRID_MOE),
    "qwen3_5_moe_split": (*_HYBRID, *_HYBRID_MOE),
    "deepseek_v2": (*_DEEPSEEK, Feature("group_limited_greedy", "topk_method", "greedy")),
    "deepseek_v3": (
        *_DEEPSEEK,
        _SCALING,
        Feature("rope_attention_factor", "rope_parameters.mscale", 0.6),
        Feature("softmax_mscale", "rope_parameters.mscale_all_dim", 0.0),
        Feature("rope_interleave", "rope_interleave", False),
        Feature("q_lora", "q_lora_rank", None, "*.q_a_layernorm.weight", 1.0),
        _ROUTER_BIAS,
        _NORM_TOPK,
    ),
    "mixtral": (_EPS, _THETA, _TOP_K, Feature("norm_topk"), Feature("window", "sliding_window", 512)),
    "gpt_oss": (
        _EPS,
        _THETA,
        _TOP_K,
        Feature("rope_scaling", "rope_parameters.rope_type", "default"),
        Feature("rope_truncate", "rope_parameters.truncate", True),
        Feature("window", "sliding_window", 512),
        Feature("window of named layers", "layer_types", ["full_attention", "sliding_attention"]),
        Feature("sinks", "", None, "*.self_attn.sinks", -30.0),
        Feature("qkv_bias", "", None, "*.self_attn.[qkv]_proj.bias"),
        Feature("o_bias", "", None, "*.self_attn.o_proj.bias"),
        Feature("router_bias", "", None, "*.router.bias"),
        Feature("gate_up_bias", "", None, "*.gate_up_proj_bias"),
        Feature("down_bias", "", None, "*.down_proj_bias"),
        Feature("clamp", "swiglu_limit", 100.0),
        Feature("alpha"),
        Feature("softmax_topk"),
    ),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "glm4_moe": (
        _EPS,
        _THETA,
        _TOP_K,
        _QK_NORM,
        _QKV_BIAS,
        _ROUTER_BIAS,
        _NORM_TOPK,
        Feature("partial_rotary", "rope_parameters.partial_rotary_factor", 1.0),
        Feature("grouped_routing", "topk_group", 4),
        Feature("group_score"),
        Feature("routed_scale", "routed_scaling_factor", 1.0),
        Feature("shared_expert", "n_shared_experts", None, "*.shared_experts.down_proj.weight"),
        Feature("dense layers", "", None, "model.layers.0.mlp.down_proj.weight"),
    ),
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama3_rope": "LlamaForCausalLM",
    "llama_bias": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_window": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_one_kv_head": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5_moe_split": "Qwen3_5MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
    "llama4_text": "Llama4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
FAMILIES: tuple[Tiny, ...] = tuple(
    Tiny(name, architecture, tuple(feature.name for feature in FEATURES[name]))
    for name, architecture in _ARCHITECTURES.items()
)


def _rope(theta: float, **more: object) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta, **more}


# The ids that would end a generation are unset, so an engine always runs to the asked length.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_DENSE: dict[str, Any] = {**_COMMON, "num_hidden_layers": 2, "intermediate_size": 128}
_LINEAR: dict[str, Any] = {
    **_COMMON,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": _rope(
        50000.0, partial_rotary_factor=0.25, mrope_section=[2, 1, 1], mrope_interleaved=True
    ),
}
_LATENT: dict[str, Any] = {
    **_DENSE,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
}
_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
_LLAMA3 = _rope(
    50000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
_YARN = _rope(
    1000.0,
    rope_type="yarn",
    factor=8.0,
    beta_fast=8.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=0.6,
    original_max_position_embeddings=64,
)
# Two layers of this window reach back to the first token.
_WIDE_WINDOW = 48
_CHUNKED: dict[str, Any] = {
    **_COMMON,
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
}
_VISION4: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vision_output_dim": 32,
    "image_size": 16,
    "patch_size": 4,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}
_YARN_WHOLE = _rope(
    1000.0,
    rope_type="yarn",
    factor=8.0,
    beta_fast=8.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=64,
)
_LINEAR_MOE: dict[str, Any] = {
    **_LINEAR,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 40,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}
_NORMED: dict[str, Any] = {
    **_DENSE,
    "head_dim": 32,
    "query_pre_attn_scalar": 20,
    "sliding_window": WINDOW,
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": 2.0,
    "tie_word_embeddings": True,
}
_NORMED3: dict[str, Any] = {
    **_NORMED,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": _rope(30000.0, rope_type="linear", factor=4.0),
        "sliding_attention": _rope(500.0),
    },
}
_VISION_GEMMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {**_DENSE, "rope_parameters": _rope(20000.0)},
    "mistral": {**_DENSE, "head_dim": 32, "sliding_window": _WIDE_WINDOW, "rope_parameters": _rope(20000.0)},
    "phi3": {
        **_DENSE,
        "sliding_window": _WIDE_WINDOW,
        # Below every length that is tested, so that transformers takes the long factors, too.
        "original_max_position_embeddings": 8,
        "rope_parameters": _rope(
            20000.0,
            rope_type="longrope",
            partial_rotary_factor=0.75,
            short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            long_factor=[1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
            attention_factor=1.2,
        ),
    },
    "gemma2": {**_NORMED, "attn_logit_softcapping": 3.0, "rope_parameters": _rope(20000.0)},
    # transformers caps logits of text models only; no published model of either kind has a cap.
    "gemma3": {**_NORMED3, "final_logit_softcapping": None},
    "gemma3_text": _NORMED3,
    "llama3_rope": {**_DENSE, "head_dim": 32, "tie_word_embeddings": True, "rope_parameters": _LLAMA3},
    "llama_bias": {**_DENSE, "attention_bias": True, "mlp_bias": True, "rope_parameters": _rope(20000.0)},
    "qwen2": {**_DENSE, "tie_word_embeddings": True, "rope_parameters": _rope(30000.0)},
    "qwen2_window": {
        **_DENSE,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "rope_parameters": _rope(30000.0),
    },
    "qwen3": {**_DENSE, "head_dim": 32, "tie_word_embeddings": True, "rope_parameters": _rope(50000.0)},
    "qwen3_one_kv_head": {**_DENSE, "num_key_value_heads": 1, "rope_parameters": _rope(50000.0)},
    "qwen3_moe": {
        **_DENSE,
        "head_dim": 32,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "rope_parameters": _rope(50000.0),
    },
    "qwen3_5": {**_LINEAR, "intermediate_size": 128, "tie_word_embeddings": True},
    "qwen3_5_text": {**_LINEAR, "intermediate_size": 128},
    "qwen3_5_moe": _LINEAR_MOE,
    "qwen3_5_moe_split": _LINEAR_MOE,
    "deepseek_v2": {
        **_LATENT,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "rope_parameters": _rope(20000.0),
    },
    "deepseek_v3": {**_LATENT, "q_lora_rank": 28, "norm_topk_prob": True, "rope_parameters": _YARN},
    "mixtral": {
        **_DENSE,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": _WIDE_WINDOW,
        "rope_parameters": _rope(50000.0),
    },
    "gpt_oss": {
        **_DENSE,
        "head_dim": 32,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": WINDOW,
        "swiglu_limit": 1.5,
        "rope_parameters": _YARN_WHOLE,
    },
    "llama4": _CHUNKED,
    "llama4_text": _CHUNKED,
    "glm4_moe": {
        **_DENSE,
        "num_hidden_layers": 3,
        "head_dim": 32,
        "attention_bias": True,
        "use_qk_norm": True,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.7,
        "rope_parameters": _rope(50000.0, partial_rotary_factor=0.25),
    },
}
# save_pretrained writes experts one by one; the published files of this family hold them stacked, the rows of
# gate before those of up.
_STACKED_EXPERTS = ("qwen3_5_moe",)
# Published files also hold multi-token-prediction layers, which the language model must leave alone.
_UNUSED: dict[str, dict[str, tuple[int, ...]]] = {
    "qwen3_5": {"mtp.norm.weight": (64,), "mtp.fc.weight": (64, 128)},
    "deepseek_v3": {"model.layers.3.enorm.weight": (64,), "model.layers.3.eh_proj.weight": (64, 128)},
}


# Families whose language model comes with a vision tower, and its settings.
_TOWERS = {"qwen3_5": _VISION, "qwen3_5_moe": _VISION, "llama4": _VISION4, "gemma3": _VISION_GEMMA}


def tokens(count: int = LENGTH, seed: int = 0) -> np.ndarray:
    """`count` random token ids, int64[count]; the default exceeds every window and original context."""
    return np.random.default_rng(seed).integers(0, VOCAB, count)


def make_folder(name: str, path: Path, seed: int = 0) -> Path:
    """Write family `name` to the folder `path` (config.json, model.safetensors in float32) and return `path`.

    Equal `name` and `seed` give equal weights, whatever the version of torch or transformers. Raises KeyError
    for a name that is not in FAMILIES.
    """
    architecture = getattr(transformers, _ARCHITECTURES[name])
    settings = json.loads(json.dumps(_SETTINGS[name]))
    if name in _TOWERS:
        tied = settings["tie_word_embeddings"]
        settings = {"text_config": settings, "vision_config": _TOWERS[name], "tie_word_embeddings": tied}
    model = architecture(architecture.config_class(**settings)).float()
    zero_centred = name.startswith(("qwen3_5", "gemma"))
    with torch.no_grad():
        for key, value in (*model.named_parameters(), *model.named_buffers()):
            if key.endswith(("inv_freq", "embed_scale", "position_ids")):
                continue
            value.copy_(torch.from_numpy(_weight(key, tuple(value.shape), _random(key, seed), zero_centred)))
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    if name in _STACKED_EXPERTS:
        weights = {key: value for key, value in weights.items() if ".mlp.experts." not in key}
        stacked = {key: value for key, value in model.named_parameters() if ".mlp.experts." in key}
        weights |= {key: value.detach().numpy() for key, value in stacked.items()}
    for key, shape in _UNUSED.get(name, {}).items():
        weights[key] = _random(key, seed).standard_normal(shape, np.float32)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _random(key: str, seed: int) -> np.random.Generator:
    """Numbers that depend on the tensor's name, not on its turn: a new tensor leaves the others alone."""
    return np.random.default_rng((seed, zlib.crc32(key.encode())))


def _weight(key: str, shape: tuple[int, ...], random: np.random.Generator, zero_centred: bool) -> np.ndarray:
    """Random values for the parameter `key`, sized so that activations stay near 1."""
    normal = random.standard_normal(shape)
    if key.endswith("A_log"):  # with dt_bias below, a token keeps between about 0.5 and 0.99 of the state
        return np.log(random.uniform(0.02, 0.5, shape))
    if key.endswith("dt_bias"):
        return random.uniform(-2.0, 1.0, shape)
    if key.endswith("e_score_correction_bias"):
        return 0.3 * normal
    if key.endswith(".bias"):
        return 0.5 * normal
    if len(shape) == 1:
        centre = 0.0 if zero_centred and ".linear_attn." not in key and ".visual." not in key else 1.0
        return centre + 0.3 * normal
    if key.endswith("embed_tokens.weight"):  # also the head where tied
        return 0.4 * normal
    if key.endswith("lm_head.weight"):
        return 0.3 * normal
    if key.endswith("conv1d.weight"):
        return 0.6 * normal
    if key.endswith("mlp.gate.weight"):
        return 2.0 * normal / np.sqrt(shape[-1])
    return 1.5 * normal / np.sqrt(shape[-1])


def without(folder: Path, feature: Feature, path: Path) -> Path:
    """Copy the model in `folder` to `path` with `feature` removed, and return `path`.

    Raises ValueError when the feature is not `removable`, when its config field is absent or when no tensor
    has its name.
    """
    if not feature.removable:
        raise ValueError(
            f"feature {feature.name!r} has neither an off value nor a tensor; test it in the engine"
        )
    shutil.copytree(folder, path)
    if feature.tensor:
        weights = load_file(path / "model.safetensors")
        names = fnmatch.filter(weights, feature.tensor)
        if not names:
            raise ValueError(f"no tensor like {feature.tensor!r} in {folder}")
        changed = {key: np.full_like(weights[key], feature.fill) for key in names}
        save_file({**weights, **changed}, path / "model.safetensors", metadata={"format": "pt"})
        return path
    config = json.loads((path / "config.json").read_text())
    *parents, last = feature.field.split(".")
    holder = config.get("text_config", config)
    for parent in parents:
        holder = holder[parent]
    if last not in holder:
        raise ValueError(f"config field {feature.field!r} of feature {feature.name!r} is absent in {folder}")
    holder[last] = feature.off
    if last == "use_sliding_window":  # the saved layer_types would keep the window
        config.pop("layer_types", None)
    (path / "config.json").write_text(json.dumps(config))
    return path


def with_old_config(folder: Path, path: Path) -> Path:
    """Copy the model in `folder` to `path` with config.json as transformers 4 wrote it, and return `path`.

    That is `rope_theta`, `rope_scaling` (null or with the key `type`) and `torch_dtype` instead of
    `rope_parameters` and `dtype`: the form of most published files. Raises ValueError for a family that was
    never published so.
    """
    whole = json.loads((folder / "config.json").read_text())
    if whole["model_type"].startswith("qwen3_5"):
        raise ValueError(f"{whole['model_type']} was only ever published with rope_parameters")
    config = whole.get("text_config", whole)
    rope = config.pop("rope_parameters")
    key = "type"
    if "sliding_attention" in rope:
        # A family younger than the newer name of this key.
        key = "rope_type"
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config["layer_types"].index("full_attention") + 1
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    whole["torch_dtype"] = whole.pop("dtype")
    config.pop("layer_types", None)
    shutil.copytree(folder, path)
    (path / "config.json").write_text(json.dumps(whole))
    return path


class _Exact(TorchFunctionMode):
    """Inside it, code that asks for float32 gets float64, so a float64 model stays one from end to end."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = {torch.float32: torch.float64}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        named = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **named)


def _load(path: Path, as_published: bool) -> Any:
    architecture = getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])
    model = architecture.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    if not as_published:
        with _Exact():
            for module in model.modules():
                buffers = [name for name in module._buffers if name.endswith("inv_freq")]
                if buffers:
                    fresh = type(module)(module.config)
                    for name in buffers:
                        setattr(module, name, getattr(fresh, name))
    # Llama 4's wrapper holds a whole text model; only around images does it add anything of its own.
    text = getattr(model, "language_model", None)
    return text if hasattr(text, "lm_head") else model


def _logits(model: Any, token_ids: np.ndarray, as_published: bool) -> np.ndarray:
    ids = torch.from_numpy(np.asarray(token_ids, dtype=np.int64))[None]
    with torch.no_grad():
        if as_published:
            return model(input_ids=ids, use_cache=False).logits[0].numpy()
        with _Exact():
            return model(input_ids=ids, use_cache=False).logits[0].numpy()


def reference_logits(path: Path, token_ids: np.ndarray, *, as_published: bool = False) -> np.ndarray:
    """Logits of the model in `path` after each of `token_ids` [T]: float64[T, V], eager attention, no cache.

    `as_published` keeps the float32 steps of the published code (error about 1e-6 of the logits' spread).
    """
    return _logits(_load(path, as_published), token_ids, as_published)


def reference_greedy(path: Path, prompt_ids: np.ndarray | list[int], n: int) -> list[int]:
    """The `n` ids that greedy decoding appends to `prompt_ids`; a full pass each, ties to the lowest id."""
    model = _load(path, False)
    ids = [int(token) for token in prompt_ids]
    for _ in range(n):
        ids.append(int(np.argmax(_logits(model, np.array(ids), False)[-1])))
    return ids[len(ids) - n :]
