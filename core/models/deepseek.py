"""DeepSeek-V2 and V3: multi-head latent attention, grouped routing with shared experts.

The cache holds one latent vector and one rotated key part per token, shared by all heads; each head's keys
and values are products of the latent (kv_b_proj, whose rows interleave them head by head). Latent norms have
an eps of their own. V2 scores experts by a softmax and groups by their best; V3 by a sigmoid, with a
selection bias, and groups by their best two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from core.contract.batch import Step
from core.contract.errors import ConfigError
from core.contract.ops import Ops
from core.contract.opspecs import LatentSpec, Rope, RouteSpec
from core.contract.types import Array, CacheHandle, CacheLayerSpec, Part
from core.models import llama
from core.models.base import Constant, linear_param, norm_param, weight
from core.models.config import (
    LatentConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    require,
    rope_config,
    yarn_mscale,
)
from core.models.moe import Moe, MoeNames, adapt_experts, moe_params
from core.models.qwen3_moe import second_half

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")

head = llama.head
adapt = adapt_experts

_LATENT_EPS = 1e-6
_NAMES = MoeNames(shared="shared_experts")
_ROUTE_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


@dataclass(frozen=True)
class Attention:
    """Latent attention's weights. `inputs` gives (q or its latent) | latent | k_rope; `q_b` expands q's
    latent.
    """

    norm: Any
    inputs: Any
    kv_norm: Any
    w_k: Any
    w_v: Any
    o: Any
    q_norm: Any = None
    q_b: Any = None


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    attention: Attention
    mlp: llama.Mlp | Moe


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """See `core.models.base`."""
    require(hf, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if hf.get("attention_bias"):
        raise ConfigError("attention_bias is set, but DeepSeek is known here without biases only")
    nope, rotary = int(hf["qk_nope_head_dim"]), int(hf["qk_rope_head_dim"])
    is_v3 = hf["architectures"][0] == "DeepseekV3ForCausalLM"
    c = llama.config({**hf, "head_dim": nope + rotary})
    interleaved = not is_v3 or bool(hf.get("rope_interleave", True))
    rope = rope_config(hf, rotary, interleaved=interleaved)
    latent = LatentConfig(
        q_rank=int(hf.get("q_lora_rank") or 0),
        kv_rank=int(hf["kv_lora_rank"]),
        nope_size=nope,
        rope_size=rotary,
        v_head_size=int(hf["v_head_dim"]),
        scale=(nope + rotary) ** -0.5 * _softmax_scale(hf, rope),
    )
    return replace(
        c,
        family="deepseek",
        num_kv_heads=c.num_heads,
        rope=rope,
        qk_norm=False,
        latent=latent,
        moe=_moe(hf, c.num_layers, is_v3=is_v3),
    )


def _softmax_scale(hf: Mapping[str, Any], rope: RopeConfig) -> float:
    found = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    all_dim = float(found.get("mscale_all_dim") or 0.0)
    return 1.0 if rope.scaling == "none" else yarn_mscale(rope.factor, all_dim) ** 2


def _moe(hf: Mapping[str, Any], num_layers: int, *, is_v3: bool) -> MoeConfig | None:
    if not hf.get("n_routed_experts"):
        return None
    require(hf, "num_experts_per_tok", "moe_intermediate_size")
    if is_v3:
        require(hf, "n_group", "topk_group", "routed_scaling_factor")
    method = "noaux_tc" if is_v3 else str(hf.get("topk_method") or "greedy")
    if method not in _ROUTE_METHODS:
        raise ConfigError(f"topk_method {method!r} is not known; known are {', '.join(_ROUTE_METHODS)}")
    grouped = method != "greedy"
    route = RouteSpec(
        num_experts=int(hf["n_routed_experts"]),
        top_k=int(hf["num_experts_per_tok"]),
        scoring="sigmoid" if is_v3 else "softmax",
        normalize=is_v3 and bool(hf.get("norm_topk_prob", True)),
        scale=float(hf.get("routed_scaling_factor") or 1.0),
        num_groups=int(hf.get("n_group") or 1) if grouped else 1,
        top_groups=int(hf.get("topk_group") or 1) if grouped else 1,
        group_score="top2_sum" if is_v3 else "max",
    )
    size = int(hf["moe_intermediate_size"])
    return MoeConfig(
        route=route,
        layers=tuple(range(int(hf.get("first_k_dense_replace") or 0), num_layers)),
        mlp_size=size,
        shared_mlp_size=size * int(hf.get("n_shared_experts") or 0),
        route_bias=is_v3,
    )


def ignored(c: ModelConfig, name: str) -> bool:
    """The multi-token prediction layers, which follow the last one, and what llama ignores."""
    index = name.removeprefix(f"{c.prefix}layers.").split(".")[0]
    return (index.isdigit() and int(index) >= c.num_layers) or llama.ignored(c, name)


def attention_specs(c: ModelConfig) -> tuple[LatentSpec, ...]:
    """See `core.models.base`."""
    s = latent_of(c)
    return (
        LatentSpec(
            scale=s.scale,
            num_heads=c.num_heads,
            nope_size=s.nope_size,
            rope_size=s.rope_size,
            v_head_size=s.v_head_size,
            latent_size=s.kv_rank,
        ),
    )


def latent_of(c: ModelConfig) -> LatentConfig:
    """The config's latent attention.

    Raises:
        ConfigError: it has none.
    """
    if c.latent is None:
        raise ConfigError(f"{c.architecture} needs latent attention sizes, but its config has none")
    return c.latent


def params(c: ModelConfig) -> llama.Weights:
    """See `core.models.base`."""
    names = [f"{c.prefix}layers.{i}" for i in range(c.num_layers)]
    experts = c.moe.layers if c.moe else ()
    return llama.Weights(
        embed=llama.embedding(c),
        rope=Constant("rope", c.rope),
        layers=tuple(
            Layer(
                _attention_params(c, n),
                moe_params(c, n, names=_NAMES) if i in experts else llama.mlp_params(c, n),
            )
            for i, n in enumerate(names)
        ),
        norm=norm_param(f"{c.prefix}norm.weight", c.hidden_size),
        head=llama.head_param(c),
    )


def _attention_params(c: ModelConfig, layer: str) -> Attention:
    a, s, N, D = f"{layer}.self_attn", latent_of(c), c.num_heads, c.hidden_size
    q_size, kv_size = s.nope_size + s.rope_size, s.nope_size + s.v_head_size
    kv_a = weight(f"{a}.kv_a_proj_with_mqa", s.kv_rank + s.rope_size, "", D, "embed")
    if s.q_rank:
        q_a = weight(f"{a}.q_a_proj", s.q_rank, "", D, "embed")
        q_norm = norm_param(f"{a}.q_a_layernorm.weight", s.q_rank, axis="")
        q_b = linear_param(weight(f"{a}.q_b_proj", N * q_size, "heads", s.q_rank, "", unit=q_size))
    else:
        q_a, q_norm, q_b = weight(f"{a}.q_proj", N * q_size, "heads", D, "embed", unit=q_size), None, None
    w_k, w_v = (
        Part(
            f"{a}.kv_b_proj.weight",
            (N * size, s.kv_rank),
            ("heads", ""),
            unit=(size, 1),
            pick=(kv_size, first, size),
        )
        for first, size in ((0, s.nope_size), (s.nope_size, s.v_head_size))
    )
    return Attention(
        norm=norm_param(f"{layer}.input_layernorm.weight", D),
        inputs=linear_param(q_a, kv_a),
        kv_norm=norm_param(f"{a}.kv_a_layernorm.weight", s.kv_rank, axis=""),
        w_k=linear_param(w_k),
        w_v=linear_param(w_v),
        o=linear_param(
            weight(f"{a}.o_proj", D, "embed", N * s.v_head_size, "heads", into_unit=s.v_head_size)
        ),
        q_norm=q_norm,
        q_b=q_b,
    )


def cache_layers(c: ModelConfig, dtype: str) -> tuple[CacheLayerSpec, ...]:
    """See `core.models.base`."""
    s = latent_of(c)
    layer = CacheLayerSpec(kind="latent", dtype=dtype, latent_size=s.kv_rank, rope_size=s.rope_size)
    return (layer,) * c.num_layers


def attend(
    ops: Ops, c: ModelConfig, w: Attention, rope: Rope, h: Array, cache: CacheHandle, step: Step
) -> tuple[Array, CacheHandle]:
    """h + attention(h): [T, D]."""
    s, N = latent_of(c), c.num_heads
    q_size = s.nope_size + s.rope_size
    x = ops.norm_linear(h, w.norm, w.inputs, c.norm_eps)  # [T, (q or its latent) | latent | k_rope]
    split = s.q_rank or N * q_size
    q, kv = x[:, :split], x[:, split:]
    if w.q_b is not None:
        q = ops.linear(ops.norm(q, w.q_norm, _LATENT_EPS), w.q_b)
    (spec,) = attention_specs(c)
    q = q.reshape(-1, N, q_size)
    out, cache = ops.norm_rope_attend_latent(
        q, kv, w.kv_norm, _LATENT_EPS, rope, w.w_k, w.w_v, cache, step, spec
    )  # [T, N, v_head_size]
    return ops.linear_add(out.reshape(-1, N * s.v_head_size), w.o, h), cache


def forward(
    ops: Ops, c: ModelConfig, w: llama.Weights, caches: tuple[CacheHandle, ...], step: Step
) -> tuple[Array, tuple[CacheHandle, ...]]:
    """See `core.models.base`."""
    cache = list(caches)
    rope = llama.rope_of(c, w.rope)
    h = ops.embed_step(w.embed, step)
    for i, layer in enumerate(w.layers):
        h, cache[i] = attend(ops, c, layer.attention, rope, h, cache[i], step)
        h = second_half(ops, c, layer.mlp, h)
    return h, tuple(cache)
