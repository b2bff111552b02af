"""Configurations that a family allows besides the one of its tiny model: the oracle against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import MistralConfig

from core.contract.errors import ConfigError, WeightError
from core.contract.opspecs import AttentionSpec, LatentSpec
from core.models import definition
from tests.models import tiny
from tests.models.harness import SHORT, model_logits

Folder = Callable[[str], Path]

ORACLE = 1e-9
IDS = tiny.tokens()

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.5,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}


def _rope_of_whole_heads() -> dict[str, Any]:
    rope = {**tiny._SETTINGS["phi3"]["rope_parameters"], "partial_rotary_factor": 1.0}
    return rope | {name: [*rope[name], 2.0, 3.0] for name in ("short_factor", "long_factor")}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "head size from the width": ("llama", {"head_dim": None}),
    "as many KV heads as heads": ("llama", {"num_key_value_heads": 4}),
    "linear scaling": ("llama", {"rope_parameters": _LINEAR}),
    "yarn without mscale": (
        "qwen3",
        {"rope_parameters": {k: v for k, v in _YARN.items() if not k.startswith("mscale")}},
    ),
    "window of named layers": (
        "qwen2_window",
        {"max_window_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "window of all layers": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "every second layer dense": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "a named layer dense": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "a value head per key head": ("qwen3_5_text", {"linear_num_value_heads": 2}),
    "key heads as wide as value heads": ("qwen3_5_text", {"linear_value_head_dim": 16}),
    "two taps": ("qwen3_5_text", {"linear_conv_kernel_dim": 2}),
    "layer kinds by interval": ("qwen3_5_text", {"layer_types": None, "full_attention_interval": 2}),
    "v2, queries of low rank": ("deepseek_v2", {"q_lora_rank": 28}),
    "v2, yarn": ("deepseek_v2", {"rope_parameters": _YARN}),
    "v2, no groups": ("deepseek_v2", {"topk_method": "greedy", "n_group": None, "topk_group": None}),
    "v2, experts in every layer": ("deepseek_v2", {"first_k_dense_replace": 0}),
    "v3, queries of full rank": ("deepseek_v3", {"q_lora_rank": None}),
    "v3, one group": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "v3, dense": ("deepseek_v3", {"first_k_dense_replace": 3}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "phi, short factors": ("phi3", {"original_max_position_embeddings": 128}),
    "phi, attention factor from the lengths": (
        "phi3",
        {
            "rope_parameters": {
                k: v for k, v in tiny._SETTINGS["phi3"]["rope_parameters"].items() if k != "attention_factor"
            }
        },
    ),
    "phi, whole heads rotated": ("phi3", {"rope_parameters": _rope_of_whole_heads()}),
    "phi, no scaling, no window": (
        "phi3",
        {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
    ),
    "phi, a tied head": ("phi3", {"tie_word_embeddings": True}),
    "gemma 2, no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma 2, its own head": ("gemma2", {"tie_word_embeddings": False}),
    "gemma 2, biases": ("gemma2", {"attention_bias": True}),
    "gemma 2, a width without a whole root": ("gemma2", {"hidden_size": 72}),
    "gemma 3, a width without a whole root": ("gemma3_text", {"hidden_size": 72}),
    "gemma 2, gelu by erf": ("gemma2", {"hidden_activation": "gelu"}),
    "gemma 3 with a tower, its own head": ("gemma3", {"tie_word_embeddings": False}),
    "gemma 3, windows everywhere": ("gemma3_text", {"layer_types": ["sliding_attention"] * 3}),
    "gemma 3, no windows": ("gemma3_text", {"layer_types": ["full_attention"] * 3}),
    "mixtral, no window": ("mixtral", {"sliding_window": None}),
    "gpt-oss, no biases in attention": ("gpt_oss", {"attention_bias": False}),
    "gpt-oss, no rope scaling": ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "gpt-oss, layer kinds turned round": (
        "gpt_oss",
        {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "llama 4, experts in every layer": ("llama4_text", {"interleave_moe_layer_step": 1}),
    "llama 4, experts in named layers": ("llama4_text", {"moe_layers": [0, 3]}),
    "llama 4, unrotated layers by interval": (
        "llama4_text",
        {"no_rope_layers": None, "no_rope_layer_interval": 3},
    ),
    "llama 4, no norm of q and k": ("llama4_text", {"use_qk_norm": False}),
    "llama 4, no rope scaling": (
        "llama4_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    ),
    "llama 4, two experts": ("llama4_text", {"num_experts_per_tok": 2}),
    "llama 4, biases and a tied head": ("llama4", {"attention_bias": True, "tie_word_embeddings": True}),
    "glm, one group": ("glm4_moe", {"n_group": 1, "topk_group": 1}),
    "glm, no norm of q and k": ("glm4_moe", {"use_qk_norm": False}),
    "glm, no biases": ("glm4_moe", {"attention_bias": False}),
    "glm, weights as they are": ("glm4_moe", {"norm_topk_prob": False}),
    "glm, experts in every layer": ("glm4_moe", {"first_k_dense_replace": 0}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_oracle_equals_transformers(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, changes = VARIANTS[variant]
    monkeypatch.setitem(tiny._SETTINGS, name, {**tiny._SETTINGS[name], **changes})
    folder = tiny.make_folder(name, tmp_path / "model")
    wanted = tiny.reference_logits(folder, IDS)
    found = model_logits(folder, IDS, "cpu_reference", "float64")
    wanted = np.concatenate([wanted, wanted[:SHORT]])
    assert np.abs(found - wanted).max() <= ORACLE * np.abs(wanted).max()


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_a_tied_head_is_the_whole_checkpoints_affair(tiny_folder: Folder) -> None:
    hf = config_of(tiny_folder("qwen3_5"))
    for text, top, wanted in ((False, True, True), (True, False, False), (True, None, True)):
        hf["text_config"]["tie_word_embeddings"], hf["tie_word_embeddings"] = text, top
        assert definition(hf).config(hf).tied_head is wanted


def test_mistral_has_a_window_unless_its_config_says_that_it_has_none(tiny_folder: Folder) -> None:
    hf = config_of(tiny_folder("mistral"))
    layers = hf["num_hidden_layers"]
    model = definition(hf)
    assert model.config({**hf, "sliding_window": None}).windows == ()
    del hf["sliding_window"]
    assert model.config(hf).windows == (MistralConfig().sliding_window,) * layers


def test_a_text_config_need_not_name_an_architecture(tiny_folder: Folder) -> None:
    hf = config_of(tiny_folder("qwen3_5_moe"))
    hf["text_config"]["architectures"] = None
    assert definition(hf).config(hf).architecture == "Qwen3_5MoeForConditionalGeneration"


@pytest.mark.parametrize("key", ["n_group", "topk_group", "routed_scaling_factor", "kv_lora_rank"])
def test_missing_routing_figures_are_refused_by_name(key: str, tiny_folder: Folder) -> None:
    hf = config_of(tiny_folder("deepseek_v3"))
    del hf[key]
    with pytest.raises(ConfigError, match=key):
        definition(hf).config(hf)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mixtral", "num_local_experts"),
        ("gpt_oss", "sliding_window"),
        ("llama4_text", "intermediate_size_mlp"),
        ("llama4_text", "attention_chunk_size"),
        ("glm4_moe", "moe_intermediate_size"),
    ],
)
def test_what_a_family_cannot_do_without_is_refused_by_name(name: str, key: str, tiny_folder: Folder) -> None:
    hf = config_of(tiny_folder(name))
    del hf[key]
    with pytest.raises(ConfigError, match=key):
        definition(hf).config(hf)


@pytest.mark.parametrize("key", ["no_rope_layers", "layer_types"])
def test_a_list_that_leaves_layers_out_is_refused(key: str, tiny_folder: Folder) -> None:
    hf = config_of(tiny_folder("llama4_text"))
    hf[key] = hf[key][:3]
    with pytest.raises(ConfigError, match=f"{key} has 3 entries, but the model has 4 layers"):
        definition(hf).config(hf)


def test_mixtrals_experts_may_be_stacked(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder("mixtral")
    tensors = load_file(folder / "model.safetensors")
    stacked = {k: v for k, v in tensors.items() if ".block_sparse_moe." not in k}
    for i in range(2):
        old, new = f"model.layers.{i}.block_sparse_moe.", f"model.layers.{i}.mlp."
        w1, w2, w3 = (
            np.stack([tensors[f"{old}experts.{e}.{n}.weight"] for e in range(8)]) for n in ("w1", "w2", "w3")
        )
        stacked[f"{new}gate.weight"] = tensors[f"{old}gate.weight"]
        stacked[f"{new}experts.gate_up_proj"] = np.concatenate([w1, w3], 1)
        stacked[f"{new}experts.down_proj"] = w2
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(stacked, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found, wanted = (model_logits(f, IDS[:80], "cpu_reference", "float64") for f in (tmp_path, folder))
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("qwen3_5_text", "attention_bias", True),
        ("deepseek_v2", "attention_bias", True),
        ("deepseek_v2", "topk_method", "other_way"),
        ("qwen3_5_text", "layer_types", ["other_kind"] * 4),
        ("llama", "rope_parameters", {"rope_type": "other_kind"}),
        ("gpt_oss", "layer_types", ["other_kind"] * 2),
        ("gpt_oss", "swiglu_alpha", 1.5),
        ("llama4_text", "layer_types", ["other_kind"] * 4),
        ("gemma2", "hidden_activation", "other_kind"),
        ("llama", "hidden_act", "gelu"),
        ("deepseek_v3", "hidden_act", "relu"),
        ("gemma3_text", "layer_types", ["other_kind"] * 3),
    ],
)
def test_what_is_not_known_is_refused(name: str, key: str, value: object, tiny_folder: Folder) -> None:
    hf = {**config_of(tiny_folder(name)), key: value}
    with pytest.raises(ConfigError, match=r"is (not )?known"):
        definition(hf).config(hf)


@pytest.mark.parametrize(
    ("name", "surplus"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.bias"),
        ("llama", "model.layers.2.mlp.up_proj.weight"),
        ("qwen3_5", "model.language_model.layers.0.linear_attn.conv1d.bias"),
        ("qwen3_5_moe", "model.language_model.layers.0.mlp.experts.0.up_proj.weight"),
        ("deepseek_v3", "model.layers.2.self_attn.kv_b_proj.weight_scale_inv"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.8.w1.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_blocks"),
        ("llama4", "language_model.model.layers.0.self_attn.q_norm.weight"),
        ("glm4_moe", "model.layers.0.self_attn.o_proj.bias"),
        ("glm4_moe", "model.layers.3.mlp.experts.0.up_proj.weight"),
    ],
)
def test_a_tensor_that_the_model_does_not_use_is_refused_by_name(
    name: str, surplus: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = _with_tensors(tiny_folder(name), tmp_path, {surplus: np.ones((2, 2), np.float32)})
    with pytest.raises(WeightError, match=surplus):
        model_logits(folder, IDS, "cpu_reference", "float64")


@pytest.mark.parametrize(
    ("name", "surplus"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("qwen3", "lm_head.weight"),
        ("qwen3_5", "model.visual.other.weight"),
        ("qwen3_5", "mtp.layers.0.other.weight"),
        ("deepseek_v3", "model.layers.3.mlp.experts.0.up_proj.weight"),
        ("llama4", "vision_model.other.weight"),
        ("gemma3", "model.vision_tower.other.weight"),
        ("gemma3", "language_model.lm_head.weight"),
        ("glm4_moe", "model.layers.3.mlp.experts.0.up_proj.weight"),
    ],
)
def test_a_tensor_of_what_the_engine_leaves_out_changes_nothing(
    name: str, surplus: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    tensors = {surplus: np.ones((2, 2), np.float32)}
    if surplus.endswith("lm_head.weight"):
        embedding = f"{surplus.removesuffix('lm_head.weight')}model.embed_tokens.weight"
        tensors[surplus] = load_file(folder / "model.safetensors")[embedding]
    if name == "glm4_moe":
        # What tells a layer that predicts further tokens from one that the config forgot.
        tensors["model.layers.3.eh_proj.weight"] = np.ones((2, 2), np.float32)
    more = _with_tensors(folder, tmp_path, tensors)
    found, wanted = (model_logits(f, IDS[:80], "cpu_reference", "float64") for f in (more, folder))
    assert np.array_equal(found, wanted)


def _with_tensors(folder: Path, path: Path, tensors: dict[str, Any]) -> Path:
    (path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(
        {**load_file(folder / "model.safetensors"), **tensors},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2_window", "gemma2", "gemma3", "gpt_oss", "llama4", "qwen3_5", "deepseek_v3", "mixtral"],
)
def test_attention_gets_what_the_definition_announces(
    name: str, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is announced is held against a backend's capabilities before anything is allocated."""
    from backends.cpu_reference.ops import ReferenceOps

    seen: set[object] = set()

    def watch(op: str) -> None:
        run = getattr(ReferenceOps, op)

        def watched(self: Any, *args: Any) -> Any:
            for spec in (a for a in args if isinstance(a, AttentionSpec | LatentSpec)):
                seen.add(spec)
                if isinstance(spec, AttentionSpec):
                    assert spec.sinks == (args[-1] is not None and args[-1] is not spec)
            return run(self, *args)

        monkeypatch.setattr(ReferenceOps, op, watched)

    for op in ("attend", "norm_rope_attend", "norm_rope_attend_latent"):
        watch(op)
    folder = tiny_folder(name)
    model_logits(folder, IDS[:80], "cpu_reference", "float64")
    hf = config_of(folder)
    model = definition(hf)
    announced = model.attention_specs(model.config(hf))
    assert set(announced) == seen and len(announced) == len(seen)
