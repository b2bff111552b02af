"""Qwen3.5, text: gated delta net layers with a gated full-attention layer in every few; dense or with
experts.

Norms are stored around zero but for the one behind the scan. All inputs of a delta-net layer come from one
product, stacked q | k | v | z | b | a; of those q, k, v pass the convolution. A full-attention layer's q_proj
holds q and a gate head by head; the gate multiplies attention's output after a sigmoid.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from core.contract.batch import Step
from core.contract.errors import ConfigError
from core.contract.ops import Ops
from core.contract.opspecs import ConvSpec, Rope, RouteSpec, ScanSpec
from core.contract.types import Array, CacheHandle, CacheLayerSpec, Param, Part, StatePart
from core.models import llama
from core.models.base import Constant, linear_param, norm_param, weight
from core.models.config import LayerKind, LinearConfig, ModelConfig, MoeConfig, eos_ids, require, rope_config
from core.models.moe import Moe, adapt_experts, moe_params
from core.models.qwen3_moe import second_half

ARCHITECTURES = (
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
)

head = llama.head

_L2_EPS = 1e-6


@dataclass(frozen=True)
class DeltaNet:
    """Weights of a gated delta net layer."""

    norm: Any
    inputs: Any
    conv: Any
    a_log: Any
    dt_bias: Any
    out_norm: Any
    out: Any


@dataclass(frozen=True)
class GatedAttention:
    """Weights of a gated full-attention layer; `qkvg` gives q | k | v | gate."""

    norm: Any
    qkvg: Any
    o: Any
    q_norm: Any
    k_norm: Any


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    mixer: DeltaNet | GatedAttention
    mlp: llama.Mlp | Moe


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """See `core.models.base`."""
    text = dict(hf.get("text_config") or hf)
    # What the whole checkpoint says of itself wins over what its text part says.
    for name in ("architectures", "tie_word_embeddings", "dtype", "torch_dtype"):
        if hf.get(name) is not None:
            text[name] = hf[name]
    require(text, "linear_num_key_heads", "linear_num_value_heads", "linear_conv_kernel_dim", "head_dim")
    if text.get("attention_bias"):
        raise ConfigError("attention_bias is set, but Qwen3.5 is known here without biases only")
    is_moe = "Moe" in text["architectures"][0]
    if is_moe:
        text.setdefault("intermediate_size", text.get("moe_intermediate_size"))
    c = llama.config(text)
    linear = LinearConfig(
        num_k_heads=int(text["linear_num_key_heads"]),
        num_v_heads=int(text["linear_num_value_heads"]),
        k_size=int(text["linear_key_head_dim"]),
        v_size=int(text["linear_value_head_dim"]),
        conv_width=int(text["linear_conv_kernel_dim"]),
    )
    return replace(
        c,
        family="qwen3_5",
        layer_kinds=_layer_kinds(text, c.num_layers),
        windows=(),
        rope=rope_config(text, _rotary_size(text, c.head_size)),
        qk_norm=True,
        attention_gate=True,
        linear=linear,
        moe=_moe(text, c.num_layers) if is_moe else None,
        eos_token_ids=c.eos_token_ids or eos_ids(hf),
    )


def _rotary_size(text: Mapping[str, Any], head_size: int) -> int:
    found = text.get("rope_scaling") or text.get("rope_parameters") or {}
    return int(
        head_size * float(found.get("partial_rotary_factor") or text.get("partial_rotary_factor") or 0.25)
    )


def _layer_kinds(text: Mapping[str, Any], num_layers: int) -> tuple[LayerKind, ...]:
    names = text.get("layer_types")
    if names is None:
        every = int(text.get("full_attention_interval") or 4)
        return tuple("attention" if (i + 1) % every == 0 else "state" for i in range(num_layers))
    known: dict[str, LayerKind] = {"full_attention": "attention", "linear_attention": "state"}
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ConfigError(f"layer type {unknown[0]!r} is not known; known are {', '.join(known)}")
    return tuple(known[n] for n in names[:num_layers])


def _moe(text: Mapping[str, Any], num_layers: int) -> MoeConfig:
    require(text, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    route = RouteSpec(num_experts=int(text["num_experts"]), top_k=int(text["num_experts_per_tok"]))
    shared = int(text.get("shared_expert_intermediate_size") or 0)
    return MoeConfig(
        route=route,
        layers=tuple(range(num_layers)),
        mlp_size=int(text["moe_intermediate_size"]),
        shared_mlp_size=shared,
        shared_gate=shared > 0,
    )


def adapt(c: ModelConfig, names: Collection[str]) -> ModelConfig:
    """See `core.models.base`: the prefix of the text model, and how experts are stored."""
    nested = any(n.startswith("model.language_model.") for n in names)
    return adapt_experts(replace(c, prefix="model.language_model." if nested else "model."), names)


def ignored(c: ModelConfig, name: str) -> bool:
    """The vision tower and the multi-token prediction layers, and a tied head's own copy."""
    return name.startswith(("model.visual.", "mtp.")) or llama.ignored(c, name)


def linear_of(c: ModelConfig) -> LinearConfig:
    """The config's delta-net sizes.

    Raises:
        ConfigError: it has none.
    """
    if c.linear is None:
        raise ConfigError(f"{c.architecture} needs linear-attention sizes, but its config has none")
    return c.linear


def params(c: ModelConfig) -> llama.Weights:
    """See `core.models.base`."""
    layers = []
    for i, kind in enumerate(c.layer_kinds):
        name = f"{c.prefix}layers.{i}"
        mixer = _attention_params(c, name) if kind == "attention" else _delta_net_params(c, name)
        second = (
            moe_params(c, name, zero_centred=True) if c.moe else llama.mlp_params(c, name, zero_centred=True)
        )
        layers.append(Layer(mixer, second))
    return llama.Weights(
        embed=llama.embedding(c),
        rope=Constant("rope", c.rope),
        layers=tuple(layers),
        norm=norm_param(f"{c.prefix}norm.weight", c.hidden_size, zero_centred=True),
        head=llama.head_param(c),
    )


def _attention_params(c: ModelConfig, layer: str) -> GatedAttention:
    a, N, K, H, D = f"{layer}.self_attn", c.num_heads, c.num_kv_heads, c.head_size, c.hidden_size
    q, gate = (
        Part(f"{a}.q_proj.weight", (N * H, D), ("heads", "embed"), unit=(H, 1), pick=(2 * H, first, H))
        for first in (0, H)
    )
    k, v = (weight(f"{a}.{n}", K * H, "kv_heads", D, "embed", unit=H) for n in ("k_proj", "v_proj"))
    return GatedAttention(
        norm=norm_param(f"{layer}.input_layernorm.weight", D, zero_centred=True),
        qkvg=linear_param(q, k, v, gate),
        o=linear_param(weight(f"{a}.o_proj", D, "embed", N * H, "heads", into_unit=H)),
        q_norm=norm_param(f"{a}.q_norm.weight", H, zero_centred=True, axis="head"),
        k_norm=norm_param(f"{a}.k_norm.weight", H, zero_centred=True, axis="head"),
    )


def _delta_net_params(c: ModelConfig, layer: str) -> DeltaNet:
    n, D, s = f"{layer}.linear_attn", c.hidden_size, linear_of(c)
    k, v, V = s.num_k_heads * s.k_size, s.num_v_heads * s.v_size, s.num_v_heads
    stored = ((0, k, s.k_size), (k, k, s.k_size), (2 * k, v, s.v_size))
    qkv = tuple(
        Part(f"{n}.in_proj_qkv.weight", (size, D), ("heads", "embed"), start=(at, 0), unit=(unit, 1))
        for at, size, unit in stored
    )
    conv = tuple(
        Part(
            f"{n}.conv1d.weight",
            (size, 1, s.conv_width),
            ("heads", "", ""),
            start=(at, 0, 0),
            unit=(unit, 1, 1),
            transform="drop_axis_1",
        )
        for at, size, unit in stored
    )
    rest = ((f"{n}.in_proj_z", v, s.v_size), (f"{n}.in_proj_b", V, 1), (f"{n}.in_proj_a", V, 1))
    return DeltaNet(
        norm=norm_param(f"{layer}.input_layernorm.weight", D, zero_centred=True),
        inputs=linear_param(*qkv, *(weight(name, o, "heads", D, "embed", unit=u) for name, o, u in rest)),
        conv=Param(conv, ("conv",)),
        a_log=Param((Part(f"{n}.A_log", (V,), ("heads",)),), ("bias",)),
        dt_bias=Param((Part(f"{n}.dt_bias", (V,), ("heads",)),), ("bias",)),
        out_norm=norm_param(f"{n}.norm.weight", s.v_size, axis="head"),
        out=linear_param(weight(f"{n}.out_proj", D, "embed", v, "heads", into_unit=s.v_size)),
    )


attention_specs = llama.attention_specs


def cache_layers(c: ModelConfig, dtype: str) -> tuple[CacheLayerSpec, ...]:
    """See `core.models.base`."""
    s = linear_of(c)
    channels = 2 * s.num_k_heads * s.k_size + s.num_v_heads * s.v_size
    wide = "float64" if dtype == "float64" else "float32"
    state = CacheLayerSpec(
        kind="state",
        dtype=dtype,
        state=(
            StatePart(name="conv", shape=(channels, s.conv_width - 1), dtype=dtype),
            StatePart(name="scan", shape=(s.num_v_heads, s.k_size, s.v_size), dtype=wide),
        ),
    )
    return tuple(llama.paged_layer(c, dtype) if kind == "attention" else state for kind in c.layer_kinds)


def delta_net(
    ops: Ops, c: ModelConfig, w: DeltaNet, h: Array, cache: CacheHandle, step: Step
) -> tuple[Array, CacheHandle]:
    """h + delta_net(h): [T, D]."""
    s = linear_of(c)
    k, v, V = s.num_k_heads * s.k_size, s.num_v_heads * s.v_size, s.num_v_heads
    channels = 2 * k + v
    x = ops.norm_linear(h, w.norm, w.inputs, c.norm_eps)  # [T, q | k | v | z | b | a]
    conv = ConvSpec(channels=channels, width=s.conv_width, activation="silu")
    qkv, cache = ops.short_conv(x[:, :channels], w.conv, None, cache, step, conv)
    z, b, a = x[:, channels : channels + v], x[:, channels + v : channels + v + V], x[:, channels + v + V :]
    scan = ScanSpec(
        kind="gated_delta",
        num_k_heads=s.num_k_heads,
        num_v_heads=V,
        k_size=s.k_size,
        v_size=s.v_size,
        scale=s.k_size**-0.5,
        l2_norm_eps=_L2_EPS,
    )
    out, cache = ops.state_scan(
        qkv[:, :k].reshape(-1, s.num_k_heads, s.k_size),
        qkv[:, k : 2 * k].reshape(-1, s.num_k_heads, s.k_size),
        qkv[:, 2 * k :].reshape(-1, V, s.v_size),
        a,
        b,
        w.a_log,
        w.dt_bias,
        cache,
        step,
        scan,
    )  # [T, V, v_size]
    y = ops.norm_gate(out, w.out_norm, z.reshape(-1, V, s.v_size), c.norm_eps, "silu")
    return ops.linear_add(y.reshape(-1, v), w.out, h), cache


def gated_attention(
    ops: Ops, c: ModelConfig, w: GatedAttention, rope: Rope, h: Array, cache: CacheHandle, step: Step
) -> tuple[Array, CacheHandle]:
    """h + attention(h): [T, D]."""
    N, K, H = c.num_heads, c.num_kv_heads, c.head_size
    x = ops.norm_linear(h, w.norm, w.qkvg, c.norm_eps)  # [T, q | k | v | gate]
    q = x[:, : N * H].reshape(-1, N, H)
    k = x[:, N * H : (N + K) * H].reshape(-1, K, H)
    v = x[:, (N + K) * H : (N + 2 * K) * H].reshape(-1, K, H)
    out, cache = ops.norm_rope_attend(
        q, k, v, w.q_norm, w.k_norm, c.norm_eps, rope, cache, step, llama.attention_spec(c)
    )
    out = out.reshape(-1, N * H)
    if c.attention_gate:
        out = ops.gate(out, x[:, (N + 2 * K) * H :], "sigmoid")
    return ops.linear_add(out, w.o, h), cache


def forward(
    ops: Ops, c: ModelConfig, w: llama.Weights, caches: tuple[CacheHandle, ...], step: Step
) -> tuple[Array, tuple[CacheHandle, ...]]:
    """See `core.models.base`."""
    cache = list(caches)
    rope = llama.rope_of(c, w.rope)
    h = ops.embed_step(w.embed, step)
    for i, layer in enumerate(w.layers):
        if isinstance(layer.mixer, DeltaNet):
            h, cache[i] = delta_net(ops, c, layer.mixer, h, cache[i], step)
        else:
            h, cache[i] = gated_attention(ops, c, layer.mixer, rope, h, cache[i], step)
        h = second_half(ops, c, layer.mlp, h)
    return h, tuple(cache)
