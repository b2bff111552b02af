"""The main ops once each, with 100,000 results or more: for rules B and C, which look at whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from conformance.bench import CaseFunction, Input
from conformance.opcases.base import (
    EPS,
    Draw,
    activations,
    bias_use,
    constant_use,
    exactly,
    norm_use,
    product_use,
    rotary,
    table,
)
from conformance.opcases.cached import attention_spec, declares, layer_of
from conformance.tolerance import KAPPA, KAPPA_WILD
from conformance.world import World
from core.contract.opspecs import (
    Activation,
    ConvSpec,
    ExpertsSpec,
    ExpertWeights,
    LatentSpec,
    Rope,
    RopeSpec,
    RouteSpec,
    ScanSpec,
)
from core.contract.spec import BackendSpec
from core.contract.types import CacheLayerSpec, StatePart

LENGTHS = (128, 61, 19)
T = sum(LENGTHS)
LEAST = 100_000
"""Elements of a result."""


@dataclass(frozen=True, repr=False)
class Bulk:
    """An op with many results, whose first dimension is that of tokens.

    Attributes:
        op: the op's name. name: unique.
        roundings: to the compute dtype, or to that of attention's weights, between inputs and results.
        functions: it evaluates exp, tanh or the like. kappa: of rule B. out: format of results; "" = the
            compute dtype.
        schedule: a schedule of the World. supported: whether a backend declares what the case needs.
    """

    op: str
    name: str
    world: World
    inputs: Mapping[str, Input]
    fn: CaseFunction
    roundings: int = 1
    functions: bool = False
    kappa: float = KAPPA
    out: str = ""
    schedule: str = "whole"
    supported: Callable[[BackendSpec], bool] = lambda spec: True


FLAT = World(LENGTHS)


def row_cases() -> Iterator[Bulk]:
    D, width = 96, 500
    draw = Draw(71)
    x, w, b = draw(T, D), draw.weight(width, D), draw(width)

    def linear(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (x,) = activations(ops, w, step, [slice(None)])
        return ops.linear(x, w["w"], w["b"]), caches

    inputs = {"x": table(x)[0], "w": product_use(w), "b": bias_use(b)}
    yield Bulk("linear", "linear", FLAT, inputs, linear)

    # Of a size at which eps is a thousandth of the mean square.
    small, n = draw(T, width, scale=0.1), draw.norm(width)

    def norm(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (x,) = activations(ops, w, step, [slice(None)])
        return ops.norm(x, w["n"], EPS), caches

    yield Bulk("norm", "norm", FLAT, {"x": table(small)[0], "n": norm_use(n)}, norm)

    heads, H = 8, 64
    turned, angles, spec = draw(T, heads * H), rotary(T, H), RopeSpec(rotary_size=H)

    def rope(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (x,) = activations(ops, w, step, [slice(None)])
        return ops.rope(x.reshape(-1, heads, H), Rope(w["r"], spec), step).reshape(-1, heads * H), caches

    yield Bulk("rope", "rope", FLAT, {"x": table(turned)[0], "r": constant_use(angles)}, rope)

    both = draw(T, 2 * width, scale=2.0)
    for activation in get_args(Activation):

        def glu(ops: Any, w: Any, caches: Any, step: Any, activation: Any = activation) -> Any:
            (x,) = activations(ops, w, step, [slice(None)])
            return ops.glu(x, activation), caches

        yield Bulk("glu", f"glu-{activation}", FLAT, {"x": table(both)[0]}, glu, functions=True)


def attention_cases() -> Iterator[Bulk]:
    N, K, H = 8, 2, 64
    for name, options, schedule, kappa in (
        ("whole", {}, "whole", KAPPA),
        ("mixed", {}, "mixed", KAPPA),
        ("window", {"window": 50}, "mixed", KAPPA),
        ("soft-cap", {"soft_cap": 4.0}, "mixed", KAPPA_WILD),
        ("sinks", {"sinks": True}, "mixed", KAPPA_WILD),
    ):
        spec = attention_spec(N, K, H, **options)
        draw = Draw(72)
        # Scores spread enough that a wrong scale shows in the size of the results.
        q, k, v = draw(T, N, H, scale=1.5), draw(T, K, H), draw(T, K, H)
        source, slices = table(q, k, v)

        def attend(ops: Any, w: Any, caches: Any, step: Any, spec: Any = spec, s: Any = slices) -> Any:
            q, k, v = activations(ops, w, step, s)
            sinks = w["sinks"] if spec.sinks else None
            kv = (-1, K, H)
            out, _, cache = ops.attend(
                q.reshape(-1, N, H), k.reshape(kv), v.reshape(kv), caches[0], step, spec, sinks, False
            )
            return out.reshape(-1, N * H), (cache,)

        inputs = {"x": source, "sinks": bias_use(draw(N, scale=2.0))}
        yield Bulk(
            "attend",
            f"attend-{name}",
            World(LENGTHS, (layer_of(spec),)),
            inputs,
            attend,
            2,
            True,
            kappa,
            schedule=schedule,
            supported=declares(spec),
        )


LATENT = LatentSpec(scale=0.125, num_heads=8, nope_size=32, rope_size=16, v_head_size=64, latent_size=48)


def latent_case() -> Bulk:
    s, draw = LATENT, Draw(73)
    N, C, P = s.num_heads, s.latent_size, s.rope_size
    q_nope, q_rope, c, r = draw(T, N, s.nope_size, scale=1.5), draw(T, N, P), draw(T, C), draw(T, P)
    w_k, w_v = draw.weight(N * s.nope_size, C), draw.weight(N * s.v_head_size, C)
    source, slices = table(q_nope, q_rope, c, r)

    def attend(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        q_nope, q_rope, c, r = activations(ops, w, step, slices)
        q_nope, q_rope = q_nope.reshape(-1, N, s.nope_size), q_rope.reshape(-1, N, P)
        out, _, cache = ops.attend_latent(q_nope, q_rope, c, r, w["w_k"], w["w_v"], caches[0], step, s, False)
        return out.reshape(-1, N * s.v_head_size), (cache,)

    layer = CacheLayerSpec(kind="latent", dtype="float32", latent_size=C, rope_size=P)
    inputs = {"x": source, "w_k": product_use(w_k), "w_v": product_use(w_v)}
    return Bulk(
        "attend_latent",
        "attend_latent",
        World(LENGTHS, (layer,)),
        inputs,
        attend,
        4,
        True,
        schedule="mixed",
        supported=lambda spec: spec.attention.latent,
    )


def state_cases() -> Iterator[Bulk]:
    C, draw = 512, Draw(74)
    part = StatePart(name="conv", shape=(C, 3), dtype="float32")
    layer = CacheLayerSpec(kind="state", dtype="float32", state=(part,))
    x, w, conv = draw(T, C), draw(C, 4), ConvSpec(channels=C, width=4, activation="silu")

    def short_conv(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (x,) = activations(ops, w, step, [slice(None)])
        y, cache = ops.short_conv(x, w["w"], None, caches[0], step, conv)
        return y, (cache,)

    yield Bulk(
        "short_conv",
        "short_conv",
        World(LENGTHS, (layer,)),
        {"x": table(x)[0], "w": Input(w, ("conv",))},
        short_conv,
        1,
        True,
        schedule="mixed",
        supported=lambda spec: bool(spec.state_kinds),
    )

    K, N, Hk, Hv = 4, 8, 32, 64
    spec = ScanSpec(kind="gated_delta", num_k_heads=K, num_v_heads=N, k_size=Hk, v_size=Hv, scale=1.0)
    part = StatePart(name="scan", shape=(N, Hk, Hv), dtype="float32")
    layer = CacheLayerSpec(kind="state", dtype="float32", state=(part,))
    q, k, v, a, b = draw(T, K, Hk), draw(T, K, Hk), draw(T, N, Hv), draw(T, N), draw(T, N)
    source, slices = table(q, k, v, a, b)
    inputs = {
        "x": source,
        "a_log": constant_use(exactly(np.linspace(-3, 1, N))),
        "dt_bias": constant_use(draw(N)),
    }

    def scan(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        q, k, v, a, b = activations(ops, w, step, slices)
        heads = (-1, K, Hk)
        state = (w["a_log"], w["dt_bias"], caches[0], step, spec)
        y, cache = ops.state_scan(q.reshape(heads), k.reshape(heads), v.reshape(-1, N, Hv), a, b, *state)
        return y.reshape(-1, N * Hv), (cache,)

    for schedule in ("whole", "mixed"):
        yield Bulk(
            "state_scan",
            f"state_scan-{schedule}",
            World(LENGTHS, (layer,)),
            inputs,
            scan,
            2,
            True,
            schedule=schedule,
            supported=lambda declared: spec.kind in declared.state_kinds,
        )


def expert_cases() -> Iterator[Bulk]:
    D, F, E, k = 512, 96, 8, 2
    draw = Draw(75)
    x, logits = draw(T, D), draw(T, E)
    gate_up = np.stack([draw.weight(2 * F, D) for _ in range(E)])
    down = np.stack([draw.weight(D, F) for _ in range(E)])
    source, slices = table(x, logits)
    inputs = {"x": source, "gate_up": Input(gate_up, ("experts",)), "down": Input(down, ("experts",))}
    route = RouteSpec(num_experts=E, top_k=k, scoring="sigmoid", normalize=False, scale=2.5)
    spec = ExpertsSpec(num_experts=E)

    def experts(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        x, logits = activations(ops, w, step, slices)
        packed = ExpertWeights(w["gate_up"], w["down"])
        return ops.experts(x, *ops.route(logits, route), packed, spec), caches

    many, wide = draw(T, 1024, scale=2.0), RouteSpec(num_experts=1024, top_k=540, normalize=False, scale=2.5)

    def weights(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (x,) = activations(ops, w, step, [slice(None)])
        return ops.route(x, wide)[1], caches

    def routed(spec: BackendSpec) -> bool:
        return spec.routed_experts

    yield Bulk("experts", "experts", FLAT, inputs, experts, 4, True, supported=routed)
    yield Bulk(
        "route", "route", FLAT, {"x": table(many)[0]}, weights, 0, True, out="float32", supported=routed
    )


def cases() -> list[Bulk]:
    return [*row_cases(), *attention_cases(), latent_case(), *state_cases(), *expert_cases()]
