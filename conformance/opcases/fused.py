"""Cases of the fused ops, each with the composite that defines it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from conformance import dense
from conformance.dense import Bounded
from conformance.opcases.base import (
    EPS,
    Case,
    Draw,
    activations,
    bias_use,
    constant_use,
    norm_use,
    per_sequence,
    positions,
    product_use,
    rotary,
    table,
)
from conformance.opcases.cached import (
    LATENT,
    LENGTHS,
    SCHEDULES,
    attention_spec,
    declares,
    latent_layer,
    layer_of,
)
from conformance.tolerance import Precision
from conformance.world import World
from core.contract.ops import Ops
from core.contract.opspecs import AttentionSpec, QScale, Rope, RopeSpec
from core.contract.types import Outputs

WORLD = World((9, 1, 14))
T, D, WIDTH = WORLD.num_tokens, 24, 20


def fused(op: str, name: str, world: World, inputs: Any, call: Any, exact: Any, **options: Any) -> Case:
    """`call(apply, ops, w, caches, step)` runs the op as `apply`: the table's method, or the composite."""

    def own(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        return call(getattr(ops, op), ops, w, caches, step)

    def composite(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        return call(lambda *args: getattr(Ops, op)(ops, *args), ops, w, caches, step)

    return Case(op, name, world, inputs, own, exact, composite=composite, **options)


def row_cases() -> Iterator[Case]:
    draw = Draw(41)
    h, x, g = draw(T, D), draw(T, WIDTH), draw(T, D)
    w, back, n, b = draw.weight(WIDTH, D), draw.weight(D, WIDTH), draw.norm(D), draw(WIDTH)
    b_back = draw(D)
    source, slices = table(h, x, g)
    inputs = {
        "x": source,
        "w": product_use(w),
        "back": product_use(back),
        "n": norm_use(n),
        "b": bias_use(b),
        "b_back": bias_use(b_back),
    }

    def normed(p: Precision) -> Bounded:
        return dense.norm(Bounded(h), n, EPS, p)

    def case(op: str, name: str, call: Any, exact: Any) -> Case:
        def step_call(apply: Any, ops: Any, w: Any, caches: Any, step: Any) -> Any:
            return call(apply, w, *activations(ops, w, step, slices)), caches

        return fused(op, name, WORLD, inputs, step_call, exact)

    for bias in (False, True):
        end = "-bias" if bias else ""
        yield case(
            "norm_linear",
            f"norm_linear{end}",
            lambda apply, w, h, x, g, bias=bias: apply(h, w["n"], w["w"], EPS, w["b"] if bias else None),
            lambda p, bias=bias: dense.linear(normed(p), w, p, b if bias else None),
        )
        yield case(
            "linear_add",
            f"linear_add{end}",
            lambda apply, w, h, x, g, bias=bias: apply(x, w["back"], h, w["b_back"] if bias else None),
            lambda p, bias=bias: dense.add(
                Bounded(h), dense.linear(Bounded(x), back, p, b_back if bias else None), p
            ),
        )
        yield case(
            "linear_norm_add",
            f"linear_norm_add{end}",
            lambda apply, w, h, x, g, bias=bias: apply(
                x, w["back"], w["n"], h, EPS, w["b_back"] if bias else None
            ),
            lambda p, bias=bias: dense.add(
                Bounded(h),
                dense.norm(dense.linear(Bounded(x), back, p, b_back if bias else None), n, EPS, p),
                p,
            ),
        )
    for activation in ("silu", "gelu_tanh", "swigluoai"):
        yield case(
            "norm_linear_glu",
            f"norm_linear_glu-{activation}",
            lambda apply, w, h, x, g, a=activation: apply(h, w["n"], w["w"], EPS, a),
            lambda p, a=activation: dense.glu(dense.linear(normed(p), w, p), a, p),
        )
    for activation in ("silu", "sigmoid"):
        yield case(
            "norm_gate",
            f"norm_gate-{activation}",
            lambda apply, w, h, x, g, a=activation: apply(h, w["n"], g, EPS, a),
            lambda p, a=activation: dense.multiply(normed(p), dense.activate(Bounded(g), a, p), p),
        )
    yield case(
        "residual_add",
        "residual_add",
        lambda apply, w, h, x, g: apply(h, g),
        lambda p: dense.add(Bounded(h), Bounded(g), p),
    )
    # A scale that every dtype holds: its own rounding is not the op's.
    for scale in (None, 4.75):
        yield fused(
            "embed_step",
            f"embed_step-{scale}",
            WORLD,
            inputs,
            lambda apply, ops, w, caches, step, scale=scale: (apply(w["x"], step, scale), caches),
            lambda p, scale=scale: embedded(source.array, scale, p),
        )
    for name, cap, all_logits in (("all", None, True), ("sampled", None, False), ("capped", 1.2, True)):
        # With one token per sequence the sampled rows are all tokens.
        world = WORLD if all_logits else replace(WORLD, lengths=(1,) * 5, outputs=Outputs())
        rows = slice(0, world.num_tokens)

        def logits(p: Precision, cap: float | None = cap, rows: slice = rows) -> Bounded:
            y = dense.linear(normed(p)[rows], w, p)
            if cap is None:
                return y
            z = cap * np.tanh(y.value / cap)
            return Bounded(z, y.error + (p.exp + 3) * p.u_acc * cap + p.u_out * np.abs(z))

        def head(apply: Any, ops: Any, w: Any, caches: Any, step: Any, cap: float | None = cap) -> Any:
            h, _, _ = activations(ops, w, step, slices)
            return apply(h, w["n"], w["w"], step, EPS, cap), caches

        yield fused("head_logits", f"head_logits-{name}", world, inputs, head, logits)


def embedded(x: Any, scale: float | None, p: Precision) -> Bounded:
    """Rows of the table, times a factor that itself is rounded."""
    y = x * (1.0 if scale is None else scale)
    return Bounded(y, (0.0 if scale is None else 2 * p.u_acc + p.u_out) * np.abs(y) + p.tiny)


_WINDOW = attention_spec(window=12)
_WHOLE, _PAIRS, _PART = (
    RopeSpec(rotary_size=8),
    RopeSpec(rotary_size=8, interleaved=True),
    RopeSpec(rotary_size=4),
)
ATTENTION: dict[str, tuple[AttentionSpec, bool, RopeSpec | None]] = {
    "all": (_WINDOW, True, _WHOLE),
    "rope": (_WINDOW, False, _WHOLE),
    "norm": (_WINDOW, True, None),
    "pairs": (attention_spec(), False, _PAIRS),
    "part": (attention_spec(soft_cap=1.5), True, _PART),
    "chunk-pairs": (attention_spec(chunk=6), True, _PAIRS),
    "q-scale": (attention_spec(q_scale=QScale(factor=0.4, floor=4)), True, None),
    "non-causal": (attention_spec(causal=False), False, _WHOLE),
    "wide-heads": (attention_spec(H=64), True, RopeSpec(rotary_size=64)),
}
"""Name -> attention, whether queries and keys are normed, and how they are rotated."""


def attention_cases() -> Iterator[Case]:
    for name, (spec, normed, rotation) in ATTENTION.items():
        N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_size
        world, draw = World(LENGTHS, (layer_of(spec),)), Draw(51)
        n = world.num_tokens
        q, k, v, qn, kn = draw(n, N, H), draw(n, K, H), draw(n, K, H), draw.norm(H), draw.norm(H)
        angles, at = rotary(64, rotation.rotary_size if rotation else H), positions(world)
        source, slices = table(q, k, v)
        inputs = {"x": source, "qn": norm_use(qn), "kn": norm_use(kn), "r": constant_use(angles)}

        def call(
            apply: Any,
            ops: Any,
            w: Any,
            caches: Any,
            step: Any,
            slices: Any = slices,
            normed: bool = normed,
            rotation: Any = rotation,
            spec: Any = spec,
        ) -> Any:
            N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_size
            q, k, v = activations(ops, w, step, slices)
            rope = Rope(w["r"], rotation) if rotation else None
            weights = (w["qn"], w["kn"]) if normed else (None, None)
            out, cache = apply(
                q.reshape(-1, N, H),
                k.reshape(-1, K, H),
                v.reshape(-1, K, H),
                *weights,
                EPS,
                rope,
                caches[0],
                step,
                spec,
                None,
            )
            return out.reshape(-1, N * H), (cache,)

        def exact(
            p: Precision,
            world: Any = world,
            q: Any = q,
            k: Any = k,
            v: Any = v,
            qn: Any = qn,
            kn: Any = kn,
            normed: bool = normed,
            rotation: Any = rotation,
            spec: Any = spec,
            at: Any = at,
            angles: Any = angles,
        ) -> Bounded:
            a, b = Bounded(q), Bounded(k)
            if normed:
                a, b = dense.norm(a, qn, EPS, p), dense.norm(b, kn, EPS, p)
            if rotation:
                size, pairs = rotation.rotary_size, rotation.interleaved
                a, b = (dense.rope(x, at, size, pairs, angles, p) for x in (a, b))
            return per_sequence(world, lambda t: dense.attend(a[t], b[t], Bounded(v[t]), spec, None, p)[0])

        yield fused(
            "norm_rope_attend",
            f"norm_rope_attend-{name}",
            world,
            inputs,
            call,
            exact,
            schedules=SCHEDULES if spec.causal else ("whole",),
            supported=declares(spec),
        )


def latent_case() -> Case:
    s, world, draw = LATENT, World(LENGTHS, (latent_layer(),)), Draw(61)
    n, N, C, P = world.num_tokens, s.num_heads, s.latent_size, s.rope_size
    q, kv, kvn = draw(n, N, s.nope_size + P), draw(n, C + P), draw.norm(C)
    w_k, w_v = draw.weight(N * s.nope_size, C), draw.weight(N * s.v_head_size, C)
    angles, at = rotary(64, P), positions(world)
    source, slices = table(q, kv)
    inputs = {
        "x": source,
        "n": norm_use(kvn),
        "w_k": product_use(w_k),
        "w_v": product_use(w_v),
        "r": constant_use(angles),
    }

    def call(apply: Any, ops: Any, w: Any, caches: Any, step: Any) -> Any:
        q, kv = activations(ops, w, step, slices)
        rope = Rope(w["r"], RopeSpec(rotary_size=P, interleaved=True))
        q = q.reshape(-1, N, s.nope_size + P)
        out, cache = apply(q, kv, w["n"], EPS, rope, w["w_k"], w["w_v"], caches[0], step, s)
        return out.reshape(-1, N * s.v_head_size), (cache,)

    def exact(p: Precision) -> Bounded:
        latent = dense.norm(Bounded(kv[:, :C]), kvn, EPS, p)
        q_rope = dense.rope(Bounded(q[:, :, s.nope_size :]), at, P, True, angles, p)
        k_rope = dense.rope(Bounded(kv[:, None, C:]), at, P, True, angles, p)
        q_nope = Bounded(q[:, :, : s.nope_size])
        return per_sequence(
            world,
            lambda t: dense.attend_latent(q_nope[t], q_rope[t], latent[t], k_rope[t], w_k, w_v, s, p)[0],
        )

    return fused(
        "norm_rope_attend_latent",
        "norm_rope_attend_latent",
        world,
        inputs,
        call,
        exact,
        schedules=SCHEDULES,
        supported=lambda spec: spec.attention.latent,
    )


def cases() -> list[Case]:
    return [*row_cases(), *attention_cases(), latent_case()]
