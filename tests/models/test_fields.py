"""Fields of config.json that no step could compute with are refused, whichever family reads them."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import core.models
from core.contract.errors import ConfigError
from core.executor.rank import read_model
from core.models.fields import KINDS, check_fields
from core.weights.checkpoint import open_checkpoint

READERS = ("get", "setdefault", "pop")
SOURCES = Path(core.models.__file__).parent
INNER = {"q_norm", "k_norm"}


def keys_read() -> Iterator[str]:
    """Texts by which the families' modules look something up in a mapping."""
    for file in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            found: list[ast.expr] = []
            if isinstance(node, ast.Subscript):
                found = [node.slice]
            elif isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                found = node.args[:1] if name in READERS else node.args if name == "require" else []
            for key in found:
                if isinstance(key, ast.Constant) and isinstance(key.value, str) and " " not in key.value:
                    yield key.value


def test_every_field_that_a_family_reads_has_a_kind() -> None:
    read = set(keys_read()) - INNER
    assert len(read) > 60
    assert not read - set(KINDS)


WRONG: dict[str, tuple[Any, ...]] = {
    "num_attention_heads": (4.5, 0, -4, "4", True, [4], float("nan"), 2**40),
    "num_key_value_heads": (0, 1.5),
    "hidden_size": ("wide", {}),
    "num_hidden_layers": (0, 10**9),
    "num_experts": (-1, 10**9),
    "rms_norm_eps": (0, -1e-6, float("nan"), float("inf"), "1e-6", True),
    "rope_theta": (0, -5, 1, float("nan")),
    "sliding_window": (-4, 1.5, "all"),
    "first_k_dense_replace": (-2, 0.5),
    "swiglu_limit": (-1, 0),
    "attn_logit_softcapping": (0.0, -50.0, "none"),
    "query_pre_attn_scalar": (0,),
    "partial_rotary_factor": (0, 1.5, -0.5),
    "tie_word_embeddings": ("false", 0, "true", []),
    "attention_bias": ("false", 1),
    "norm_topk_prob": ("no",),
    "architectures": ("LlamaForCausalLM", [1], {"a": 1}, [""]),
    "layer_types": ("full_attention", [0]),
    "eos_token_id": (-1, 1.5, "2", [1, "2"], [None], True),
    "mlp_only_layers": (3, [-1], [0.5]),
    "rope_scaling": ("yarn", 4, []),
    "text_config": ("llama", []),
    "dtype": (16,),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_a_field_of_another_kind_is_refused_by_name(name: str, value: Any) -> None:
    words = rf"^m: the config's {name} is .*, but it must be .*; check"
    with pytest.raises(ConfigError, match=words) as caught:
        check_fields({name: value}, Path("m"))
    assert repr(value)[:100] in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("factor", 0), ("factor", -3.0), ("short_factor", [1.0, 0.0]), ("rope_type", 3), ("truncate", "false")],
)
def test_what_is_nested_is_held_to_the_same(name: str, value: Any) -> None:
    words = rf"config's text_config\.rope_parameters\.full_attention\.{name} is "
    nested = {"text_config": {"rope_parameters": {"full_attention": {name: value}}}}
    with pytest.raises(ConfigError, match=words):
        check_fields(nested, Path("m"))


def test_nulls_and_whole_numbers_with_a_point_are_taken() -> None:
    check_fields({name: None for name in KINDS} | {"num_attention_heads": 4.0, "x": -1}, Path("m"))


def changed(folder: Path, place: Path, changes: dict[str, Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config).update(changes)
    (place / "config.json").write_text(json.dumps(config))
    return place


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"num_attention_heads": 4.5}, "num_attention_heads is 4.5, but it must be a whole number"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', .* a list"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', .* true or false"),
        ("llama", {"eos_token_id": 99999}, "eos_token_id is 99999 .* 256 ids"),
        ("llama", {"head_dim": 15, "rope_parameters": None}, "15 elements of heads of 15 are rotated"),
        (
            "llama",
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor is 4",
        ),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.01}}, "0 elements of heads"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention"]},
            "layer_types has 1 entries",
        ),
        ("qwen3_5", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("qwen3_5", {"linear_num_key_heads": 3}, "linear_num_value_heads is .* do not divide"),
        ("mixtral", {"num_experts_per_tok": 100}, r"100 experts of 8 .*\(num_experts_per_tok\)"),
        ("mixtral", {"num_experts_per_tok": 0}, "0 experts of 8"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ("glm4_moe", {"n_group": 3}, r"groups \(n_group\)"),
        ("glm4_moe", {"topk_group": 9}, r"groups \(topk_group\)"),
        (
            "deepseek_v3",
            {"topk_group": 1, "num_experts_per_tok": 5},
            r"5 experts .*1 groups \(topk_group\) of 4",
        ),
        ("deepseek_v3", {"n_group": 16, "topk_group": 16}, r"groups \(n_group\) have 1 expert"),
        ("gpt_oss", {"swiglu_limit": -1}, "swiglu_limit is -1"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused_as_the_config_is_read(
    family: str,
    changes: dict[str, Any],
    words: str,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = changed(tiny_folder(family), tmp_path, changes)
    with pytest.raises(ConfigError, match=words) as caught:
        read_model(open_checkpoint(folder, "dummy"))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [1.5, "2", -1, 256])
def test_the_ends_of_the_generation_config_are_held_to_the_same(
    value: Any, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = changed(tiny_folder("llama"), tmp_path, {})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, value]}))
    with pytest.raises(ConfigError, match="eos_token_id is"):
        read_model(open_checkpoint(folder, "dummy"))
