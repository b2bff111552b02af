"""Small models of every GGUF architecture: written by transformers, converted with the gguf package.

Names come from the package's own table. What a converter changes besides (rows of q and k, norms of Gemma,
experts as one tensor, halves of kv_b_proj and of gate_up_proj) is done here, the opposite of what is tested.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from safetensors.numpy import load_file

Tensors = dict[str, np.ndarray[Any, Any]]

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}


@dataclass(frozen=True)
class Case:
    """A model: its GGUF architecture, the class of its configuration, and what differs from `_SMALL`."""

    arch: MODEL_ARCH
    config: str
    options: dict[str, Any]

    @property
    def prefix(self) -> str:
        """What the architecture's metadata keys begin with."""
        from gguf import MODEL_ARCH_NAMES

        return str(MODEL_ARCH_NAMES[self.arch])

    @property
    def architecture(self) -> str:
        """Hugging Face's name of the model."""
        return self.config.replace("TextConfig", "Config").replace("Config", "ForCausalLM")


CASES: dict[str, Case] = {
    "llama": Case(MODEL_ARCH.LLAMA, "LlamaConfig", {"head_dim": 16, "rope_parameters": _ROPE}),
    "llama_bias": Case(
        MODEL_ARCH.LLAMA,
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": _YARN},
    ),
    "mistral": Case(MODEL_ARCH.LLAMA, "MistralConfig", {"sliding_window": 32, "rope_parameters": _ROPE}),
    "mixtral": Case(
        MODEL_ARCH.LLAMA,
        "MixtralConfig",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "rope_parameters": _ROPE,
        },
    ),
    "qwen2": Case(MODEL_ARCH.QWEN2, "Qwen2Config", {"rope_parameters": _ROPE}),
    "qwen3": Case(
        MODEL_ARCH.QWEN3,
        "Qwen3Config",
        {"head_dim": 24, "tie_word_embeddings": True, "rope_parameters": _ROPE},
    ),
    "qwen3_moe": Case(
        MODEL_ARCH.QWEN3MOE,
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "rope_parameters": _ROPE,
        },
    ),
    "gemma2": Case(
        MODEL_ARCH.GEMMA2,
        "Gemma2Config",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "attn_logit_softcapping": 40.0,
            "final_logit_softcapping": 20.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": Case(
        MODEL_ARCH.GEMMA3,
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        },
    ),
    "phi3": Case(
        MODEL_ARCH.PHI3,
        "Phi3Config",
        {
            "original_max_position_embeddings": 128,
            "sliding_window": 100,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 128,
                "long_factor": [1.5, 2.0, 3.25, 4.0, 5.0, 6.5],
                "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4],
            },
        },
    ),
    "deepseek_v2": Case(
        MODEL_ARCH.DEEPSEEK2,
        "DeepseekV2Config",
        {
            **_EXPERTS,
            **_LATENT,
            "q_lora_rank": None,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "rope_parameters": _ROPE,
        },
    ),
    "deepseek_v3": Case(
        MODEL_ARCH.DEEPSEEK2,
        "DeepseekV3Config",
        {
            **_EXPERTS,
            **_LATENT,
            "q_lora_rank": 48,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "gpt_oss": Case(
        MODEL_ARCH.GPT_OSS,
        "GptOssConfig",
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "sliding_window": 24,
            "rope_parameters": {**_YARN, "truncate": False},
        },
    ),
    "glm4_moe": Case(
        MODEL_ARCH.GLM4_MOE,
        "Glm4MoeConfig",
        {
            **_EXPERTS,
            "head_dim": 32,
            "attention_bias": True,
            "use_qk_norm": True,
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
        },
    ),
}


def original(name: str, folder: Path) -> tuple[transformers.PreTrainedConfig, Tensors]:
    """A random model as transformers saves it: its configuration, and tensors under their published names."""
    case = CASES[name]
    config = getattr(transformers, case.config)(**{**_SMALL, **case.options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer))
    model.save_pretrained(folder)
    return model.config, load_file(folder / "model.safetensors")


def to_gguf(
    path: Path,
    name: str,
    config: transformers.PreTrainedConfig,
    tensors: Tensors,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    whole_kv_b: bool = False,
) -> None:
    """Write the model as a converter does; matrices whose rows are whole blocks have type `kind`.

    `whole_kv_b`: as older converters do, which leave kv_b_proj in one piece.
    """
    case = CASES[name]
    writer = GGUFWriter(path, case.prefix)
    _metadata(writer, case, config)
    table = get_tensor_name_map(case.arch, config.num_hidden_layers)
    for hf, array in _converted(name, config, tensors, whole_kv_b).items():
        stored = table.get_name(hf, try_suffixes=(".weight", ".bias"))
        assert stored is not None, hf
        if array.ndim > 1 and kind != GGMLQuantizationType.F32 and array.shape[-1] % 32 == 0:
            writer.add_tensor(stored, quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(array))
    for factors in ("long", "short") if name == "phi3" else ():
        values = np.asarray(config.rope_parameters[f"{factors}_factor"], np.float32)
        writer.add_tensor(f"rope_factors_{factors}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(writer: GGUFWriter, case: Case, c: Any) -> None:
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rope = c.rope_parameters
    _rope(writer, case, rope.get("full_attention", rope))
    window = getattr(c, "sliding_window", None)
    if window and case.arch != MODEL_ARCH.QWEN2:
        writer.add_sliding_window(window)
    if case.arch == MODEL_ARCH.DEEPSEEK2:
        _latent(writer, c)
    else:
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(c, cap, None):
            getattr(writer, f"add_{cap}")(getattr(c, cap))
    _experts(writer, case, c)


def _rope(writer: GGUFWriter, case: Case, rope: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if rope.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _latent(writer: GGUFWriter, c: Any) -> None:
    writer.add_head_count_kv(1)
    writer.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.qk_nope_head_dim + c.qk_rope_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    if c.q_lora_rank:
        writer.add_q_lora_rank(c.q_lora_rank)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_expert_group_count(c.n_group)
    writer.add_expert_group_used_count(c.topk_group)


def _experts(writer: GGUFWriter, case: Case, c: Any) -> None:
    from gguf import ExpertGatingFuncType

    count = next(
        (getattr(c, n) for n in ("n_routed_experts", "num_local_experts", "num_experts") if hasattr(c, n)), 0
    )
    if not count:
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(c.num_experts_per_tok)
    if case.arch != MODEL_ARCH.LLAMA:
        size = c.intermediate_size if case.arch == MODEL_ARCH.GPT_OSS else c.moe_intermediate_size
        writer.add_expert_feed_forward_length(size)
    if hasattr(c, "first_k_dense_replace"):
        writer.add_leading_dense_block_count(c.first_k_dense_replace)
        writer.add_expert_shared_count(c.n_shared_experts)
        writer.add_expert_weights_scale(c.routed_scaling_factor)
        if getattr(c, "norm_topk_prob", False):
            writer.add_expert_weights_norm(True)
    if case.config in ("DeepseekV3Config", "Glm4MoeConfig"):
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def _converted(name: str, c: Any, tensors: Tensors, whole_kv_b: bool) -> Tensors:
    """Tensors as a file stores them, under names that the gguf package's table knows."""
    out: Tensors = {}
    stacked: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    for hf, array in tensors.items():
        expert = re.fullmatch(r"(model\.layers\.\d+\..*\.experts)\.(\d+)\.(.*)", hf)
        if expert is not None:
            stacked.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = array
            continue
        projection = re.search(r"\.([qk])_proj\.(weight|bias)$", hf)
        if CASES[name].arch == MODEL_ARCH.LLAMA and projection:
            heads = c.num_attention_heads if projection[1] == "q" else c.num_key_value_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if name.startswith("gemma") and hf.endswith("norm.weight"):
            array = array + np.float32(1)
        if hf.endswith("kv_b_proj.weight") and not whole_kv_b:
            kv = array.reshape(c.num_attention_heads, -1, c.kv_lora_rank)
            out[hf.replace("kv_b", "k_b")] = kv[:, : c.qk_nope_head_dim].swapaxes(1, 2)
            out[hf.replace("kv_b", "v_b")] = kv[:, c.qk_nope_head_dim :]
        elif name == "gpt_oss" and ".experts." in hf:
            out |= _gpt_oss_experts(hf, array)
        elif hf.endswith(".sinks"):
            out[f"{hf}.weight"] = array
        else:
            out[hf.replace("correction_bias", "correction.bias")] = array
    for hf, of in stacked.items():
        hf = re.sub(r"block_sparse_moe\.experts", "feed_forward.experts", hf).removeprefix(
            "model." if "block_sparse" in hf else ""
        )
        out[hf] = np.stack([of[e] for e in range(len(of))])
    return out


def _gpt_oss_experts(hf: str, array: np.ndarray[Any, Any]) -> Tensors:
    is_bias = hf.endswith("_bias")
    stem = hf.removesuffix("_bias")
    kind = "bias" if is_bias else "weight"
    turned = array if is_bias else array.swapaxes(-1, -2)
    if stem.endswith(".down_proj"):
        return {f"{stem}.{kind}": turned}
    return {
        f"{stem.replace('gate_up', n)}.{kind}": turned[:, first::2] for first, n in ((0, "gate"), (1, "up"))
    }
