"""Gemma 2 and 3, the text models: norms before and after each half, windows in most layers, gated by gelu.

Gemma 2 caps attention scores and logits; Gemma 3 norms each head's q and k, and rotates layers with a window
by frequencies of their own, which are never scaled. Norms are stored as weight - 1, and embeddings are
multiplied by sqrt(D), rounded to the compute dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes  # noqa: F401  (makes "bfloat16" a dtype of NumPy)
import numpy as np

from core.contract.batch import Step
from core.contract.errors import ConfigError, UnsupportedError
from core.contract.ops import Ops
from core.contract.types import Array, CacheHandle
from core.models import llama
from core.models.base import Constant, linear_param, norm_param, weight
from core.models.config import ModelConfig, eos_ids, layer_windows, rope_config

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")

attention_specs = llama.attention_specs
cache_layers = llama.cache_layers
head = llama.head

_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
"""Fields that published files leave out where they have the value that transformers gives them."""
_GEMMA2: Mapping[str, Any] = {
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3: Mapping[str, Any] = {"vocab_size": 262208, "max_position_embeddings": 131072}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


@dataclass(frozen=True)
class Layer:
    """One decoder layer, and the norms of what its halves add."""

    attention: llama.Attention
    attention_out: Any
    mlp: llama.Mlp
    mlp_out: Any


@dataclass(frozen=True)
class Weights:
    """The whole model. `local_rope` turns the layers that have a window; Gemma 2 has one table for all."""

    embed: Any
    rope: Any
    local_rope: Any
    layers: tuple[Any, ...]
    norm: Any
    head: Any


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """See `core.models.base`."""
    is_third = not hf["architectures"][0].startswith("Gemma2")
    text = dict(hf.get("text_config") or hf)
    # What the whole checkpoint says of itself wins over what its text part says.
    for name in ("architectures", "tie_word_embeddings", "dtype", "torch_dtype"):
        if hf.get(name) is not None:
            text[name] = hf[name]
    defaults = {**_DEFAULTS, **(_GEMMA3 if is_third else _GEMMA2)}
    # A soft cap that is null means none; any other field that is null is one that was left out.
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    text = defaults | {k: v for k, v in text.items() if v is not None or k in caps}
    if text.get("use_bidirectional_attention"):
        raise UnsupportedError(
            f"{text['architectures'][0]} with use_bidirectional_attention embeds texts and does not "
            "generate; take a generating checkpoint"
        )
    activation = text["hidden_activation"]
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ConfigError(f"hidden_activation {activation!r} is not known; known are {known}")
    rope, local_rope = _ropes(text) if is_third else (text, None)
    # Llama's own activation is not this family's.
    c = llama.config({**rope, "layer_types": None, "hidden_act": None})
    return replace(
        c,
        family="gemma",
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        qk_norm=is_third,
        local_rope=None if local_rope is None else rope_config(local_rope, c.head_size),
        windows=layer_windows(text, c.num_layers, _pattern(text, is_third)),
        attention_scale=float(text["query_pre_attn_scalar"]) ** -0.5,
        # transformers 5 reads this field of Gemma 3, and does not use it.
        attention_soft_cap=None if is_third else text["attn_logit_softcapping"],
        logit_soft_cap=text.get("final_logit_softcapping"),
        embed_scale=float(c.hidden_size) ** 0.5,
        eos_token_ids=eos_ids(hf) or c.eos_token_ids,
    )


def _ropes(text: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Configurations of the rotation of layers that see everything, and of those with a window."""
    plain = {k: v for k, v in text.items() if k not in ("rope_scaling", "rope_parameters")}
    both = text.get("rope_parameters") or {}
    scaling = text.get("rope_scaling") or both.get("full_attention") or {}
    whole = {"rope_theta": text.get("rope_theta", 1e6), **scaling}
    local = {"rope_theta": text.get("rope_local_base_freq", 1e4), **(both.get("sliding_attention") or {})}
    return {**plain, "rope_parameters": whole}, {**plain, "rope_parameters": local}


def _pattern(text: Mapping[str, Any], is_third: bool) -> int:
    """Every so manieth layer sees everything."""
    default = 6 if is_third else 2
    return int(text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or default)


def adapt(c: ModelConfig, names: Collection[str]) -> ModelConfig:
    """See `core.models.base`: the prefix of the text model, which has changed over the years."""
    prefixes = ("language_model.model.", "model.language_model.")
    return replace(c, prefix=next((p for p in prefixes if any(n.startswith(p) for n in names)), c.prefix))


def ignored(c: ModelConfig, name: str) -> bool:
    """The vision tower and what joins it to the text, and a tied head's own copy."""
    tower = ("vision_tower.", "multi_modal_projector.")
    return name.removeprefix("model.").startswith(tower) or llama.ignored(
        c, name.removeprefix("language_model.")
    )


def params(c: ModelConfig) -> Weights:
    """See `core.models.base`."""
    D = c.hidden_size
    head_name = f"{c.prefix.removesuffix('model.')}lm_head" if c.prefix.endswith(".model.") else "lm_head"
    return Weights(
        embed=llama.embedding(c),
        rope=Constant("rope", c.rope),
        local_rope=None if c.local_rope is None else Constant("local_rope", c.local_rope),
        layers=tuple(_layer_params(c, f"{c.prefix}layers.{i}") for i in range(c.num_layers)),
        norm=norm_param(f"{c.prefix}norm.weight", D, zero_centred=True),
        head=llama.embedding(c)
        if c.tied_head
        else linear_param(weight(head_name, c.vocab_size, "vocab", D, "embed")),
    )


def _layer_params(c: ModelConfig, name: str) -> Layer:
    def norm(which: str) -> Any:
        return norm_param(f"{name}.{which}.weight", c.hidden_size, zero_centred=True)

    return Layer(
        attention=llama.attention_params(c, name, zero_centred=True),
        attention_out=norm("post_attention_layernorm"),
        mlp=replace(llama.mlp_params(c, name), norm=norm("pre_feedforward_layernorm")),
        mlp_out=norm("post_feedforward_layernorm"),
    )


def forward(
    ops: Ops, c: ModelConfig, w: Weights, caches: tuple[CacheHandle, ...], step: Step
) -> tuple[Array, tuple[CacheHandle, ...]]:
    """See `core.models.base`."""
    cache = list(caches)
    rope = llama.rope_of(c, w.rope)
    local_rope = rope if w.local_rope is None else llama.rope_of(c, w.local_rope)
    h = ops.embed_step(w.embed, step, _rounded(c.embed_scale, c.compute_dtype))
    for i, layer in enumerate(w.layers):
        window, a, m = llama.window_of(c, i), layer.attention, layer.mlp
        turned = rope if window is None else local_rope
        out, cache[i] = llama.heads(ops, c, a, turned, h, cache[i], step, window)
        h = ops.linear_norm_add(out, a.o, layer.attention_out, h, c.norm_eps, a.o_bias)
        x = ops.norm_linear_glu(h, m.norm, m.gate_up, c.norm_eps, c.activation)
        h = ops.linear_norm_add(x, m.down, layer.mlp_out, h, c.norm_eps)
    return h, tuple(cache)


def _rounded(scale: float, dtype: str) -> float:
    return float(np.dtype(dtype).type(scale))
