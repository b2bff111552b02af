"""L2, rule D: what is read is tested exactly.

Scores are one-hot, so weights are 0 and 1, and values are small integers that name sequence, head and
position: a wrong result says which entry was read in place of the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from conformance.bench import Array, Bench
from conformance.check import Check, Context, Failed
from conformance.levels.kernels import in_dtype
from conformance.levels.memory import beyond
from conformance.opcases.base import Draw, activations, constant_use, product_use, table
from conformance.opcases.cached import attention_spec, layer_of
from conformance.world import World
from core.contract.opspecs import AttentionSpec, Rope, RopeSpec, RouteSpec
from core.contract.spec import BackendSpec

GAP = 300.0
"""Between the score of the key that is meant and all others: exp(-GAP) is 0 in every format."""
HEADS = {"grouped": (4, 2), "multi-head": (3, 3), "multi-query": (7, 1), "wide-groups": (16, 2)}
HOLDS = (1, 16, 32, 64, 128, 256)


def code_size(spec: BackendSpec) -> int:
    """Head size of these tests."""
    return max((s for s in spec.attention.head_sizes if s <= 128), default=64)


def keys(length: int, size: int) -> Array:
    """A different unit vector per position, [length, size]; the second `size` positions are negative."""
    at = np.arange(length)
    found = np.zeros((length, size))
    found[at, at % size] = np.where(at < size, 1.0, -1.0)
    return found


def values(sequence: int, length: int, heads: int, size: int) -> Array:
    """What an entry says of itself, [length, heads, size]: sequence, head, position in two digits, and 1."""
    found = np.zeros((length, heads, size))
    position = np.arange(length)
    found[:, :, 0] = sequence + 1
    found[:, :, 1] = np.arange(heads)
    found[:, :, 2], found[:, :, 3] = position[:, None] % 16, position[:, None] // 16
    found[:, :, 4] = 1
    return found


def lengths(block: int, size: int) -> tuple[int, ...]:
    """Around the ends of blocks: 1, a block and one less and more, two and a bit."""
    return tuple(min(n, 2 * size) for n in (1, max(block - 1, 1), block, block + 1, 2 * block + 3))


def targets(world: World, window: int | None, rng: np.random.Generator) -> list[Array]:
    """Per sequence, the position that each token shall read: the oldest that it sees, itself, or any."""
    found = []
    for length in world.lengths:
        at = np.arange(length)
        first = np.maximum(at - (window or length) + 1, 0)
        kind = rng.integers(0, 3, length)
        anywhere = first + rng.integers(0, 1 << 20, length) % (at - first + 1)
        found.append(np.where(kind == 0, first, np.where(kind == 1, at, anywhere)))
    return found


def attention(
    context: Context,
    heads: str,
    window: Callable[[int], int] | None,
    schedule: str,
    stale: bool,
    is_far: bool = False,
) -> None:
    """Each query reads exactly the entry that it names, though keys that it may not see match better."""
    N, K = HEADS[heads]
    H = code_size(context.spec)
    block = World((1,)).fitted(context.spec).block_size
    width = None if window is None else max(1, window(block))
    spec = attention_spec(N=N, K=K, H=H, window=width)
    layer = layer_of(spec, window=width)
    world = World(lengths(block, H), (layer,), seed=int(context.rng().integers(1 << 30))).fitted(context.spec)
    if is_far:
        world, _ = beyond(context, in_dtype(world, context.dtype))
    meant = targets(world, width, context.rng())
    q, k, v, wanted = (np.concatenate(x) for x in zip(*_rows(world, meant, spec), strict=True))
    source, slices = table(q, k, v)

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        a, b, c = activations(ops, w, step, slices)
        a, b, c = a.reshape(-1, N, H), b.reshape(-1, K, H), c.reshape(-1, K, H)
        out, _, cache = ops.attend(a, b, c, caches[0], step, spec, None, False)
        return out.reshape(-1, N * H), (cache,)

    bench = Bench(context.subject, context.dtype, in_dtype(world, context.dtype), {"x": source}, fn)
    if stale:
        _fill_with_matching_entries(bench)
    found = bench.run(getattr(world, schedule)())
    _compare(context, found.reshape(-1, N, H), wanted, world)


def _rows(world: World, meant: list[Array], spec: AttentionSpec) -> Iterator[tuple[Array, ...]]:
    N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_size
    for s, (length, target) in enumerate(zip(world.lengths, meant, strict=True)):
        code = keys(length, H)
        at = np.arange(length)
        # Twice as good a match: the next token, and the one that has just left the window.
        tempting = np.zeros((length, H))
        lures = [at + 1] if spec.window is None else [at + 1, at - spec.window]
        for lure in lures:
            # The negative of the key that is meant would unsay it.
            there = (lure >= 0) & (lure < length) & ((lure - target) % H != 0)
            tempting[there] += code[lure[there]]
        one = GAP / spec.scale
        q = np.repeat((one * (code[target] + 2 * tempting))[:, None], N, 1)
        # A token that is meant may not be tempting too: then it is meant all the more.
        v = values(s, length, K, H)
        wanted = np.repeat(v[target], N // K, 1)
        yield q, np.repeat(code[:, None], K, 1), v, wanted


def _fill_with_matching_entries(bench: Bench) -> None:
    """Every entry of the pool matches every query better than its own keys, and says that it is nobody's."""
    every = list(range(bench.world.plan.groups[0].num_blocks))
    parts = bench.allocator.export_blocks(bench.state, 0, every).get()
    k, v = (np.asarray(part).copy() for part in parts)
    k[...], v[...] = 8.0, 99.0
    bench.state = bench.allocator.import_blocks(bench.state, 0, every, (k, v))


def _compare(context: Context, found: Array, wanted: Array, world: World) -> None:
    wrong = np.argwhere((found != wanted).any(-1))
    if not len(wrong):
        return
    token, head = (int(i) for i in wrong[0])
    ends = np.cumsum(world.lengths)
    sequence = int(np.searchsorted(ends, token, side="right"))
    position = token - int(ends[sequence] - world.lengths[sequence])
    got, right = (
        f"sequence {x[0] - 1:g}, KV head {x[1]:g}, position {x[2] + 16 * x[3]:g}"
        for x in (found[token, head], wanted[token, head])
    )
    context.record("first_wrong", f"{sequence},{position},{head}")
    weight = float(found[token, head, 4])
    seen = got if weight == 1 else f"a mixture (weights sum to {weight:g})"
    raise Failed(
        f"query head {head} at position {position} of sequence {sequence} reads {seen}, but {right} is "
        f"wanted ({len(wrong)} of {found.shape[0] * found.shape[1]} are wrong)"
    )


def _product(context: Context, x: Array, w: Array, wanted: Array, what: str) -> None:
    rows = len(x)
    world = World((rows,)).fitted(context.spec)

    def fn(ops: Any, weights: Any, caches: Any, step: Any) -> Any:
        (given,) = activations(ops, weights, step, [slice(None)])
        return ops.linear(given, weights["w"], None, wide=True), caches

    inputs = {"x": table(x)[0], "w": product_use(w)}
    bench = Bench(context.subject, context.dtype, world, inputs, fn)
    context.equal(bench.run(world.whole()), wanted, what)


def held_sum(context: Context, group: int) -> None:
    """256, a one in each group of products, and -256: a narrow accumulator loses the ones."""
    size = 2048
    x = np.zeros((4, size))
    x[:, 0], x[:, -1] = 256.0, -256.0
    x[:, group : size - 1 : group] = 1.0
    wanted = np.repeat(x[:, 1:-1].sum(-1, keepdims=True), 8, 1)
    _product(context, x, np.ones((8, size)), wanted, f"a sum of ones, one in {group}")


def integers(context: Context) -> None:
    """Products of small integers are exact in any order of summation."""
    rng = context.rng()
    x, w = rng.integers(-4, 5, (17, 700)).astype(float), rng.integers(-4, 5, (33, 700)).astype(float)
    _product(context, x, w, x @ w.T, "a product of small integers")


def lookups(context: Context) -> None:
    """The first row, the last and those between are looked up as they are, in whatever order."""
    rows = 37
    world = World((rows,)).fitted(context.spec)
    wanted = context.rng().integers(-100, 100, (rows, 24)).astype(float)

    def fn(ops: Any, weights: Any, caches: Any, step: Any) -> Any:
        (given,) = activations(ops, weights, step, [slice(None)])
        return given, caches

    bench = Bench(context.subject, context.dtype, world, {"x": table(wanted)[0]}, fn)
    context.equal(bench.run(world.whole()), wanted, "rows of an embedding")


def metamorphic(context: Context, what: str) -> None:
    """What cannot change a bit of the result: places of blocks, repetition, values times a power of two."""
    H = code_size(context.spec)
    spec = attention_spec(N=4, K=2, H=H)
    world = World((21, 5, 13), (layer_of(spec),)).fitted(context.spec)
    draw, n = Draw(17), world.num_tokens
    q, k, v = draw(n, 4, H), draw(n, 2, H), draw(n, 2, H)

    def run(world: World, v: Array) -> Array:
        source, slices = table(q, k, v)

        def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
            a, b, c = activations(ops, w, step, slices)
            a, b, c = a.reshape(-1, 4, H), b.reshape(-1, 2, H), c.reshape(-1, 2, H)
            out, _, cache = ops.attend(a, b, c, caches[0], step, spec, None, False)
            return out.reshape(-1, 4 * H), (cache,)

        bench = Bench(context.subject, context.dtype, in_dtype(world, context.dtype), {"x": source}, fn)
        return bench.run(world.mixed())

    first = run(world, v)
    if what == "blocks":
        context.equal(run(replace(world, seed=world.seed + 1), v), first, "the result with blocks elsewhere")
    elif what == "again":
        context.equal(run(world, v), first, "the result when it is computed again")
    else:
        context.equal(run(world, 4 * v), 4 * first, "the result with values four times as large")


def _plain_attention(
    context: Context, world: World, spec: AttentionSpec, q: Array, k: Array, v: Array
) -> Array:
    N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_size
    source, slices = table(q, k, v)

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        a, b, c = activations(ops, w, step, slices)
        a, b, c = a.reshape(-1, N, H), b.reshape(-1, K, H), c.reshape(-1, K, H)
        out, _, cache = ops.attend(a, b, c, caches[0], step, spec, None, False)
        return out.reshape(-1, N * H), (cache,)

    bench = Bench(context.subject, context.dtype, in_dtype(world, context.dtype), {"x": source}, fn)
    return bench.run(world.mixed())


def extremes(context: Context, sign: float) -> None:
    """Scores of all keys near -90,000 or 90,000: a weight is what the differences say, and finite."""
    H = code_size(context.spec)
    spec = attention_spec(N=2, K=1, H=H)
    world = World((11, 3), (layer_of(spec),)).fitted(context.spec)
    n = world.num_tokens
    q, k = np.zeros((n, 2, H)), np.zeros((n, 1, H))
    # 288^2 is exact in every format of 8 bits; all scores of a query are equal, so it takes the mean.
    q[:, :, 0], k[:, :, 0] = sign * 288.0 / spec.scale, 288.0
    v = np.zeros((n, 1, H))
    v[:, 0, 0] = 1.0
    found = _plain_attention(context, world, spec, q, k, v).reshape(n, 2, H)
    context.within(found[:, :, 0], np.ones((n, 2)), np.full((n, 2), 1e-2), "the sum of weights")


def isolated(context: Context, what: str) -> None:
    """Values of one sequence that are not finite stay in it."""
    H = code_size(context.spec)
    draw = Draw(23)
    bad = {"nan": np.nan, "inf": np.inf, "huge": 3e30}[what]
    if what == "huge" and context.dtype == "float16":
        bad = 6e4
    spec = attention_spec(N=4, K=2, H=H)
    world = World((9, 21, 5), (layer_of(spec),)).fitted(context.spec)
    n = world.num_tokens
    q, k, v = draw(n, 4, H), draw(n, 2, H), draw(n, 2, H)
    w = draw.weight(24, 4 * H)

    def run(v: Array) -> Array:
        source, slices = table(q, k, v)

        def fn(ops: Any, weights: Any, caches: Any, step: Any) -> Any:
            a, b, c = activations(ops, weights, step, slices)
            a, b, c = a.reshape(-1, 4, H), b.reshape(-1, 2, H), c.reshape(-1, 2, H)
            out, _, cache = ops.attend(a, b, c, caches[0], step, spec, None, False)
            return ops.linear(out.reshape(-1, 4 * H), weights["w"], None, wide=True), (cache,)

        inputs = {"x": source, "w": product_use(w)}
        bench = Bench(context.subject, context.dtype, in_dtype(world, context.dtype), inputs, fn)
        return bench.run(world.mixed())

    clean = run(v)
    spoiled = v.copy()
    spoiled[world.first_id(1) : world.first_id(2)] = bad
    with np.errstate(all="ignore"):
        found = run(spoiled)
    others = [i for i in range(n) if not world.first_id(1) <= i < world.first_id(2)]
    context.equal(found[others], clean[others], f"sequences beside one whose values are {what}")


def far_positions(context: Context) -> None:
    """A rotary table is read at positions beyond 32,768 too."""
    H, length = code_size(context.spec), 40_003
    angles = np.zeros((length, H))
    angles[:, : H // 2] = 1.0
    angles[length - 3 :, : H // 2] = -1.0
    world = World((3,)).fitted(context.spec)
    x = Draw(4)(3, 1, H)

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (given,) = activations(ops, w, step, [slice(None)])
        step = replace(step, positions=step.positions + (length - 3))
        rope = Rope(w["table"], RopeSpec(rotary_size=H))
        return ops.rope(given.reshape(-1, 1, H), rope, step).reshape(-1, H), caches

    inputs = {"x": table(x)[0], "table": constant_use(angles)}
    bench = Bench(context.subject, context.dtype, world, inputs, fn)
    context.equal(bench.run(world.whole()), -x.reshape(3, H), "elements turned by half a circle")


def underflow(context: Context) -> None:
    """Router logits so low that every score is 0: weights are 0 or equal, and finite."""
    spec = RouteSpec(num_experts=8, top_k=3, scoring="sigmoid")
    world = World((5,)).fitted(context.spec)

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (logits,) = activations(ops, w, step, [slice(None)])
        _, weights = ops.route(logits, spec)
        return weights, caches

    inputs = {"x": table(np.full((5, 8), -3e4))[0]}
    found = Bench(context.subject, context.dtype, world, inputs, fn).run(world.whole())
    context.require(bool(np.isfinite(found).all()), f"weights of scores that underflow are {found[0]}")


def many_experts(context: Context) -> None:
    """Eight of 128 experts, the best ones, in order."""
    rows, E, k = 13, 128, 8
    spec = RouteSpec(num_experts=E, top_k=k)
    world = World((rows,)).fitted(context.spec)
    logits = np.stack([context.rng().permutation(E) for _ in range(rows)]).astype(float) / 8

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (given,) = activations(ops, w, step, [slice(None)])
        ids, weights = ops.route(given, spec)
        return weights * 0 + ids, caches

    found = Bench(context.subject, context.dtype, world, {"x": table(logits)[0]}, fn).run(world.whole())
    context.equal(found, np.argsort(-logits, 1)[:, :k], "the chosen experts")


def company(context: Context) -> None:
    """A row's bits do not depend on how many rows are beside it, where the backend says so."""
    D, width, rows = 300, 40, 37
    draw = Draw(31)
    x, w = draw(rows, D), draw.weight(width, D)

    def run(x: Array) -> Array:
        world = World((len(x),)).fitted(context.spec)

        def fn(ops: Any, weights: Any, caches: Any, step: Any) -> Any:
            (given,) = activations(ops, weights, step, [slice(None)])
            return ops.linear(given, weights["w"], None, wide=True), caches

        inputs = {"x": table(x)[0], "w": product_use(w)}
        return Bench(context.subject, context.dtype, world, inputs, fn).run(world.whole())

    together = run(x)
    for count in (1, 2, 7, 16, 33):
        context.equal(run(x[:count]), together[:count], f"the first {count} rows without the others")


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    windows: dict[str, Callable[[int], int] | None] = {
        "all": None,
        "window-1": lambda block: 1,
        "window-2": lambda block: 2,
        "window-block-less-1": lambda block: block - 1,
        "window-block": lambda block: block,
        "window-block-and-1": lambda block: block + 1,
    }
    about = "each query reads exactly the entry that it names: no other page, head, position or sequence"
    for heads in HEADS:
        for name, window in windows.items():
            if window is not None and heads != "grouped":
                continue
            for schedule in ("whole", "mixed", "single"):
                for stale in (False, True):
                    end = f"{heads}-{name}-{schedule}{'-stale' if stale else ''}"
                    yield Check(
                        f"L2/addressing/{end}",
                        partial(attention, heads=heads, window=window, schedule=schedule, stale=stale),
                        f"{heads} heads, {name}, tokens given {schedule}: {about}",
                        () if window is None else ("attention.window",),
                        is_waivable=False,
                    )
    yield Check(
        "L2/addressing/past-2-31-elements",
        partial(attention, heads="grouped", window=None, schedule="mixed", stale=False, is_far=True),
        f"a cache of more than 2**31 elements: {about}",
        timeout_s=300.0,
        is_quick=False,
        is_waivable=False,
    )
    for group in HOLDS:
        yield Check(
            f"L2/accumulator/hold-{group}",
            partial(held_sum, group=group),
            "sums are kept in float32 or wider: ones beside a large number are not lost",
        )
    yield Check("L2/addressing/integers", integers, "products of small integers are exact")
    yield Check("L2/addressing/lookups", lookups, "an embedding's rows are looked up as they are")
    for sign, name in ((-1.0, "negative"), (1.0, "positive")):
        about = "scores of a large size leave weights finite and of sum 1"
        yield Check(f"L2/extremes/{name}", partial(extremes, sign=sign), about)
    about = "routing weights of scores that underflow are finite"
    yield Check("L2/extremes/routing", underflow, about, ("routed_experts",), profile="moe")
    about = "the best eight of 128 experts are chosen"
    yield Check("L2/route/many-experts", many_experts, about, ("routed_experts",), profile="moe")
    yield Check(
        "L2/metamorphic/company",
        company,
        "a row's bits do not depend on the rows beside it",
        ("determinism:batch_invariant",),
    )
    for what in ("nan", "inf", "huge"):
        about = "what is not finite in one sequence does not reach another"
        yield Check(f"L2/isolation/{what}", partial(isolated, what=what), about, is_waivable=False)
    yield Check(
        "L2/rope/far-positions", far_positions, "positions beyond 32,768 are rotated by their own row"
    )
    for what in ("blocks", "again", "powers"):
        yield Check(
            f"L2/metamorphic/{what}",
            partial(metamorphic, what=what),
            "what cannot change the mathematics does not change a bit",
            supported=lambda spec, what=what: what != "again" or spec.determinism != "none",  # type: ignore[misc]
        )
