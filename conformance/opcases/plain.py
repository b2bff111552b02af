"""Cases of the plain ops that use no cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from conformance import dense
from conformance.bench import Input
from conformance.dense import Bounded
from conformance.opcases.base import (
    EPS,
    Array,
    Case,
    Draw,
    activations,
    bias_use,
    constant_use,
    exactly,
    norm_use,
    positions,
    product_use,
    rotary,
    table,
)
from conformance.tolerance import Precision
from conformance.world import World
from core.contract.opspecs import Activation, ExpertsSpec, ExpertWeights, Rope, RopeSpec, RouteSpec

WORLD = World((9, 1, 14))
T = WORLD.num_tokens
ONE_ARGUMENT: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "sigmoid")


def linear_cases() -> Iterator[Case]:
    for name, rows, D, biased, wide in (
        ("plain", 24, 40, False, False),
        ("bias", 17, 33, True, False),
        ("wide", 30, 64, False, True),
        ("wide-bias", 5, 7, True, True),
        ("one-output", 1, 16, False, False),
        ("long", 8, 700, False, False),
    ):
        draw = Draw(rows)
        x, w, b = draw(T, D), draw.weight(rows, D), draw(rows)
        inputs = {"x": table(x)[0], "w": product_use(w), "b": bias_use(b)}

        def fn(ops: Any, w: Any, caches: Any, step: Any, biased: bool = biased, wide: bool = wide) -> Any:
            (x,) = activations(ops, w, step, [slice(None)])
            return ops.linear(x, w["w"], w["b"] if biased else None, wide=wide), caches

        def exact(
            p: Precision, x: Array = x, w: Array = w, b: Array | None = b if biased else None
        ) -> Bounded:
            return dense.linear(Bounded(x), w, p, b)

        yield Case("linear", f"linear-{name}", WORLD, inputs, fn, exact)

    draw = Draw(3)
    x, w = draw(T, 3, 8), draw.weight(6, 8)

    def heads(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (x,) = activations(ops, w, step, [slice(None)])
        return ops.linear(x.reshape(-1, 3, 8), w["w"]).reshape(-1, 18), caches

    yield Case(
        "linear",
        "linear-heads",
        WORLD,
        {"x": table(x)[0], "w": product_use(w)},
        heads,
        lambda p: dense.linear(Bounded(x), w, p).reshape(T, -1),
    )


def norm_cases() -> Iterator[Case]:
    for name, heads, D, weighted, scale in (
        ("plain", 1, 48, True, 1.0),
        ("no-weight", 1, 33, False, 1.0),
        ("heads", 5, 8, True, 1.0),
        ("small", 1, 16, True, 1e-3),
        ("large", 1, 300, True, 1e4),
    ):
        draw = Draw(D)
        x, n = draw(T, heads, D, scale=scale), draw.norm(D)
        x[1] = 0  # a row of zeros stays zero
        inputs = {"x": table(x)[0], "n": norm_use(n)}

        def fn(
            ops: Any, w: Any, caches: Any, step: Any, shape: Any = (-1, heads, D), weighted: bool = weighted
        ) -> Any:
            (x,) = activations(ops, w, step, [slice(None)])
            y = ops.norm(x.reshape(shape), w["n"] if weighted else None, EPS)
            return y.reshape(-1, shape[1] * shape[2]), caches

        def exact(p: Precision, x: Array = x, n: Array | None = n if weighted else None) -> Bounded:
            return dense.norm(Bounded(x), n, EPS, p).reshape(T, -1)

        yield Case("norm", f"norm-{name}", WORLD, inputs, fn, exact)


def rope_cases() -> Iterator[Case]:
    for heads, H, size in ((3, 8, 8), (1, 16, 6)):
        for interleaved in (False, True):
            draw = Draw(size)
            x, angles = draw(T, heads, H), rotary(64, size)
            spec = RopeSpec(rotary_size=size, interleaved=interleaved)
            inputs = {"x": table(x)[0], "r": constant_use(angles)}

            def fn(
                ops: Any, w: Any, caches: Any, step: Any, shape: Any = (-1, heads, H), spec: RopeSpec = spec
            ) -> Any:
                (x,) = activations(ops, w, step, [slice(None)])
                y = ops.rope(x.reshape(shape), Rope(w["r"], spec), step)
                return y.reshape(-1, shape[1] * shape[2]), caches

            def exact(p: Precision, x: Array = x, r: Array = angles, spec: RopeSpec = spec) -> Bounded:
                y = dense.rope(Bounded(x), positions(WORLD), spec.rotary_size, spec.interleaved, r, p)
                return y.reshape(T, -1)

            style = "pairs" if interleaved else "halves"
            part = "all" if size == H else "part"
            yield Case("rope", f"rope-{style}-{part}", WORLD, inputs, fn, exact)


def elementwise_cases() -> Iterator[Case]:
    x = Draw(4)(T, 48, scale=3.0)
    for activation in get_args(Activation):

        def fn(ops: Any, w: Any, caches: Any, step: Any, activation: Any = activation) -> Any:
            (x,) = activations(ops, w, step, [slice(None)])
            return ops.glu(x, activation), caches

        def exact(p: Precision, activation: Any = activation) -> Bounded:
            return dense.glu(Bounded(x), activation, p)

        yield Case("glu", f"glu-{activation}", WORLD, {"x": table(x)[0]}, fn, exact)
    far = exactly(np.concatenate([x[:, :24] * 40, x[:, 24:]], 1))  # e^120 is no float32, and silu needs none
    yield Case(
        "glu",
        "glu-far",
        WORLD,
        {"x": table(far)[0]},
        lambda ops, w, caches, step: (ops.glu(activations(ops, w, step, [slice(None)])[0], "silu"), caches),
        lambda p: dense.glu(Bounded(far), "silu", p),
    )
    for activation in ONE_ARGUMENT:
        for width in (24, 1):
            a, g = x[:, :24], x[:, 24 : 24 + width]
            source, slices = table(a, g)

            def gate(
                ops: Any, w: Any, caches: Any, step: Any, slices: Any = slices, activation: Any = activation
            ) -> Any:
                a, g = activations(ops, w, step, slices)
                return ops.gate(a, g, activation), caches

            def gated(p: Precision, a: Array = a, g: Array = g, activation: Any = activation) -> Bounded:
                return dense.multiply(Bounded(a), dense.activate(Bounded(g), activation, p), p)

            yield Case("gate", f"gate-{activation}-{width}", WORLD, {"x": source}, gate, gated)

    def capped(p: Precision) -> Bounded:
        y = 2.5 * np.tanh(x / 2.5)
        return Bounded(y, (p.exp + 3) * p.u_acc * 2.5 + p.u_out * np.abs(y))

    yield Case(
        "soft_cap",
        "soft_cap",
        WORLD,
        {"x": table(x)[0]},
        lambda ops, w, caches, step: (
            ops.soft_cap(activations(ops, w, step, [slice(None)])[0], 2.5),
            caches,
        ),
        capped,
    )


def lookup_cases() -> Iterator[Case]:
    x = Draw(6)(T, 12)
    inputs = {"x": table(x)[0]}
    yield Case(
        "embed",
        "embed",
        WORLD,
        inputs,
        lambda ops, w, caches, step: (ops.embed(w["x"], step.token_ids), caches),
        lambda p: Bounded(x, p.tiny),
    )
    shard = np.zeros_like(x)
    shard[5:11] = x[5:11]
    yield Case(
        "embed",
        "embed-shard",
        WORLD,
        {"x": Input(x[5:11], ("embed",))},
        lambda ops, w, caches, step: (ops.embed(w["x"], step.token_ids, 5), caches),
        lambda p: Bounded(shard, p.tiny),
    )
    yield Case(
        "select_tokens",
        "select_tokens",
        WORLD,
        inputs,
        lambda ops, w, caches, step: (ops.embed(w["x"], ops.select_tokens(step)), caches),
        lambda p: Bounded(x, p.tiny),
    )
    # One sequence, so positions are ids, and these rows are those of the tokens in reverse.
    one = replace(WORLD, lengths=(T,))
    yield Case(
        "take",
        "take",
        one,
        inputs,
        lambda ops, w, caches, step: (
            ops.take(ops.embed(w["x"], step.token_ids), T - 1 - step.positions),
            caches,
        ),
        lambda p: Bounded(x[::-1], p.tiny),
    )


ROUTES: dict[str, tuple[RouteSpec, bool]] = {
    "softmax": (RouteSpec(num_experts=12, top_k=3), False),
    "softmax-plain": (RouteSpec(num_experts=12, top_k=3, normalize=False, scale=2.5), False),
    "sigmoid": (RouteSpec(num_experts=12, top_k=4, scoring="sigmoid", scale=0.5), False),
    "sigmoid-bias": (RouteSpec(num_experts=12, top_k=4, scoring="sigmoid"), True),
    "softmax_topk": (RouteSpec(num_experts=12, top_k=5, scoring="softmax_topk", normalize=False), False),
    "top-1": (RouteSpec(num_experts=12, top_k=1, normalize=False), False),
    "groups-max": (RouteSpec(num_experts=12, top_k=3, num_groups=4, top_groups=2), False),
    "groups-sum": (
        RouteSpec(
            num_experts=12,
            top_k=4,
            scoring="sigmoid",
            num_groups=3,
            top_groups=2,
            group_score="top2_sum",
            scale=2.5,
        ),
        True,
    ),
}


def routed(logits: Array, spec: RouteSpec, bias: Array | None, p: Precision) -> tuple[Array, Bounded]:
    """Ids [T, top_k] and weights [T, top_k]: experts are ranked by (choice, lowest id) as Python tuples."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    scores = {
        "softmax": e / e.sum(-1, keepdims=True),
        "sigmoid": 1 / (1 + np.exp(-logits)),
        "softmax_topk": logits,
    }[spec.scoring]
    size = spec.num_experts // spec.num_groups
    ids = np.empty((len(logits), spec.top_k), np.int64)
    for t, score in enumerate(scores):
        choice = score if bias is None else score + bias
        groups = []
        for g in range(spec.num_groups):
            ranked = sorted(choice[g * size : (g + 1) * size], reverse=True)
            groups.append((-(ranked[0] if spec.group_score == "max" else ranked[0] + ranked[1]), g))
        kept = {g for _, g in sorted(groups)[: spec.top_groups]}
        order = sorted((-choice[i], i) for i in range(spec.num_experts) if i // size in kept)
        ids[t] = [i for _, i in order[: spec.top_k]]
    weights = np.take_along_axis(scores, ids, -1)
    if spec.scoring == "softmax_topk":
        weights = np.exp(weights) / np.exp(weights).sum(-1, keepdims=True)
    if spec.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    roundings = 4 * (p.exp + float(np.abs(logits).max()) + 2) * p.u_acc + 2 * p.sums(spec.num_experts)
    return ids, Bounded(weights * spec.scale, (roundings + p.u_wide) * np.abs(weights * spec.scale))


def route_cases() -> Iterator[Case]:
    logits, bias = Draw(8)(T, 12, scale=2.0), Draw(9)(12, scale=0.5)
    logits[2] = 1.0  # all equal: the lowest ids
    logits[3, 4:8] = 9.0  # ties at the top
    logits[4] = exactly(-np.abs(logits[4]) - 50)  # all far below 0
    for name, (spec, biased) in ROUTES.items():
        inputs = {"x": table(logits)[0], "b": bias_use(bias)}
        for part in ("ids", "weights"):

            def fn(
                ops: Any, w: Any, caches: Any, step: Any, spec: Any = spec, b: bool = biased, part: str = part
            ) -> Any:
                (x,) = activations(ops, w, step, [slice(None)])
                ids, weights = ops.route(x, spec, w["b"] if b else None)
                return ids if part == "ids" else weights, caches

            def exact(
                p: Precision, spec: Any = spec, b: Array | None = bias if biased else None, part: str = part
            ) -> Bounded:
                ids, weights = routed(logits, spec, b, p)
                return Bounded(ids.astype(np.float64), p.tiny) if part == "ids" else weights

            yield Case(
                "route",
                f"route-{name}-{part}",
                WORLD,
                inputs,
                fn,
                exact,
                supported=lambda spec: spec.routed_experts,
            )


def expert_cases() -> Iterator[Case]:
    D, F, k = 16, 12, 3
    for name, activation, biased, on_input, limit, moved in (
        ("plain", "silu", False, False, None, False),
        ("crowded", "silu", False, False, None, False),
        ("many", "silu", False, False, None, False),
        ("bias", "gelu_tanh", True, False, None, False),
        ("swigluoai", "swigluoai", True, False, 1.5, False),
        ("on-input", "silu", False, True, None, False),
        ("moved", "silu", False, False, None, True),
    ):
        draw, E = Draw(len(name)), {"crowded": 12, "many": 128}.get(name, 6)
        x, logits = draw(T, D), draw(T, E)
        if name == "crowded":
            logits[:, :k] = (8.0, 8.5, 9.0)  # every token has the same experts, and none may be dropped
        gate_up = np.stack([draw.weight(2 * F, D) for _ in range(E)])
        down = np.stack([draw.weight(D, F) for _ in range(E)])
        b_in, b_out = draw(E, 2 * F), draw(E, D)
        slots = np.arange(E) - moved  # moved: the first one is on another rank
        spec = ExpertsSpec(num_experts=E, activation=activation, weights_on_input=on_input, limit=limit)  # type: ignore[arg-type]
        route = RouteSpec(num_experts=E, top_k=k)
        source, slices = table(x, logits)
        inputs = {
            "x": source,
            "gate_up": Input(gate_up, ("experts",)),
            "down": Input(down, ("experts",)),
            "b_in": Input(b_in, ("experts", "bias")),
            "b_out": Input(b_out, ("experts", "bias")),
        }

        def fn(
            ops: Any,
            w: Any,
            caches: Any,
            step: Any,
            spec: Any = spec,
            route: Any = route,
            slices: Any = slices,
            biased: bool = biased,
            moved: bool = moved,
            E: int = E,
        ) -> Any:
            x, logits = activations(ops, w, step, slices)
            ids, weights = ops.route(logits, route)
            packed = ExpertWeights(
                w["gate_up"], w["down"], w["b_in"] if biased else None, w["b_out"] if biased else None
            )
            where = step.positions[:E] - 1 if moved else None  # the first row begins with 0, 1, 2, ...
            return ops.experts(x, ids, weights, packed, spec, where), caches

        def exact(
            p: Precision,
            x: Array = x,
            logits: Array = logits,
            gate_up: Array = gate_up,
            down: Array = down,
            b_in: Array = b_in,
            b_out: Array = b_out,
            spec: Any = spec,
            route: Any = route,
            slots: Array = slots,
            biased: bool = biased,
        ) -> Bounded:
            ids, weights = routed(logits, route, None, p)
            total, errors = np.zeros(x.shape), np.zeros(x.shape)
            for t in range(T):
                for j, e in enumerate(ids[t]):
                    slot = slots[e]
                    if slot < 0:
                        continue
                    row, weight = Bounded(x[t : t + 1]), weights[t : t + 1, j : j + 1]
                    if spec.weights_on_input:
                        row = dense.multiply(row, weight, p)
                    hidden = dense.linear(row, gate_up[slot], p, b_in[slot] if biased else None)
                    hidden = dense.glu(hidden, spec.activation, p, spec.limit)
                    y = dense.linear(hidden, down[slot], p, b_out[slot] if biased else None)
                    if not spec.weights_on_input:
                        y = dense.multiply(y, weight, p)
                    total[t] += y.value[0]
                    errors[t] += np.asarray(y.error)[0] + k * p.u_acc * np.abs(y.value[0])
            return Bounded(total, errors + p.u_out * np.abs(total))

        yield Case(
            "experts",
            f"experts-{name}",
            WORLD,
            inputs,
            fn,
            exact,
            supported=lambda spec: spec.routed_experts,
        )


def cases() -> list[Case]:
    return [
        *linear_cases(),
        *norm_cases(),
        *rope_cases(),
        *elementwise_cases(),
        *lookup_cases(),
        *route_cases(),
        *expert_cases(),
    ]
