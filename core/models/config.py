"""ModelConfig: what a model is, in one frozen record that every family fills from its checkpoint's
configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import Any, Literal

from core.contract.errors import ConfigError, UnsupportedError
from core.contract.opspecs import Activation, QScale, RouteSpec

LayerKind = Literal["attention", "state"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base, size, pair order and long-context scaling.

    Attributes:
        theta: base of the frequencies. rotary_size: elements of a head that are rotated.
        interleaved: pairs (2i, 2i + 1) in place of (i, i + rotary_size / 2).
        scaling: "none"; "linear" (Chen et al., 2023); "dynamic" (NTK-aware, by the longest sequence);
            "llama3" (Llama 3.1's smooth cut); "yarn" (Peng et al., 2023); "longrope" (Ding et al., 2024).
        factor: how many times longer than `original_length` sequences may be.
        low, high: llama3: wave counts between which frequencies are blended; yarn: beta_slow and beta_fast.
        short_factors, long_factors: longrope: divisors of frequencies, up to `original_length` and beyond.
        attention_factor: multiplies the table's cosines and sines (yarn, longrope).
    """

    theta: float
    rotary_size: int
    interleaved: bool = False
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    original_length: int = 0
    low: float = 1.0
    high: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Routed experts: routing, sizes, and which layers have them.

    Attributes:
        layers: indices of the layers with routed experts; the others are dense.
        mlp_size: width of one expert. shared_mlp_size: width of the shared expert (0 = none).
        shared_gate: the shared expert's output is multiplied by sigmoid of a learned product.
        router_bias: the router's product has a bias. route_bias: the selection alone has one.
        weights_on_input: routing weights multiply an expert's input in place of its output.
        limit: clamp of the activation "swigluoai".
        fused: the checkpoint stores all experts of a layer in one tensor, [E, 2F, D] and [E, D, F].
    """

    route: RouteSpec
    layers: tuple[int, ...]
    mlp_size: int
    shared_mlp_size: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    route_bias: bool = False
    weights_on_input: bool = False
    limit: float | None = None
    fused: bool = False


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention: sizes of the latent vectors and of the heads' parts; q_rank 0 = full-rank
    queries.
    """

    q_rank: int
    kv_rank: int
    nope_size: int
    rope_size: int
    v_head_size: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Gated delta net layers: heads, sizes and the width of the short convolution."""

    num_k_heads: int
    num_v_heads: int
    k_size: int
    v_size: int
    conv_width: int


@dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """Layers that attend within chunks, and layers that are not rotated (Llama 4).

    Attributes:
        sizes: tokens of a chunk, one per layer; None = the layer's queries see everything.
        rotated: one per layer. qk_norm: q and k of rotated layers are normed, without a weight, after it.
        q_scale: growth of the queries of layers that are not rotated.
    """

    sizes: tuple[int | None, ...]
    rotated: tuple[bool, ...]
    qk_norm: bool
    q_scale: QScale | None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model's shape and choices. Global as the checkpoint has it, or local to a rank after `local`.

    Attributes:
        layer_kinds: one per layer. windows: tokens that each layer's queries see, None = all; () = all
            everywhere.
        local_rope: rotation of layers that have a window; None = that of all layers.
        attention_scale: factor on q . k; None = head_size ** -0.5.
        attention_soft_cap, logit_soft_cap: caps by tanh of scores and logits; None = none.
        embed_scale: factor on embeddings.
        prefix: what tensor names in the checkpoint begin with.
        attention_gate: q_proj also gives a gate, by which attention's output is multiplied after a sigmoid.
        world_size: ranks that share each layer; sizes above are divided by it in a local config.
        dtype: of the checkpoint. compute_dtype: of activations, known when the model is loaded.
    """

    architecture: str
    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_size: int
    norm_eps: float
    max_position: int
    rope: RopeConfig
    layer_kinds: tuple[LayerKind, ...]
    windows: tuple[int | None, ...] = ()
    local_rope: RopeConfig | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embed_scale: float = 1.0
    activation: Activation = "silu"
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_gate: bool = False
    moe: MoeConfig | None = None
    latent: LatentConfig | None = None
    linear: LinearConfig | None = None
    chunks: ChunkConfig | None = None
    prefix: str = "model."
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    compute_dtype: str = "float32"
    world_size: int = 1

    def local(self, world_size: int) -> ModelConfig:
        """What one of `world_size` tensor-parallel ranks sees: its heads and its share of MLP widths.

        KV heads fewer than ranks are replicated.

        Raises:
            UnsupportedError: a count does not divide; names it, and the world sizes that do.
        """
        if world_size == 1:
            return self
        counts = {"attention heads": self.num_heads, "MLP width": self.mlp_size}
        if self.num_kv_heads >= world_size or world_size % self.num_kv_heads:
            counts["KV heads"] = self.num_kv_heads
        if self.moe is not None:
            counts["expert width"] = self.moe.mlp_size
            if self.moe.shared_mlp_size:
                counts["shared expert width"] = self.moe.shared_mlp_size
        if self.linear is not None:
            counts["linear-attention key heads"] = self.linear.num_k_heads
            counts["linear-attention value heads"] = self.linear.num_v_heads
        wrong = [f"{n} {name}" for name, n in counts.items() if n % world_size]
        if wrong:
            fits = [n for n in range(1, 17) if self._divides(n, counts)]
            raise UnsupportedError(
                f"tensor parallelism over {world_size} ranks cannot divide this model's "
                f"{' and '.join(wrong)}; use one of {fits}"
            )
        moe, linear = self.moe, self.linear
        if moe is not None:
            moe = replace(
                moe,
                mlp_size=moe.mlp_size // world_size,
                shared_mlp_size=moe.shared_mlp_size // world_size,
            )
        if linear is not None:
            linear = replace(
                linear,
                num_k_heads=linear.num_k_heads // world_size,
                num_v_heads=linear.num_v_heads // world_size,
            )
        return replace(
            self,
            num_heads=self.num_heads // world_size,
            num_kv_heads=max(1, self.num_kv_heads // world_size),
            mlp_size=self.mlp_size // world_size,
            moe=moe,
            linear=linear,
            world_size=world_size,
        )

    def _divides(self, n: int, counts: Mapping[str, int]) -> bool:
        kv = self.num_kv_heads
        return all(c % n == 0 for name, c in counts.items() if name != "KV heads") and (
            kv % n == 0 or n % kv == 0
        )


def rope_config(hf: Mapping[str, Any], rotary_size: int, *, interleaved: bool = False) -> RopeConfig:
    """Rotary configuration from a Hugging Face config, old keys (`rope_theta`, `rope_scaling`) or new
    (`rope_parameters`).

    Raises:
        ConfigError: a scaling kind that is not known, or one whose figures are missing.
    """
    found = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    theta = float(found.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = str(found.get("rope_type", found.get("type", "default")))
    base = RopeConfig(theta=theta, rotary_size=rotary_size, interleaved=interleaved)
    if kind == "default":
        return base
    if kind not in ("linear", "dynamic", "llama3", "yarn", "longrope"):
        raise ConfigError(
            f"rope scaling {kind!r} is not known; known are default, linear, dynamic, llama3, yarn and "
            "longrope"
        )
    try:
        if kind == "longrope":
            return _longrope(hf, found, base)
        factor = float(
            found["factor"] or hf["max_position_embeddings"] / found["original_max_position_embeddings"]
        )
        if kind == "linear":
            return replace(base, scaling="linear", factor=factor)
        if kind == "dynamic":
            length = int(hf["max_position_embeddings"])
            return replace(base, scaling="dynamic", factor=factor, original_length=length)
        length = int(
            hf.get("original_max_position_embeddings")
            or found.get("original_max_position_embeddings")
            or hf["max_position_embeddings"]
        )
        if kind == "llama3":
            return replace(
                base,
                scaling="llama3",
                factor=factor,
                original_length=length,
                low=float(found["low_freq_factor"]),
                high=float(found["high_freq_factor"]),
            )
        return replace(
            base,
            scaling="yarn",
            factor=factor,
            original_length=length,
            low=float(found.get("beta_slow") or 1.0),
            high=float(found.get("beta_fast") or 32.0),
            attention_factor=_yarn_attention_factor(found, factor),
            truncate=bool(found.get("truncate", True)),
        )
    except KeyError as missing:
        raise ConfigError(f"rope scaling {kind!r} lacks {missing}; add it to the model's config") from None


def _longrope(hf: Mapping[str, Any], found: Mapping[str, Any], base: RopeConfig) -> RopeConfig:
    length = int(
        hf.get("original_max_position_embeddings")
        or found.get("original_max_position_embeddings")
        or hf["max_position_embeddings"]
    )
    factors = [tuple(float(x) for x in found[name]) for name in ("short_factor", "long_factor")]
    if any(len(f) != base.rotary_size // 2 for f in factors):
        raise ConfigError(
            f"rope scaling 'longrope' has {len(factors[0])} short and {len(factors[1])} long factors, but "
            f"{base.rotary_size // 2} of each are wanted, one for each pair that is rotated"
        )
    factor = float(found.get("factor") or hf["max_position_embeddings"] / length)
    given = found.get("attention_factor")
    if given is None:
        given = sqrt(1 + log(factor) / log(length)) if factor > 1 else 1.0
    return replace(
        base,
        scaling="longrope",
        factor=factor,
        original_length=length,
        short_factors=factors[0],
        long_factors=factors[1],
        attention_factor=float(given),
    )


def _yarn_attention_factor(found: Mapping[str, Any], factor: float) -> float:
    given = found.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, all_dim = found.get("mscale"), found.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(factor, float(mscale)) / yarn_mscale(factor, float(all_dim))
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature: 0.1 * mscale * ln(factor) + 1 for factors above one."""
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


def eos_ids(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids as a tuple, whatever form the config has them in."""
    ids = hf.get("eos_token_id")
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, list | tuple) else (int(ids),)


def checkpoint_dtype(hf: Mapping[str, Any]) -> str:
    """The dtype that the checkpoint was saved in ("float32" where it does not say)."""
    return str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")


def windows(hf: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Windows of Qwen's attention layers: off unless `use_sliding_window`; `layer_types` decides where it is
    given.
    """
    size = hf.get("sliding_window")
    if not hf.get("use_sliding_window") or not size:
        return ()
    if hf.get("layer_types"):
        return layer_windows(hf, num_layers)
    first = int(hf.get("max_window_layers") or 0)
    return tuple(int(size) if i >= first else None for i in range(num_layers))


def layer_windows(hf: Mapping[str, Any], num_layers: int, every: int = 1) -> tuple[int | None, ...]:
    """Windows of `sliding_window` tokens: in the layers that `layer_types` names, else in all but every
    `every`-th (1 = in all). None where the config has no window.

    Raises:
        ConfigError: a layer type that is not known, or fewer than there are layers.
    """
    kinds, size = hf.get("layer_types"), hf.get("sliding_window")
    if kinds is None:
        slides = [every == 1 or bool((i + 1) % every) for i in range(num_layers)]
    else:
        known = ("sliding_attention", "full_attention")
        if unknown := [k for k in kinds if k not in known]:
            raise ConfigError(f"layer type {unknown[0]!r} is not known; known are {', '.join(known)}")
        if len(kinds) < num_layers:
            raise ConfigError(f"layer_types has {len(kinds)} entries, but the model has {num_layers} layers")
        slides = [k == "sliding_attention" for k in kinds[:num_layers]]
    if not size or not any(slides):
        return ()
    return tuple(int(size) if s else None for s in slides)


def all_attention(num_layers: int) -> tuple[LayerKind, ...]:
    """Layer kinds of a model without state layers."""
    kind: LayerKind = "attention"
    return (kind,) * num_layers


def check_activation(hf: Mapping[str, Any]) -> None:
    """Refuse a config whose MLPs are gated by another function than silu.

    Raises:
        ConfigError: names it.
    """
    found = hf.get("hidden_act")
    if found not in (None, "silu", "swish"):
        raise ConfigError(f"hidden_act is {found!r}, but this family is known here with silu only")


def require(hf: Mapping[str, Any], *names: str) -> None:
    """Check that a config has these keys.

    Raises:
        ConfigError: names every one that is missing.
    """
    missing = [n for n in names if hf.get(n) is None]
    if missing:
        raise ConfigError(
            f"the model's config lacks {', '.join(missing)}; check that config.json is that of "
            "a complete model"
        )
