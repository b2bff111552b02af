"""Cases of the ops that write to a cache and read from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from conformance import dense
from conformance.bench import Input
from conformance.dense import Bounded
from conformance.opcases.base import (
    Case,
    Draw,
    activations,
    bias_use,
    constant_use,
    exactly,
    per_sequence,
    product_use,
    table,
)
from conformance.tolerance import Precision
from conformance.world import World
from core.contract.errors import UnsupportedError
from core.contract.opspecs import AttentionSpec, ConvSpec, LatentSpec, QScale, ScanSpec
from core.contract.spec import BackendSpec, check_capabilities
from core.contract.types import CacheLayerSpec, StatePart

LENGTHS = (29, 5, 18)
LONG = (150, 5, 70)
"""Where a window is wider than the others are long."""
HEADS = (16, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256)
"""Head sizes of models, each of which a backend may have alone."""
SCHEDULES = ("whole", "mixed")
ALL_SCHEDULES = ("whole", "leaving", "mixed")


def attention_spec(
    N: int = 4, K: int = 2, H: int = 8, Hv: int | None = None, **options: Any
) -> AttentionSpec:
    return AttentionSpec(
        scale=H**-0.5, num_heads=N, num_kv_heads=K, head_size=H, v_head_size=Hv or H, **options
    )


def layer_of(spec: AttentionSpec, dtype: str = "float32", window: int | None = None) -> CacheLayerSpec:
    """The cache that an attention writes to."""
    return CacheLayerSpec(
        kind="paged" if window is None else "window",
        dtype=dtype,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        v_head_size=spec.v_head_size,
        window=window,
    )


ATTENTION: dict[str, tuple[AttentionSpec, int | None]] = {
    "grouped": (attention_spec(), None),
    "multi-head": (attention_spec(N=3, K=3), None),
    "multi-query": (attention_spec(N=7, K=1), None),
    "odd-heads": (attention_spec(N=2, K=2, H=20), None),
    "narrow-values": (attention_spec(H=12, Hv=8), None),
    "window": (attention_spec(window=10), None),
    "window-1": (attention_spec(window=1), None),
    "window-block": (attention_spec(window=8), None),
    "window-group": (attention_spec(window=9), 9),
    "chunk": (attention_spec(chunk=6), None),
    "soft-cap": (attention_spec(soft_cap=1.5), None),
    "sinks": (attention_spec(sinks=True), None),
    "window-sinks": (attention_spec(window=5, sinks=True), None),
    "non-causal": (attention_spec(causal=False), None),
    "non-causal-chunk": (attention_spec(causal=False, chunk=6), None),
    "q-scale": (attention_spec(q_scale=QScale(factor=0.4, floor=4)), None),
    "soft-cap-sinks": (attention_spec(soft_cap=1.5, sinks=True), None),
    "window-16": (attention_spec(window=16), None),
    "window-64": (attention_spec(window=64), None),
    **{f"head-{size}": (attention_spec(H=size), None) for size in HEADS},
}


def declares(*records: object, lse: bool = False) -> Any:
    """Whether a backend declares everything that these records use."""

    def supported(spec: BackendSpec) -> bool:
        sizes = spec.attention.head_sizes
        for record in records:
            if isinstance(record, AttentionSpec) and sizes and record.head_size not in sizes:
                return False
            try:
                check_capabilities(spec, record)
            except UnsupportedError:
                return False
        return spec.attention.lse or not lse

    return supported


def block_cases(sizes: Iterable[int]) -> Iterator[Case]:
    """A case for each size of blocks that a backend declares, over two of them and a part, or over one where
    they are large.
    """
    for size in sizes:
        lengths = (min(2 * size, 140) + 3, 5, size + 1)
        world = World(lengths, (layer_of(attention_spec()),), block_size=size)
        yield from attention_cases({f"block-{size}": (attention_spec(), None)}, world)


def attention_cases(
    entries: Mapping[str, tuple[AttentionSpec, int | None]] = ATTENTION, given: World | None = None
) -> Iterator[Case]:
    for name, (spec, window) in entries.items():
        lengths = LONG if spec.window == 64 else LENGTHS
        world = given or World(lengths, (layer_of(spec, window=window),))
        draw, n = Draw(len(name)), world.num_tokens
        q = draw(n, spec.num_heads, spec.head_size)
        k = draw(n, spec.num_kv_heads, spec.head_size)
        v = draw(n, spec.num_kv_heads, spec.v_head_size)
        sinks = draw(spec.num_heads) if spec.sinks else None
        source, slices = table(q, k, v)
        inputs = {"x": source, "sinks": bias_use(np.zeros(1) if sinks is None else sinks)}
        schedules: tuple[str, ...] = ALL_SCHEDULES if name in ("grouped", "window-group") else SCHEDULES
        is_size = name.startswith(("head-", "block-"))
        if is_size:
            schedules = ("mixed",)
        for part in ("out",) if is_size else ("out", "lse"):

            def fn(
                ops: Any, w: Any, caches: Any, step: Any, spec: Any = spec, s: Any = slices, part: str = part
            ) -> Any:
                q, k, v = activations(ops, w, step, s)
                N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_size
                out, lse, cache = ops.attend(
                    q.reshape(-1, N, H),
                    k.reshape(-1, K, H),
                    v.reshape(-1, K, spec.v_head_size),
                    caches[0],
                    step,
                    spec,
                    w["sinks"] if spec.sinks else None,
                    part == "lse",
                )
                return (lse if part == "lse" else out.reshape(-1, N * spec.v_head_size)), (cache,)

            def exact(
                p: Precision,
                world: Any = world,
                q: Any = q,
                k: Any = k,
                v: Any = v,
                spec: Any = spec,
                sinks: Any = sinks,
                part: str = part,
            ) -> Bounded:
                def one(t: slice) -> Bounded:
                    y = dense.attend(Bounded(q[t]), Bounded(k[t]), Bounded(v[t]), spec, sinks, p)
                    return y[part == "lse"]

                return per_sequence(world, one)

            yield Case(
                "attend",
                f"attend-{name}-{part}",
                world,
                inputs,
                fn,
                exact,
                schedules if spec.causal else ("whole",),
                declares(spec, lse=part == "lse"),
            )


def shared_cache_case() -> Case:
    """A second attention reads what the first wrote, and writes nothing."""
    spec = attention_spec()
    world = World(LENGTHS, (layer_of(spec),))
    draw, n = Draw(77), world.num_tokens
    first, second = draw(n, 4, 8), draw(n, 4, 8)
    k, v = draw(n, 2, 8), draw(n, 2, 8)
    source, slices = table(first, second, k, v)

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        first, second, k, v = activations(ops, w, step, slices)
        heads = (-1, 4, 8)
        _, _, cache = ops.attend(
            first.reshape(heads), k.reshape(-1, 2, 8), v.reshape(-1, 2, 8), caches[0], step, spec
        )
        out, _, cache = ops.attend(second.reshape(heads), None, None, cache, step, spec)
        return out.reshape(-1, 32), (cache,)

    def exact(p: Precision) -> Bounded:
        return per_sequence(
            world,
            lambda t: dense.attend(Bounded(second[t]), Bounded(k[t]), Bounded(v[t]), spec, None, p)[0],
        )

    return Case("attend", "attend-shared-cache", world, {"x": source}, fn, exact, SCHEDULES)


LATENT = LatentSpec(
    scale=0.2, num_heads=3, nope_size=6, rope_size=4, v_head_size=5, latent_size=16, accumulator="float32"
)


def latent_layer() -> CacheLayerSpec:
    """The cache of `LATENT`."""
    return CacheLayerSpec(
        kind="latent", dtype="float32", latent_size=LATENT.latent_size, rope_size=LATENT.rope_size
    )


def latent_cases() -> Iterator[Case]:
    world, draw, s = World(LENGTHS, (latent_layer(),)), Draw(21), LATENT
    n, N, C, P = world.num_tokens, s.num_heads, s.latent_size, s.rope_size
    q_nope, q_rope, c, r = draw(n, N, s.nope_size), draw(n, N, P), draw(n, C), draw(n, P)
    w_k, w_v = draw.weight(N * s.nope_size, C), draw.weight(N * s.v_head_size, C)
    source, slices = table(q_nope, q_rope, c, r)
    inputs = {"x": source, "w_k": product_use(w_k), "w_v": product_use(w_v)}
    for part in ("out", "lse"):

        def fn(ops: Any, w: Any, caches: Any, step: Any, part: str = part) -> Any:
            q_nope, q_rope, c, r = activations(ops, w, step, slices)
            out, lse, cache = ops.attend_latent(
                q_nope.reshape(-1, N, s.nope_size),
                q_rope.reshape(-1, N, P),
                c,
                r,
                w["w_k"],
                w["w_v"],
                caches[0],
                step,
                s,
                part == "lse",
            )
            return (lse if part == "lse" else out.reshape(-1, N * s.v_head_size)), (cache,)

        def exact(p: Precision, part: str = part) -> Bounded:
            def one(t: slice) -> Bounded:
                a, b, k, r_t = (Bounded(x[t]) for x in (q_nope, q_rope, c, r))
                return dense.attend_latent(a, b, k, r_t, w_k, w_v, s, p)[part == "lse"]

            return per_sequence(world, one)

        yield Case(
            "attend_latent",
            f"attend_latent-{part}",
            world,
            inputs,
            fn,
            exact,
            ALL_SCHEDULES,
            lambda spec, part=part: spec.attention.latent and (part == "out" or spec.attention.lse),  # type: ignore[misc]
        )


def shared_latent_case() -> Case:
    """A second attention reads the latents that the first wrote, and writes nothing."""
    world, draw, s = World(LENGTHS, (latent_layer(),)), Draw(78), LATENT
    n, N, C, P = world.num_tokens, s.num_heads, s.latent_size, s.rope_size
    first, second = draw(n, N, s.nope_size + P), draw(n, N, s.nope_size + P)
    c, r = draw(n, C), draw(n, P)
    w_k, w_v = draw.weight(N * s.nope_size, C), draw.weight(N * s.v_head_size, C)
    source, slices = table(first, second, c, r)
    inputs = {"x": source, "w_k": product_use(w_k), "w_v": product_use(w_v)}

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        first, second, c, r = activations(ops, w, step, slices)
        (cache,) = caches
        for q, new in ((first, (c, r)), (second, (None, None))):
            q = q.reshape(-1, N, s.nope_size + P)
            nope, rope = q[:, :, : s.nope_size], q[:, :, s.nope_size :]
            out, _, cache = ops.attend_latent(nope, rope, *new, w["w_k"], w["w_v"], cache, step, s)
        return out.reshape(-1, N * s.v_head_size), (cache,)

    def exact(p: Precision) -> Bounded:
        def one(t: slice) -> Bounded:
            nope, rope = np.split(second[t], [s.nope_size], -1)
            q = Bounded(nope), Bounded(rope), Bounded(c[t]), Bounded(r[t])
            return dense.attend_latent(*q, w_k, w_v, s, p)[0]

        return per_sequence(world, one)

    name = "attend_latent-shared-cache"
    return Case(
        "attend_latent", name, world, inputs, fn, exact, SCHEDULES, lambda spec: spec.attention.latent
    )


def conv_case(
    lengths: tuple[int, ...], width: int = 4, activation: str | None = "silu", biased: bool = False
) -> Case:
    """Random inputs, weights and bias of ten channels."""
    C = 10
    layer = CacheLayerSpec(
        kind="state",
        dtype="float32",
        state=(StatePart(name="conv", shape=(C, width - 1), dtype="float32"),),
    )
    world, draw = World(lengths, (layer,)), Draw(width)
    x, w = draw(world.num_tokens, C), draw(C, width)
    b = draw(C)
    spec = ConvSpec(channels=C, width=width, activation=activation)  # type: ignore[arg-type]
    inputs = {"x": table(x)[0], "w": Input(w, ("conv",)), "b": bias_use(b)}

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (x,) = activations(ops, w, step, [slice(None)])
        y, cache = ops.short_conv(x, w["w"], w["b"] if biased else None, caches[0], step, spec)
        return y, (cache,)

    def exact(p: Precision) -> Bounded:
        bias = b if biased else None
        return per_sequence(world, lambda t: dense.short_conv(x[t], w, bias, spec.activation, p))

    return Case(
        "short_conv",
        f"short_conv-{width}",
        world,
        inputs,
        fn,
        exact,
        ALL_SCHEDULES,
        lambda spec: bool(spec.state_kinds),
    )


def conv_cases() -> Iterator[Case]:
    yield conv_case(LENGTHS)
    yield conv_case(LENGTHS, 2, None, True)
    yield conv_case(LENGTHS, 3, "gelu", True)


SCAN = ScanSpec(kind="gated_delta", num_k_heads=2, num_v_heads=4, k_size=8, v_size=6, scale=8**-0.5)


def scan_layer(dtype: str = "float32") -> CacheLayerSpec:
    """The state of `SCAN`."""
    shape = (SCAN.num_v_heads, SCAN.k_size, SCAN.v_size)
    return CacheLayerSpec(
        kind="state", dtype=dtype, state=(StatePart(name="scan", shape=shape, dtype=dtype),)
    )


def scan_case(name: str, lengths: tuple[int, ...], spec: ScanSpec) -> Case:
    """q, k, v, a and b are random; decays range from fast to slow over the heads."""
    world, draw = World(lengths, (scan_layer(),)), Draw(31)
    n, K, N = world.num_tokens, spec.num_k_heads, spec.num_v_heads
    size = 1.0 if spec.l2_norm_eps is not None else 0.2
    q, k, v = draw(n, K, spec.k_size), draw(n, K, spec.k_size, scale=size), draw(n, N, spec.v_size)
    a, b = draw(n, N), draw(n, N)
    a_log, dt_bias = exactly(np.linspace(-3, 1, N)), draw(N)
    source, slices = table(q, k, v, a, b)
    inputs = {"x": source, "a_log": constant_use(a_log), "dt_bias": constant_use(dt_bias)}

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        q, k, v, a, b = activations(ops, w, step, slices)
        y, cache = ops.state_scan(
            q.reshape(-1, K, spec.k_size),
            k.reshape(-1, K, spec.k_size),
            v.reshape(-1, N, spec.v_size),
            a,
            b,
            w["a_log"],
            w["dt_bias"],
            caches[0],
            step,
            spec,
        )
        return y.reshape(-1, N * spec.v_size), (cache,)

    def exact(p: Precision) -> Bounded:
        return per_sequence(
            world,
            lambda t: dense.gated_delta(q[t], k[t], v[t], a[t], b[t], a_log, dt_bias, spec, p),
        )

    return Case(
        "state_scan",
        name,
        world,
        inputs,
        fn,
        exact,
        ALL_SCHEDULES,
        lambda declared: spec.kind in declared.state_kinds,
    )


def scan_cases() -> Iterator[Case]:
    yield scan_case("state_scan", LENGTHS, SCAN)
    yield scan_case("state_scan-long", (150, 70), SCAN)
    yield scan_case("state_scan-rows", (29, 21, 23, 17, 8, 4), SCAN)
    raw = ScanSpec(
        kind="gated_delta", num_k_heads=4, num_v_heads=4, k_size=8, v_size=6, scale=1.0, l2_norm_eps=None
    )
    yield scan_case("state_scan-raw", LENGTHS, raw)


def cases() -> list[Case]:
    return [
        *attention_cases(),
        shared_cache_case(),
        *latent_cases(),
        shared_latent_case(),
        *conv_cases(),
        *scan_cases(),
    ]
