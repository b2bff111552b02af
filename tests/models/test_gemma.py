"""What Gemma's tiny models cannot show: an embedding scale that is not a whole number, and published
configurations, which leave out most of what transformers fills in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from core.contract.ops import Ops
from core.models import definition
from tests.models import tiny
from tests.models.harness import model_logits

IDS = tiny.tokens()
# Its root is no number of any dtype; that of the tiny models' width is 8.
WIDTH = 72

_GEMMA3: dict[str, Any] = {"model_type": "gemma3_text", "sliding_window": 1024}
_LINEAR = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
_GEMMA2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 256000,
    "query_pre_attn_scalar": 224,
    "rope_theta": 10000.0,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma 2, all defaults": {"architectures": ["Gemma2ForCausalLM"]},
    "gemma 2": _GEMMA2 | {"num_hidden_layers": 42, "hidden_size": 3584, "num_attention_heads": 16},
    "gemma 3, all defaults": {"architectures": ["Gemma3ForCausalLM"]},
    "gemma 3, text": {
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262144,
        "hidden_size": 1152,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rope_local_base_freq": 20000,
        "rope_theta": 3000000,
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 4,
    },
    "gemma 3, with a tower": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": _GEMMA3 | _LINEAR | {"hidden_size": 2560, "num_hidden_layers": 34},
    },
    "gemma 3, scale of its own": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": _GEMMA3
        | _LINEAR
        | {"hidden_size": 5376, "num_attention_heads": 32, "query_pre_attn_scalar": 168, "head_dim": 128},
    },
}


def _as_transformers_reads(hf: dict[str, Any]) -> Any:
    model = getattr(transformers, hf["architectures"][0])
    whole = model.config_class(**hf)
    return getattr(whole, "text_config", whole)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_config_leaves_out_is_what_transformers_fills_in(name: str) -> None:
    hf = PUBLISHED[name]
    c, t = definition(hf).config(hf), _as_transformers_reads(hf)
    kinds = [None if kind == "full_attention" else t.sliding_window for kind in t.layer_types]
    assert list(c.windows) == kinds
    assert {None, t.sliding_window} == set(kinds)
    assert (c.vocab_size, c.hidden_size, c.mlp_size) == (t.vocab_size, t.hidden_size, t.intermediate_size)
    assert (c.num_layers, c.head_size) == (t.num_hidden_layers, t.head_dim)
    assert (c.num_heads, c.num_kv_heads) == (t.num_attention_heads, t.num_key_value_heads)
    assert (c.norm_eps, c.max_position) == (t.rms_norm_eps, t.max_position_embeddings)
    assert (c.tied_head, c.attention_scale) == (t.tie_word_embeddings, t.query_pre_attn_scalar**-0.5)
    assert (c.attention_soft_cap, c.logit_soft_cap) == (t.attn_logit_softcapping, t.final_logit_softcapping)
    ropes = t.rope_parameters
    both = (ropes["full_attention"], ropes["sliding_attention"]) if "full_attention" in ropes else (ropes,)
    for found, wanted in zip((c.rope, c.local_rope), both, strict=False):
        assert found is not None
        assert found.theta == wanted["rope_theta"]
        assert found.factor == wanted.get("factor", 1.0)
        assert found.scaling == wanted["rope_type"].replace("default", "none")
    assert (c.local_rope is None) == (len(both) == 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma3_text"])
def test_embeddings_are_scaled_by_a_root_that_the_dtype_holds(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny._SETTINGS, name, {**tiny._SETTINGS[name], "hidden_size": WIDTH})
    folder = tiny.make_folder(name, tmp_path / "model")
    seen: set[float | None] = set()
    run = Ops.embed_step

    def watched(self: Any, w: Any, step: Any, scale: float | None = None) -> Any:
        seen.add(scale)
        return run(self, w, step, scale)

    monkeypatch.setattr(Ops, "embed_step", watched)
    model_logits(folder, IDS, "cpu", dtype)
    torch_dtype = getattr(torch, dtype)
    model = getattr(transformers, tiny._ARCHITECTURES[name]).from_pretrained(folder, dtype=torch_dtype)
    assert seen == {float(model.get_input_embeddings().embed_scale.to(torch_dtype))}
    assert seen != {WIDTH**0.5}


@pytest.mark.parametrize("tied", [True, False])
def test_a_tower_and_its_text_model_may_have_their_newer_names(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny._SETTINGS, "gemma3", {**tiny._SETTINGS["gemma3"], "tie_word_embeddings": tied})
    old, new = tiny.make_folder("gemma3", tmp_path / "old"), tmp_path / "new"
    tensors = load_file(old / "model.safetensors")
    assert ("language_model.lm_head.weight" in tensors) is not tied
    new.mkdir()
    (new / "config.json").write_bytes((old / "config.json").read_bytes())
    renamed = {_newer(name): value for name, value in tensors.items()}
    save_file(renamed, new / "model.safetensors", metadata={"format": "pt"})
    found, wanted = (model_logits(f, IDS, "cpu_reference", "float64") for f in (new, old))
    assert np.array_equal(found, wanted)


def _newer(name: str) -> str:
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.", 1)
    return f"model.{name}"
