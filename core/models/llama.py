"""Llama 2 and 3.x, Mistral, Qwen2 and 2.5, Qwen3: dense decoders with grouped-query attention.

They differ in data only: windows (Mistral, Qwen2), biases on q, k, v (Qwen2), norms on each head's q and k
(Qwen3), rotary scaling, a tied head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from core.contract.batch import Step
from core.contract.ops import Ops
from core.contract.opspecs import AttentionSpec, Rope, RopeSpec
from core.contract.types import Array, CacheHandle, CacheLayerSpec, Packed, Param, Part
from core.models.base import Constant, bias_param, linear_param, norm_param, weight
from core.models.config import (
    ModelConfig,
    all_attention,
    check_activation,
    checkpoint_dtype,
    eos_ids,
    layer_windows,
    require,
    rope_config,
    windows,
)

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Attention:
    """Attention weights of a layer."""

    norm: Any
    qkv: Any
    o: Any
    qkv_bias: Any = None
    o_bias: Any = None
    q_norm: Any = None
    k_norm: Any = None
    sinks: Any = None


@dataclass(frozen=True)
class Mlp:
    """Weights of a gated MLP."""

    norm: Any
    gate_up: Any
    down: Any
    gate_up_bias: Any = None
    down_bias: Any = None


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    attention: Attention
    mlp: Mlp


@dataclass(frozen=True)
class Weights:
    """The whole model."""

    embed: Any
    rope: Any
    layers: tuple[Any, ...]
    norm: Any
    head: Any


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """See `core.models.base`."""
    require(hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    check_activation(hf)
    architecture = hf["architectures"][0]
    heads = int(hf["num_attention_heads"])
    head_size = int(hf.get("head_dim") or hf["hidden_size"] // heads)
    layers = int(hf["num_hidden_layers"])
    qwen2 = architecture == "Qwen2ForCausalLM"
    is_mistral = architecture == "MistralForCausalLM"
    return ModelConfig(
        architecture=architecture,
        family="llama",
        vocab_size=int(hf["vocab_size"]),
        hidden_size=int(hf["hidden_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(hf.get("num_key_value_heads") or heads),
        head_size=head_size,
        mlp_size=int(hf["intermediate_size"]),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        max_position=int(hf.get("max_position_embeddings", 2048)),
        rope=rope_config(hf, head_size),
        layer_kinds=all_attention(layers),
        tied_head=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=qwen2 or bool(hf.get("attention_bias", False)),
        output_bias=not qwen2 and bool(hf.get("attention_bias", False)),
        mlp_bias=bool(hf.get("mlp_bias", False)),
        qk_norm=architecture.startswith("Qwen3"),
        windows=layer_windows({"sliding_window": 4096, **hf}, layers) if is_mistral else windows(hf, layers),
        eos_token_ids=eos_ids(hf),
        dtype=checkpoint_dtype(hf),
    )


def adapt(c: ModelConfig, names: Collection[str]) -> ModelConfig:
    """See `core.models.base`."""
    return c


def ignored(c: ModelConfig, name: str) -> bool:
    """Rotary tables that old checkpoints hold, and a head's own copy of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (c.tied_head and name == "lm_head.weight")


def attention_params(c: ModelConfig, layer: str, *, zero_centred: bool = False) -> Attention:
    """Grouped-query attention below `layer`, with q | k | v stacked."""
    a, H, D = f"{layer}.self_attn", c.head_size, c.hidden_size
    q, kv = c.num_heads * H, c.num_kv_heads * H
    sizes = (("q_proj", q, "heads"), ("k_proj", kv, "kv_heads"), ("v_proj", kv, "kv_heads"))
    qk = {
        n: norm_param(f"{a}.{n}.weight", H, zero_centred=zero_centred, axis="head") if c.qk_norm else None
        for n in ("q_norm", "k_norm")
    }
    return Attention(
        norm=norm_param(f"{layer}.input_layernorm.weight", D, zero_centred=zero_centred),
        qkv=linear_param(*(weight(f"{a}.{n}", size, axis, D, "embed", unit=H) for n, size, axis in sizes)),
        qkv_bias=bias_param(*((f"{a}.{n}", s, axis, H) for n, s, axis in sizes)) if c.qkv_bias else None,
        o=linear_param(weight(f"{a}.o_proj", D, "embed", q, "heads", into_unit=H)),
        o_bias=bias_param((f"{a}.o_proj", D, "embed", 1)) if c.output_bias else None,
        q_norm=qk["q_norm"],
        k_norm=qk["k_norm"],
    )


def mlp_params(c: ModelConfig, layer: str, *, block: str = "mlp", zero_centred: bool = False) -> Mlp:
    """A gated MLP below `layer`.`block`, with gate | up stacked."""
    m, D, F = f"{layer}.{block}", c.hidden_size, c.mlp_size
    return Mlp(
        norm=norm_param(f"{layer}.post_attention_layernorm.weight", D, zero_centred=zero_centred),
        gate_up=linear_param(
            weight(f"{m}.gate_proj", F, "mlp", D, "embed"), weight(f"{m}.up_proj", F, "mlp", D, "embed")
        ),
        down=linear_param(weight(f"{m}.down_proj", D, "embed", F, "mlp")),
        gate_up_bias=bias_param((f"{m}.gate_proj", F, "mlp", 1), (f"{m}.up_proj", F, "mlp", 1))
        if c.mlp_bias
        else None,
        down_bias=bias_param((f"{m}.down_proj", D, "embed", 1)) if c.mlp_bias else None,
    )


def embedding(c: ModelConfig) -> Param:
    """The embedding table, which a tied head multiplies by too."""
    part = Part(f"{c.prefix}embed_tokens.weight", (c.vocab_size, c.hidden_size), ("vocab", "embed"))
    return Param((part,), ("embed", "linear") if c.tied_head else ("embed",))


def head_param(c: ModelConfig) -> Param:
    """The head's matrix: the embedding where tied."""
    if c.tied_head:
        return embedding(c)
    return linear_param(weight("lm_head", c.vocab_size, "vocab", c.hidden_size, "embed"))


def params(c: ModelConfig) -> Weights:
    """See `core.models.base`."""
    names = [f"{c.prefix}layers.{i}" for i in range(c.num_layers)]
    return Weights(
        embed=embedding(c),
        rope=Constant("rope", c.rope),
        layers=tuple(Layer(attention_params(c, n), mlp_params(c, n)) for n in names),
        norm=norm_param(f"{c.prefix}norm.weight", c.hidden_size),
        head=head_param(c),
    )


def cache_layers(c: ModelConfig, dtype: str) -> tuple[CacheLayerSpec, ...]:
    """See `core.models.base`."""
    return tuple(paged_layer(c, dtype, window_of(c, i)) for i in range(c.num_layers))


def window_of(c: ModelConfig, layer: int) -> int | None:
    """Tokens that a layer's queries see; None = all."""
    return c.windows[layer] if c.windows else None


def paged_layer(c: ModelConfig, dtype: str, window: int | None = None) -> CacheLayerSpec:
    """The cache of one attention layer."""
    return CacheLayerSpec(
        kind="paged" if window is None else "window",
        window=window,
        dtype=dtype,
        num_kv_heads=c.num_kv_heads,
        head_size=c.head_size,
        v_head_size=c.head_size,
    )


def attention_spec(c: ModelConfig, window: int | None = None) -> AttentionSpec:
    """Causal attention over this config's local heads."""
    return AttentionSpec(
        window=window,
        scale=c.head_size**-0.5 if c.attention_scale is None else c.attention_scale,
        soft_cap=c.attention_soft_cap,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_size=c.head_size,
        v_head_size=c.head_size,
    )


def attention_specs(c: ModelConfig) -> tuple[AttentionSpec, ...]:
    """See `core.models.base`."""
    return tuple(attention_spec(c, window) for window in dict.fromkeys(c.windows or (None,)))


def rope_of(c: ModelConfig, table: Packed) -> Rope:
    """The rotary table with its static description."""
    return Rope(table, RopeSpec(rotary_size=c.rope.rotary_size, interleaved=c.rope.interleaved))


def attend(
    ops: Ops,
    c: ModelConfig,
    w: Attention,
    rope: Rope,
    h: Array,
    cache: CacheHandle,
    step: Step,
    window: int | None = None,
) -> tuple[Array, CacheHandle]:
    """h + attention(h): [T, D]."""
    out, cache = heads(ops, c, w, rope, h, cache, step, window)
    return ops.linear_add(out, w.o, h, w.o_bias), cache


def heads(
    ops: Ops,
    c: ModelConfig,
    w: Attention,
    rope: Rope,
    h: Array,
    cache: CacheHandle,
    step: Step,
    window: int | None = None,
) -> tuple[Array, CacheHandle]:
    """What all heads give, before the output projection: [T, N * H]."""
    N, K, H = c.num_heads, c.num_kv_heads, c.head_size
    qkv = ops.norm_linear(h, w.norm, w.qkv, c.norm_eps, w.qkv_bias)
    q = qkv[:, : N * H].reshape(-1, N, H)  # [T, N, H]
    k = qkv[:, N * H : (N + K) * H].reshape(-1, K, H)  # [T, K, H]
    v = qkv[:, (N + K) * H :].reshape(-1, K, H)
    spec = replace(attention_spec(c, window), sinks=w.sinks is not None)
    out, cache = ops.norm_rope_attend(
        q, k, v, w.q_norm, w.k_norm, c.norm_eps, rope, cache, step, spec, w.sinks
    )
    return out.reshape(-1, N * H), cache


def mlp(ops: Ops, c: ModelConfig, w: Mlp, h: Array) -> Array:
    """h + mlp(h): [T, D]."""
    if w.gate_up_bias is None:
        x = ops.norm_linear_glu(h, w.norm, w.gate_up, c.norm_eps, c.activation)  # [T, F]
    else:
        x = ops.glu(ops.norm_linear(h, w.norm, w.gate_up, c.norm_eps, w.gate_up_bias), c.activation)
    return ops.linear_add(x, w.down, h, w.down_bias)


def forward(
    ops: Ops, c: ModelConfig, w: Weights, caches: tuple[CacheHandle, ...], step: Step
) -> tuple[Array, tuple[CacheHandle, ...]]:
    """See `core.models.base`."""
    cache = list(caches)
    rope = rope_of(c, w.rope)
    h = ops.embed_step(w.embed, step)
    for i, layer in enumerate(w.layers):
        h, cache[i] = attend(ops, c, layer.attention, rope, h, cache[i], step, window_of(c, i))
        h = mlp(ops, c, layer.mlp, h)
    return h, tuple(cache)


def head(ops: Ops, c: ModelConfig, w: Weights, h: Array, step: Step) -> Array:
    """See `core.models.base`."""
    return ops.head_logits(h, w.norm, w.head, step, c.norm_eps, c.logit_soft_cap)
