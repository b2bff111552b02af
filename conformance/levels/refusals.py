"""L0: whatever the spec does not declare is refused, with the typed error, before memory is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from conformance.bench import Bench
from conformance.check import Check, Context, Failed
from conformance.levels.memory import greedy, head_size, layers, nothing, words
from conformance.levels.registration import KNOWN_DTYPES
from conformance.opcases.base import Draw, table
from conformance.opcases.cached import attention_spec, layer_of
from conformance.world import Row, World
from core.contract.errors import ConfigError, CoreError, UnsupportedError
from core.contract.opspecs import AttentionSpec, QScale, RouteSpec
from core.contract.requests import AllocatorRequest, CommunicatorRequest, DeviceRequest, OpsRequest
from core.contract.spec import BackendSpec
from core.contract.types import CacheLayerSpec, PackRequest

SCHEMES = ("q4_0", "q4_1", "q8_0")
Probe = Callable[[Context], None]


def _allocate(change: Callable[[Context], World]) -> Probe:
    """Caches that are not declared are refused, and take nothing."""

    def run(context: Context) -> None:
        allocator = context.subject.handle.memory_allocator(AllocatorRequest(device=context.subject.device))
        plan = change(context).plan
        context.refused(lambda: allocator.allocate_state(plan), "allocate_state")
        context.require(allocator.used_bytes() == 0, "what was refused holds memory")

    return run


def _layer(kind: str) -> Probe:
    return _allocate(lambda c: World((9,), (layers(c.spec, c.dtype)[kind],)).fitted(c.spec))


def _changed_layer(**changes: Any) -> Probe:
    def world(context: Context) -> World:
        layer = replace(layers(context.spec, context.dtype)["paged"], **changes)
        return World((9,), (layer,)).fitted(context.spec)

    return _allocate(world)


def _block_size(size: int) -> Probe:
    def world(context: Context) -> World:
        return replace(World((9,), (layers(context.spec, context.dtype)["paged"],)), block_size=size)

    return _allocate(world)


def _pack(**changes: Any) -> Probe:
    def run(context: Context) -> None:
        allocator = context.subject.handle.memory_allocator(AllocatorRequest(device=context.subject.device))
        base = PackRequest(array=np.zeros((4, 64)), uses=("linear",), dtype=context.dtype, name="w")
        if "scheme" in changes:
            base = replace(base, array=np.zeros((4, 40), np.uint8))
        context.refused(lambda: allocator.pack(replace(base, **changes)), f"pack with {changes}")
        context.require(allocator.used_bytes() == 0, "what was refused holds memory")

    return run


def _ops_dtype(dtype: str) -> Probe:
    def run(context: Context) -> None:
        request = OpsRequest(device=context.subject.device, dtype=dtype)
        context.refused(lambda: context.subject.handle.ops(request), f"core_ops with dtype {dtype!r}")

    return run


def _attend(**options: Any) -> Probe:
    """An attention that is not declared must not silently be another one."""

    def run(context: Context) -> None:
        want_lse = bool(options.get("lse"))
        plain = {k: v for k, v in options.items() if k != "lse"}
        spec = attention_spec(H=head_size(context.spec), **plain)
        layer: CacheLayerSpec = replace(layer_of(spec), dtype=context.dtype)
        world = World((6,), (layer,)).fitted(context.spec)
        draw, n = Draw(5), 6
        N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_size
        source, slices = table(draw(n, N, H), draw(n, K, H), draw(n, K, H))
        sinks = bench_sinks(spec)

        def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
            x = ops.embed(w["x"], ops.select_tokens(step))
            q, k, v = (x[:, s] for s in slices)
            q, k, v = q.reshape(-1, N, H), k.reshape(-1, K, H), v.reshape(-1, K, H)
            given = w["sinks"] if spec.sinks else None
            out, _, cache = ops.attend(q, k, v, caches[0], step, spec, given, want_lse)
            return out.reshape(-1, N * H), (cache,)

        inputs = {"x": source, "sinks": sinks}

        def call() -> None:
            bench = Bench(context.subject, context.dtype, world, inputs, fn)
            bench.step([Row(0, 0, 6)])

        context.refused(call, f"attend with {', '.join(options)}")

    return run


def bench_sinks(spec: AttentionSpec) -> Any:
    """Sinks of each head."""
    from conformance.opcases.base import bias_use

    return bias_use(np.ones(spec.num_heads))


def _route(context: Context) -> None:
    ops = context.subject.handle.ops(OpsRequest(device=context.subject.device, dtype=context.dtype))
    spec = RouteSpec(num_experts=4, top_k=2)
    context.refused(lambda: ops.route(np.zeros((2, 4), np.float32), spec), "route", CoreError)


def _hidden(context: Context) -> None:
    bench = words(context)
    batch = bench.world.batch([Row(0, 0, 3)], bench.rules)
    output, bench.state = bench.program(batch.layout).run(batch, bench.state)
    context.refused(lambda: output.hidden(0), "hidden state of a layer")


def _embeds(context: Context) -> None:
    bench = words(context)
    batch = bench.world.batch([Row(0, 0, 3)], bench.rules)
    wrong = replace(batch, input_embeds=np.zeros((3, bench.world.num_tokens), np.float32))
    context.refused(lambda: bench.program(batch.layout).run(wrong, bench.state), "a step with input_embeds")


def _ranks(context: Context) -> None:
    most = context.spec.max_world_size
    request = CommunicatorRequest(
        device=context.subject.device,
        group="tp",
        rank=0,
        world_size=most + 1,
        rendezvous="tcp://127.0.0.1:9",
        timeout_s=2.0,
    )
    # Without collectives there is no hook to call.
    kind = UnsupportedError if context.spec.collectives else CoreError
    context.refused(
        lambda: context.subject.handle.communicator(request), f"a group of {most + 1} ranks", kind
    )


def _wrong_bucket(context: Context) -> None:
    """Static backends: a batch of another layout than the program's is refused, not misread."""
    bench = words(context)
    batch = bench.world.batch([Row(0, 0, 3)], bench.rules)
    other = bench.world.batch([Row(0, 3, 1), Row(1, 1, 1), Row(2, 2, 1)], bench.rules)
    if batch.layout == other.layout:
        raise Failed("two buckets of the suite have one layout; this is a fault of the suite")
    program = bench.program(batch.layout)
    context.refused(lambda: program.run(other, bench.state), "a batch of another bucket", CoreError)


def _sampler_without_history(context: Context) -> None:
    """What a sampler is given that it does not know must be refused or done, never ignored."""
    bench = words(context)
    batch = bench.world.batch([Row(0, 0, 3)], bench.rules)
    program = bench.program(batch.layout)
    output, bench.state = program.run(batch, bench.state)
    top = int(output.get()[0].argmax())
    sampling = replace(
        greedy(1),
        presence=np.array([0], np.float32),
        frequency=np.array([0], np.float32),
        repetition=np.array([1], np.float32),
        bias_ids=np.array([top], np.int32),
        bias_values=np.array([-np.inf], np.float32),
        bias_start=np.array([0, 1], np.int32),
    )
    try:
        tokens, _ = program.sample(output, batch, sampling, bench.state)
    except UnsupportedError:
        return
    context.require(int(tokens.get().tokens[0]) != top, "a token that its bias forbids was drawn")


_FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": 3},
    "chunk": {"chunk": 4},
    "soft_cap": {"soft_cap": 1.5},
    "sinks": {"sinks": True},
    "non_causal": {"causal": False},
    "q_scale": {"q_scale": QScale(factor=0.4, floor=4)},
    "lse": {"lse": True},
}


def _option(context: Context) -> None:
    """An option that a backend does not know is never ignored."""
    subject = context.subject
    options = {**subject.target.options, "no_such_option": "1"}
    request = DeviceRequest(index=subject.target.index, options=options)
    try:
        device = subject.handle.open_device(request)
    except CoreError as error:
        context.require(
            isinstance(error, ConfigError | UnsupportedError),
            f"an unknown option raises {type(error).__name__} ({error}), but ConfigError is wanted",
        )
        return
    device.close()
    raise Failed("a device opens with the option 'no_such_option', but ConfigError is wanted")


def _probes(spec: BackendSpec) -> Iterator[tuple[str, Probe]]:
    rules = spec.attention
    yield "dtype-int3-cache", _changed_layer(dtype="int3")
    yield "dtype-int3-weight", _pack(dtype="int3")
    for dtype in KNOWN_DTYPES:
        if dtype not in spec.dtypes:
            yield f"dtype-{dtype}", _ops_dtype(dtype)
    for name, options in _FEATURES.items():
        if not getattr(rules, name):
            yield f"attention-{name}", _attend(**options)
    if not rules.window:
        yield "cache-window", _layer("window")
    if not rules.latent:
        yield "cache-latent", _layer("latent")
    if not spec.state_kinds:
        yield "cache-state", _layer("state")
    if rules.head_sizes:
        size = next(s for s in (8, 24, 40, 56, 72) if s not in rules.head_sizes)
        yield "head-size", _changed_layer(head_size=size, v_head_size=size)
    yield "block-size", _block_size(next(s for s in (3, 5, 7) if s not in spec.cache.block_sizes))
    for scheme in (*SCHEMES, "no-such-scheme"):
        if scheme not in spec.quantization:
            yield f"scheme-{scheme}", _pack(scheme=scheme)
    if not spec.routed_experts:
        yield "route", _route
    if not spec.batch.hidden_states:
        yield "hidden-states", _hidden
    if not spec.batch.input_embeds:
        yield "input-embeds", _embeds
    yield "option", _option
    yield "ranks", _ranks
    if spec.shapes.kind != "dynamic":
        yield "wrong-bucket", _wrong_bucket
    yield "sampling-bias", _sampler_without_history


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    for name, run in _probes(spec):
        about = f"{name}: not declared, so it is refused with the typed error and nothing is held"
        yield Check(f"L0/refusals/{name}", run, about, is_waivable=False)


__all__ = ["checks", "nothing"]
