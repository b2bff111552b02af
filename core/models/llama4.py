"""Llama 4, its text model: layers that attend within chunks and rotate, and layers that do neither.

In a rotated layer q and k are normed after the rotation, without a weight (`use_qk_norm`). In the others,
which see everything, queries grow with their position (`attn_temperature_tuning`). Some layers, or all, have
routed experts, whose input is multiplied by the sigmoid of the router's logit, beside a shared one of the
same width; the others a wider MLP.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from core.contract.batch import Step
from core.contract.errors import ConfigError
from core.contract.ops import Ops
from core.contract.opspecs import AttentionSpec, ExpertWeights, QScale, Rope, RouteSpec
from core.contract.types import Array, CacheHandle, CacheLayerSpec, Param, Part
from core.models import llama
from core.models.base import Constant, linear_param, norm_param, weight
from core.models.config import ChunkConfig, ModelConfig, MoeConfig, eos_ids, require, rope_config
from core.models.moe import MoeNames, moe_of, moe_params
from core.models.qwen3_moe import Layer, second_half

ARCHITECTURES = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")

head = llama.head

_NAMES = MoeNames(block="feed_forward", router="router")


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """See `core.models.base`."""
    text = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, **(hf.get("text_config") or hf)}
    # What the whole checkpoint says of itself wins over what its text part says.
    for name in ("architectures", "tie_word_embeddings", "dtype", "torch_dtype"):
        if hf.get(name) is not None:
            text[name] = hf[name]
    require(text, "num_local_experts", "num_experts_per_tok", "intermediate_size", "intermediate_size_mlp")
    c = llama.config(text)
    size = c.mlp_size
    return replace(
        c,
        family="llama4",
        mlp_size=int(text["intermediate_size_mlp"]),
        windows=(),
        rope=rope_config(text, c.head_size, interleaved=True),
        moe=MoeConfig(
            route=RouteSpec(
                num_experts=int(text["num_local_experts"]),
                top_k=int(text["num_experts_per_tok"]),
                scoring="sigmoid",
                normalize=False,
            ),
            layers=_moe_layers(text, c.num_layers),
            mlp_size=size,
            shared_mlp_size=size,
            weights_on_input=True,
            fused=True,
        ),
        chunks=_chunks(text, c.num_layers),
        eos_token_ids=c.eos_token_ids or eos_ids(hf),
    )


def _moe_layers(text: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    if text.get("moe_layers") is not None:
        return tuple(int(i) for i in text["moe_layers"])
    every = int(text.get("interleave_moe_layer_step") or 1)
    return tuple(range(every - 1, num_layers, every))


def _chunks(text: Mapping[str, Any], num_layers: int) -> ChunkConfig:
    every = int(text.get("no_rope_layer_interval") or 4)
    # The key's name says the opposite of what its ones mean: layers that are rotated.
    rotated = [bool(r) for r in text.get("no_rope_layers") or ((i + 1) % every for i in range(num_layers))]
    kinds = text.get("layer_types") or ["chunked_attention" if r else "full_attention" for r in rotated]
    known = ("chunked_attention", "full_attention")
    for name, found in (("no_rope_layers", rotated), ("layer_types", kinds)):
        if len(found) < num_layers:
            raise ConfigError(f"{name} has {len(found)} entries, but the model has {num_layers} layers")
    unknown = [k for k in kinds if k not in known]
    if unknown:
        raise ConfigError(f"layer type {unknown[0]!r} is not known; known are {', '.join(known)}")
    if "chunked_attention" in kinds[:num_layers]:
        require(text, "attention_chunk_size")
    sizes = tuple(
        int(text["attention_chunk_size"]) if k == "chunked_attention" else None for k in kinds[:num_layers]
    )
    grows = bool(text.get("attn_temperature_tuning", True))
    return ChunkConfig(
        sizes=sizes,
        rotated=tuple(rotated[:num_layers]),
        qk_norm=bool(text.get("use_qk_norm", True)),
        q_scale=QScale(factor=float(text.get("attn_scale", 0.1)), floor=int(text.get("floor_scale", 8192)))
        if grows
        else None,
    )


def adapt(c: ModelConfig, names: Collection[str]) -> ModelConfig:
    """See `core.models.base`: the prefix of the text model."""
    nested = any(n.startswith("language_model.") for n in names)
    return replace(c, prefix="language_model.model." if nested else "model.")


def ignored(c: ModelConfig, name: str) -> bool:
    """The vision tower and what joins it to the text, and a tied head's own copy."""
    return name.startswith(("vision_model.", "multi_modal_projector.")) or llama.ignored(
        c, name.removeprefix("language_model.")
    )


def chunks_of(c: ModelConfig) -> ChunkConfig:
    """The config's kinds of layers.

    Raises:
        ConfigError: it has none.
    """
    if c.chunks is None:
        raise ConfigError(f"{c.architecture} needs kinds of layers, but its config has none")
    return c.chunks


def params(c: ModelConfig) -> llama.Weights:
    """See `core.models.base`."""
    names = [f"{c.prefix}layers.{i}" for i in range(c.num_layers)]
    experts = moe_of(c).layers
    head_name = f"{c.prefix.removesuffix('model.')}lm_head"
    return llama.Weights(
        embed=llama.embedding(c),
        rope=Constant("rope", c.rope),
        layers=tuple(
            Layer(
                llama.attention_params(c, n),
                moe_params(c, n, names=_NAMES, experts=_experts(c, f"{n}.feed_forward.experts"))
                if i in experts
                else llama.mlp_params(c, n, block="feed_forward"),
            )
            for i, n in enumerate(names)
        ),
        norm=norm_param(f"{c.prefix}norm.weight", c.hidden_size),
        head=llama.embedding(c)
        if c.tied_head
        else linear_param(weight(head_name, c.vocab_size, "vocab", c.hidden_size, "embed")),
    )


def _experts(c: ModelConfig, name: str) -> ExpertWeights:
    """Stored [E, D, 2F], gate before up, and [E, F, D]."""
    E, D, F = moe_of(c).route.num_experts, c.hidden_size, moe_of(c).mlp_size
    gate_up = tuple(
        Part(
            f"{name}.gate_up_proj",
            (E, D, F),
            ("expert", "embed", "mlp"),
            start=(0, 0, at),
            transform="transpose",
        )
        for at in (0, F)
    )
    down = Part(f"{name}.down_proj", (E, F, D), ("expert", "mlp", "embed"), transform="transpose")
    return ExpertWeights(Param(gate_up, ("experts",), join=1), Param((down,), ("experts",)))


def cache_layers(c: ModelConfig, dtype: str) -> tuple[CacheLayerSpec, ...]:
    """See `core.models.base`. A window as wide as a chunk holds all that the chunk's queries may see."""
    return tuple(llama.paged_layer(c, dtype, size) for size in chunks_of(c).sizes)


def attention_specs(c: ModelConfig) -> tuple[AttentionSpec, ...]:
    """See `core.models.base`."""
    return tuple(dict.fromkeys(_attention_spec(c, i) for i in range(c.num_layers)))


def _attention_spec(c: ModelConfig, layer: int) -> AttentionSpec:
    kinds = chunks_of(c)
    q_scale = None if kinds.rotated[layer] else kinds.q_scale
    return replace(llama.attention_spec(c), chunk=kinds.sizes[layer], q_scale=q_scale)


def attend(
    ops: Ops,
    c: ModelConfig,
    w: llama.Attention,
    rope: Rope,
    h: Array,
    cache: CacheHandle,
    step: Step,
    layer: int,
) -> tuple[Array, CacheHandle]:
    """h + attention(h): [T, D]."""
    N, K, H, kinds = c.num_heads, c.num_kv_heads, c.head_size, chunks_of(c)
    qkv = ops.norm_linear(h, w.norm, w.qkv, c.norm_eps, w.qkv_bias)
    q = qkv[:, : N * H].reshape(-1, N, H)  # [T, N, H]
    k = qkv[:, N * H : (N + K) * H].reshape(-1, K, H)  # [T, K, H]
    v = qkv[:, (N + K) * H :].reshape(-1, K, H)
    rotated = kinds.rotated[layer]
    spec = _attention_spec(c, layer)
    if rotated and kinds.qk_norm:
        q, k = (ops.norm(ops.rope(x, rope, step), None, c.norm_eps) for x in (q, k))
        out, _, cache = ops.attend(q, k, v, cache, step, spec)
    else:
        out, cache = ops.norm_rope_attend(
            q, k, v, None, None, c.norm_eps, rope if rotated else None, cache, step, spec
        )
    return ops.linear_add(out.reshape(-1, N * H), w.o, h, w.o_bias), cache


def forward(
    ops: Ops, c: ModelConfig, w: llama.Weights, caches: tuple[CacheHandle, ...], step: Step
) -> tuple[Array, tuple[CacheHandle, ...]]:
    """See `core.models.base`."""
    cache = list(caches)
    rope = llama.rope_of(c, w.rope)
    h = ops.embed_step(w.embed, step)
    for i, layer in enumerate(w.layers):
        h, cache[i] = attend(ops, c, layer.attention, rope, h, cache[i], step, i)
        h = second_half(ops, c, layer.mlp, h)
    return h, tuple(cache)
