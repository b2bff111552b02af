"""L2: what is right for few is right for many: long contexts, many rows, large vocabularies, deep products.

Data are sparse or small integers, so that results are exact (rule D) and cheap however large the sizes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from conformance import dense
from conformance.bench import Array, Bench
from conformance.check import Check, Context, Failed
from conformance.dense import Bounded
from conformance.levels.addressing import GAP, code_size
from conformance.levels.kernels import expected, in_dtype, profile_of
from conformance.opcases.base import EPS, Case, Draw, activations, norm_use, product_use, table
from conformance.opcases.cached import SCAN, attention_spec, conv_case, layer_of, scan_case
from conformance.world import Row, World
from core.contract.spec import BackendSpec

BITS = 16
"""Of a position's code: more positions than any of these contexts has."""
HEADS = 7
VOCAB = 70_001
"""Beyond what 16 bits count."""
DEPTH = 8192
CONTEXTS = {"512": (511, 512, 513), "1025": (1025,), "4097": (4097,), "32769": (32_769,)}
ROWS = (33, 257)


def code(positions: Array) -> Array:
    """A position's bits as 1 and -1, [..., BITS]: two positions have products of BITS - 2 at most."""
    return 2.0 * (positions[..., None] >> np.arange(BITS) & 1) - 1


def entry(sequence: int, positions: Array, size: int) -> Array:
    """What the entry at a position says of itself, [..., size]: sequence and position in digits, and 1."""
    found = np.zeros((*positions.shape, size))
    for i in range(4):
        found[..., i] = positions >> 4 * i & 15
    found[..., 4], found[..., 5], found[..., 6] = sequence % 16, sequence // 16, 1
    return found


def named(found: Array) -> str:
    """The entry that a result says it is."""
    if found[6] != 1:
        return f"a mixture (weights sum to {found[6]:g})"
    position = sum(found[i] * 16**i for i in range(4))
    return f"position {position:g} of sequence {found[4] + 16 * found[5]:g}"


def meant(length: int, rng: np.random.Generator) -> Array:
    """A position for each head of a query at the end: the first, the last ones, and some between."""
    far = [0, length - 1, max(length - 2, 0), length // 2]
    return np.array([*far, *rng.integers(0, length, HEADS - len(far))])


def decodes(context: Context, lengths: tuple[int, ...]) -> None:
    """One token of every sequence, whose keys before it were imported: each head reads what it names."""
    H = code_size(context.spec)
    spec = attention_spec(N=HEADS, K=1, H=H)
    world = World(lengths, (layer_of(spec),), seed=int(context.rng().integers(1 << 30))).fitted(context.spec)
    rng, n = context.rng(), world.num_tokens
    q, k, v = np.zeros((n, HEADS, H)), np.zeros((n, 1, H)), np.zeros((n, 1, H))
    wanted = {}
    for s, length in enumerate(lengths):
        last, at = world.first_id(s) + length - 1, meant(length, rng)
        q[last, :, :BITS] = GAP / 2 / spec.scale * code(at)
        k[last, 0, :BITS] = code(np.array(length - 1))
        v[last, 0] = entry(s, np.array(length - 1), H)
        wanted[s] = entry(s, at, H)
    source, slices = table(q, k, v)

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        a, b, c = activations(ops, w, step, slices)
        a, b, c = a.reshape(-1, HEADS, H), b.reshape(-1, 1, H), c.reshape(-1, 1, H)
        out, _, cache = ops.attend(a, b, c, caches[0], step, spec, None, False)
        return out.reshape(-1, HEADS * H), (cache,)

    bench = Bench(context.subject, context.dtype, in_dtype(world, context.dtype), {"x": source}, fn)
    _import(bench)
    for first in range(0, len(lengths), many := context.spec.batch.max_requests or len(lengths)):
        rows = [Row(s, lengths[s] - 1, 1) for s in range(first, min(first + many, len(lengths)))]
        for (s, position), value in bench.step(rows).items():
            wrong = np.flatnonzero((value.reshape(HEADS, H) != wanted[s]).any(-1))
            if len(wrong):
                got, right = value.reshape(HEADS, H)[wrong[0]], wanted[s][wrong[0]]
                context.record("first_wrong", f"{s},{position},{wrong[0]}")
                raise Failed(
                    f"query head {wrong[0]} at position {position} of sequence {s} reads {named(got)}, but "
                    f"{named(right)} is wanted"
                )


def _import(bench: Bench) -> None:
    """Every entry of the sequences but the last ones'."""
    world = bench.world
    Z = world.block_size
    blocks, keys, values = [], [], []
    for s, length in enumerate(world.lengths):
        count = -(-(length - 1) // Z)
        at = np.arange(count * Z)
        value = entry(s, at, world.layers[0].v_head_size)
        # Beyond the end lies the key that every first head looks for, and a value that is nobody's.
        at[length - 1 :], value[length - 1 :] = 0, 99
        blocks += world.blocks[0][s][:count].tolist()
        keys.append(code(at).reshape(count, Z, BITS))
        values.append(value.reshape(count, Z, 1, -1))
    of_one = bench.allocator.export_blocks(bench.state, 0, blocks[:1]).get()
    k, v = (np.zeros((len(blocks), *part.shape[1:]), part.dtype) for part in of_one)
    k[:, :, 0, :BITS], v[...] = np.concatenate(keys), np.concatenate(values)
    bench.state = bench.allocator.import_blocks(bench.state, 0, blocks, (k, v))


def wide_product(context: Context, what: str) -> None:
    """Each of 70,001 logits is its own number, which 17 bits hold: all of them, or some by `take`."""
    ids = np.arange(VOCAB)
    w = np.stack([ids >> 14, ids >> 7 & 127, ids & 127], 1).astype(float)
    x = np.array([[16384.0, 128.0, 1.0], [0.0, -128.0, 2.0]])
    if what == "take":
        x = np.tile(x[:1], (9, 1))
    rows, every = len(x), VOCAB // 9

    def fn(ops: Any, weights: Any, caches: Any, step: Any) -> Any:
        (given,) = activations(ops, weights, step, [slice(None)])
        y = ops.linear(given, weights["w"], None, wide=True)
        if what == "take":
            y = ops.take(y.reshape(-1, 1), VOCAB - 1 - every * step.positions)
        return y, caches

    world = World((rows,)).fitted(context.spec)
    inputs = {"x": table(x)[0], "w": product_use(w)}
    found = Bench(context.subject, context.dtype, world, inputs, fn).run(world.whole())
    wanted = (VOCAB - 1 - every * np.arange(rows))[:, None] if what == "take" else x @ w.T
    context.equal(found, wanted, f"numbers of a vocabulary of {VOCAB}")


def lookups(context: Context) -> None:
    """Rows of an embedding whose ids 16 bits do not count."""
    rows, ids = 18, np.arange(VOCAB)
    every = (VOCAB - 1) // (rows - 1)
    x = np.stack([ids >> 14, ids >> 7 & 127, ids & 127], 1).astype(float)
    world = World((rows,)).fitted(context.spec)

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        return ops.embed(w["x"], step.token_ids * every), caches

    found = Bench(context.subject, context.dtype, world, {"x": table(x)[0]}, fn).run(world.whole())
    context.equal(found, x[every * np.arange(rows)], f"rows of an embedding of {VOCAB}")


def deep_product(context: Context) -> None:
    """Products of 8192 small integers, dense and with one that is not 0 at the ends of tiles."""
    rng, at = context.rng(), np.array([0, 1023, 1024, 2047, 2048, 4095, 4096, 6143, DEPTH - 1])
    x = np.zeros((len(at) + 3, DEPTH))
    x[np.arange(len(at)), at], x[len(at) :] = 1, rng.integers(-1, 2, (3, DEPTH))
    w = rng.integers(-3, 4, (8, DEPTH)).astype(float)
    world = World((len(x),)).fitted(context.spec)

    def fn(ops: Any, weights: Any, caches: Any, step: Any) -> Any:
        (given,) = activations(ops, weights, step, [slice(None)])
        return ops.linear(given, weights["w"], None, wide=True), caches

    inputs = {"x": table(x)[0], "w": product_use(w)}
    found = Bench(context.subject, context.dtype, world, inputs, fn).run(world.whole())
    context.equal(found, x @ w.T, f"a sum of {DEPTH} products")


def deep_norm(context: Context) -> None:
    """The mean square of 8192 elements, of which all or those of one end are not 0: rule A."""
    draw = Draw(41)
    x, n = draw(3, DEPTH), draw.norm(DEPTH)
    x[1, : DEPTH - 9], x[2, 9:] = 0, 0
    world = World((3,)).fitted(context.spec)

    def fn(ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (given,) = activations(ops, w, step, [slice(None)])
        return ops.norm(given, w["n"], EPS), caches

    inputs = {"x": table(x)[0], "n": norm_use(n)}
    found = Bench(context.subject, context.dtype, world, inputs, fn).run(world.whole())
    wanted = dense.norm(Bounded(x), n, EPS, context.precision)
    context.within(found, wanted.value, wanted.error, f"the norm of {DEPTH} elements")


def sequence(context: Context, make: Callable[[], Case]) -> None:
    """A long sequence in one step, beside a short one: rule A."""
    case = make()
    world = case.world.fitted(context.spec)
    bench = Bench(context.subject, context.dtype, in_dtype(world, context.dtype), case.inputs, case.fn)
    bound = case.exact(context.precision).error
    context.within(bench.run(world.whole()), expected(case, world, "whole"), bound, case.op)


def fits(spec: BackendSpec, rows: int, context: int) -> bool:
    """Whether a decode step of so many rows may be as long."""
    rules = spec.batch
    rows = max(min(rows, rules.max_requests or rows), rules.min_decode_rows)
    area = rows * (context + max(spec.cache.block_sizes))
    return code_size(spec) >= BITS and (rules.max_rows_x_context is None or area <= rules.max_rows_x_context)


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    about = "every head of a single token reads exactly the key that it names"
    for name, lengths in CONTEXTS.items():
        yield Check(
            f"L2/attend/keys-{name}",
            partial(decodes, lengths=lengths),
            f"{about}, of {name} or one more or less",
            supported=partial(fits, rows=len(lengths), context=max(lengths)),
            timeout_s=60.0 if max(lengths) < 10_000 else 600.0,
            is_quick=max(lengths) < 10_000,
            is_waivable=False,
        )
    for rows in ROWS:
        yield Check(
            f"L2/attend/rows-{rows}",
            partial(decodes, lengths=tuple(2 + s % 19 for s in range(rows))),
            f"{about}, in each of {rows} rows",
            supported=partial(fits, rows=rows, context=20),
            is_waivable=False,
        )
    about = f"all numbers of a vocabulary of {VOCAB} are exact: none is left out, cut to 8 bits or another's"
    yield Check(f"L2/linear/vocabulary-{VOCAB}", partial(wide_product, what="all"), about)
    yield Check(f"L2/take/rows-{VOCAB}", partial(wide_product, what="take"), "rows beyond 65,536 are taken")
    yield Check(f"L2/embed/rows-{VOCAB}", lookups, "ids beyond 65,536 are looked up as they are")
    yield Check(f"L2/linear/depth-{DEPTH}", deep_product, f"sums of {DEPTH} integer products are exact")
    yield Check(f"L2/norm/depth-{DEPTH}", deep_norm, f"norms of {DEPTH} elements are within rule A")
    for length in (257, 513):
        for make, supported in (
            (partial(scan_case, "state_scan", (length, 3), SCAN), lambda spec: SCAN.kind in spec.state_kinds),
            (partial(conv_case, (length, 3)), lambda spec: bool(spec.state_kinds)),
        ):
            op = "state_scan" if make.func is scan_case else "short_conv"
            yield Check(
                f"L2/{op}/tokens-{length}",
                partial(sequence, make=make),
                f"{op} of {length} tokens in one step is within rule A at each of them",
                supported=supported,
                profile=profile_of(op),
            )
