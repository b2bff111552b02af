"""L7: speeds that a vendor promises, measured while the output is checked.

Sizes grow until a call takes long enough to be timed. Then five calls are timed, each on other data, and the
median counts. The results of the timed calls themselves are held to rule A: a kernel that is fast because it
is wrong, or because it gives again what it gave before, fails.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from conformance import dense
from conformance.bench import Array, Bench
from conformance.check import Check, Context, Failed
from conformance.dense import Bounded
from conformance.levels.engine import Ask, engine_of, play, prompt, right
from conformance.levels.kernels import in_dtype
from conformance.opcases.base import activations, exactly, product_use, table
from conformance.opcases.cached import attention_spec, layer_of
from conformance.tolerance import Scores, attention_error
from conformance.world import Row, World
from core.contract.errors import ConfigError
from core.contract.opspecs import AttentionSpec
from core.contract.requests import Floor
from core.contract.types import Outputs
from core.sampling.params import SamplingParams

LONG_ENOUGH_S = 0.02
"""A call that takes as long is timed to a percent or so."""
WARM_UP, REPEATS = 2, 5
SAMPLED = Outputs()
"""Only rows of sampled tokens come back to the host."""


class Trial(ABC):
    """Work of one size, which is done again and again on other data.

    Attributes:
        work: of one call, in the measure's unit times seconds.
    """

    work: float

    @abstractmethod
    def run(self, i: int) -> None:
        """Do call number i and wait for its result, which is kept."""

    @abstractmethod
    def verify(self, context: Context) -> None:
        """Hold what was kept to what it must be; raises `Failed`."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what it holds."""


class Products(Trial):
    """Eight products of [T, D] with [D, D], T = D, summed."""

    COUNT, ROWS = 8, 8

    def __init__(self, context: Context, size: int) -> None:
        rules, rng = context.spec.batch, context.rng()
        tokens = min(size, rules.max_tokens or size)
        rows = min(self.ROWS, rules.max_requests or self.ROWS, rules.max_prefills or self.ROWS)
        self._each = max(tokens // rows, rules.prefill_multiple)
        world = World((2 * self._each,) * rows, outputs=SAMPLED).fitted(context.spec)
        self._x = exactly(rng.normal(size=(world.num_tokens, size)))
        self._w = [exactly(size**-0.5 * rng.normal(size=(size, size))) for _ in range(self.COUNT)]
        inputs = {"x": table(self._x)[0]} | {f"w{k}": product_use(w) for k, w in enumerate(self._w)}
        self._bench = Bench(context.subject, context.dtype, world, inputs, self._sum)
        self._starts = rng.integers(0, self._each, (WARM_UP + REPEATS, rows))
        self._found: list[dict[tuple[int, int], Array]] = []
        self.work = 2.0 * rows * self._each * size * size * self.COUNT

    def _sum(self, ops: Any, w: Any, caches: Any, step: Any) -> Any:
        (x,) = activations(ops, w, step, [slice(None)])
        h = ops.linear(x, w["w0"])
        for k in range(1, self.COUNT):
            h = ops.linear_add(x, w[f"w{k}"], h)
        return ops.take(h, step.sample_rows), caches

    def run(self, i: int) -> None:
        rows = [Row(s, int(start), self._each) for s, start in enumerate(self._starts[i])]
        self._found.append(self._bench.step(rows))

    def verify(self, context: Context) -> None:
        p, world = context.precision, self._bench.world
        for found in self._found:
            where = [world.first_id(s) + position for s, position in found]
            x = Bounded(self._x[where])
            y = dense.linear(x, self._w[0], p)
            for w in self._w[1:]:
                y = dense.add(y, dense.linear(x, w, p), p)
            context.within(np.stack(list(found.values())), y.value, y.error, "a timed product")


@dataclass(frozen=True)
class LateWorld(World):
    """A world whose token ids begin at a position: what is before it lies in the cache already."""

    first: int = 0

    def first_id(self, sequence: int) -> int:
        """Id that token 0 would have."""
        return sequence * (self.lengths[sequence] - self.first) - self.first


class Attention(Trial):
    """What both kinds of attention share: a layer, its queries, keys and values, and the exact result."""

    heads, kv_heads = 16, 4

    def _open(self, context: Context, world: World, tokens: int) -> None:
        sizes = context.spec.attention.head_sizes
        H = max((s for s in sizes if s <= 128), default=min(sizes, default=128))
        self.spec: AttentionSpec = attention_spec(self.heads, self.kv_heads, H)
        self.world = in_dtype(
            replace(world, layers=(layer_of(self.spec),)).fitted(context.spec), context.dtype
        )
        rng = context.rng()
        self.q = exactly(rng.normal(size=(tokens, self.heads, H)))
        self.k = exactly(rng.normal(size=(tokens, self.kv_heads, H)))
        self.v = exactly(rng.normal(size=(tokens, self.kv_heads, H)))
        source, self._slices = table(self.q, self.k, self.v)
        self.bench = Bench(context.subject, context.dtype, self.world, {"x": source}, self._fn)
        self.found: list[dict[tuple[int, int], Array]] = []

    def _fn(self, ops: Any, w: Any, caches: Any, step: Any) -> Any:
        q, k, v = activations(ops, w, step, self._slices)
        N, K, H = self.heads, self.kv_heads, self.spec.head_size
        q, k, v = q.reshape(-1, N, H), k.reshape(-1, K, H), v.reshape(-1, K, H)
        out, _, cache = ops.attend(q, k, v, caches[0], step, self.spec, None, False)
        return ops.take(out.reshape(-1, N * H), step.sample_rows), (cache,)

    def hold(self, context: Context, found: Array, q: Array, k: Array, v: Array) -> None:
        """One query q [N, H] over keys and values [n, K, H]; `found` [N Hv]."""
        p, H = context.precision, self.spec.head_size
        for head, row in enumerate(found.reshape(self.heads, H)):
            group = head // (self.heads // self.kv_heads)
            keys, values = k[:, group], v[:, group]
            scores = self.spec.scale * (keys @ q[head])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            sizes = self.spec.scale * (np.abs(keys) @ np.abs(q[head]))
            out = weights @ values
            bound = attention_error(Scores(scores, sizes, weights, H), values, out, p)
            context.within(row, out, bound, "timed attention")


class Decode(Attention):
    """One token each of up to eight sequences, over `size` tokens in the cache."""

    ROWS = 8

    def __init__(self, context: Context, size: int) -> None:
        rules, later = context.spec.batch, WARM_UP + REPEATS
        rows = min(self.ROWS, rules.max_requests or self.ROWS)
        if rules.max_rows_x_context:
            rows = max(min(rows, rules.max_rows_x_context // (2 * size)), 1)
        self._size = size
        world = LateWorld((size + later,) * rows, outputs=SAMPLED, first=size)
        self._open(context, world, rows * later)
        rng, Z, H = context.rng(), self.world.block_size, self.spec.head_size
        self._past = []
        for s in range(rows):
            blocks = self.world.blocks[0][s][: -(-size // Z)].tolist()
            shape = (len(blocks), Z, self.kv_heads, H)
            k, v = (exactly(rng.normal(size=shape)) for _ in range(2))
            self._past.append((k, v))
            dtype = self.bench.allocator.export_blocks(self.bench.state, 0, blocks[:1]).get()[0].dtype
            data = (k.astype(dtype), v.astype(dtype))
            self.bench.state = self.bench.allocator.import_blocks(self.bench.state, 0, blocks, data)
            itemsize = dtype.itemsize
        self.work = float(rows * size * self.kv_heads * 2 * H * itemsize)

    def run(self, i: int) -> None:
        rows = [Row(s, self._size + i, 1) for s in range(len(self._past))]
        self.found.append(self.bench.step(rows))

    def verify(self, context: Context) -> None:
        for found in self.found:
            for (s, position), row in found.items():
                first, at = self.world.first_id(s) + self._size, self.world.first_id(s) + position
                old_k, old_v = (x.reshape(-1, *x.shape[2:])[: self._size] for x in self._past[s])
                k = np.concatenate([old_k, self.k[first : at + 1]])
                v = np.concatenate([old_v, self.v[first : at + 1]])
                self.hold(context, row, self.q[at], k, v)


class Prefill(Attention):
    """A prompt of `size` tokens, whole."""

    def __init__(self, context: Context, size: int) -> None:
        size = min(size, context.spec.batch.max_tokens or size)
        self._size = size
        self._open(context, World((size,) * 2, outputs=SAMPLED), 2 * size)
        self.work = 2.0 * self.heads * 2 * self.spec.head_size * size * (size + 1) / 2

    def run(self, i: int) -> None:
        self.found.append(self.bench.step([Row(i % 2, 0, self._size)]))

    def verify(self, context: Context) -> None:
        for found in self.found:
            for (s, position), row in found.items():
                own = slice(self.world.first_id(s), self.world.first_id(s) + position + 1)
                self.hold(context, row, self.q[own][-1], self.k[own], self.v[own])


class Copies(Trial):
    """Half of the blocks copied over the other half, in another order each time."""

    def __init__(self, context: Context, size: int) -> None:
        H = min(context.spec.attention.head_sizes, default=64)
        layer = layer_of(attention_spec(8, 8, H))
        world = World((1,), (layer,)).fitted(context.spec)
        world = in_dtype(replace(world, lengths=(size * world.block_size,)), context.dtype)
        self._bench = Bench(context.subject, context.dtype, world, {}, _no_step)
        self._rng, self._size = context.rng(), size
        self._allocator = self._bench.allocator
        src = list(range(1, size + 1))
        parts = self._allocator.export_blocks(self._bench.state, 0, src).get()
        self._data = tuple(self._rng.normal(size=x.shape).astype(np.float32).astype(x.dtype) for x in parts)
        self._bench.state = self._allocator.import_blocks(self._bench.state, 0, src, self._data)
        self._last: list[int] = []
        self._wrong = 0
        self.work = 2.0 * sum(x.nbytes for x in parts)

    def run(self, i: int) -> None:
        order = self._rng.permutation(self._size)
        src, dst = (1 + order).tolist(), list(range(self._size + 1, 2 * self._size + 1))
        self._bench.state = self._allocator.copy_blocks(self._bench.state, 0, src, dst)
        last = self._allocator.export_blocks(self._bench.state, 0, dst[-1:]).get()
        self._wrong += any(
            not np.array_equal(a[0], b[order[-1]]) for a, b in zip(last, self._data, strict=True)
        )
        self._last = order.tolist()

    def verify(self, context: Context) -> None:
        context.require(not self._wrong, f"the last block is wrong after {self._wrong} timed copies")
        dst = list(range(self._size + 1, 2 * self._size + 1))
        found = self._allocator.export_blocks(self._bench.state, 0, dst).get()
        for a, b in zip(found, self._data, strict=True):
            context.equal(a, b[self._last], "a timed copy")


def _no_step(ops: Any, w: Any, caches: Any, step: Any) -> Any:
    raise AssertionError("this check runs no step")


class Serving(Trial):
    """Four requests of a tiny model, `size` tokens each: what a step costs besides its kernels."""

    ROWS = 4

    def __init__(self, context: Context, size: int) -> None:
        self._stack = ExitStack()
        self._engine = self._stack.enter_context(engine_of(context, "llama"))
        self._context = context
        self._params = SamplingParams(temperature=0, max_tokens=size, ignore_eos=True)
        self._found: list[tuple[Ask, list[int]]] = []
        self.work = float(self.ROWS * size)

    def run(self, i: int) -> None:
        asks = [
            Ask(f"{i}-{r}", prompt(self._context, 10 * i + r, 16), self._params) for r in range(self.ROWS)
        ]
        found = play(self._engine, [asks])
        self._found += [(ask, found[ask.name]) for ask in asks]

    def verify(self, context: Context) -> None:
        for ask, tokens in self._found:
            context.require(len(tokens) == ask.params.max_tokens, f"{ask.name} gives {len(tokens)} tokens")
            right(context, "llama", ask, tokens, "timed")

    def close(self) -> None:
        self._stack.close()


@dataclass(frozen=True)
class Measure:
    """What a floor can be of. Sizes double from `first` to at most `last`."""

    trial: type[Any]
    unit: str
    first: int
    last: int
    about: str


MEASURES = {
    "products": Measure(Products, "FLOP/s", 64, 4096, "matrix products"),
    "decode_attention": Measure(
        Decode, "bytes/s", 256, 8192, "cache that attention reads for single queries"
    ),
    "prefill_attention": Measure(Prefill, "FLOP/s", 256, 8192, "attention of a whole prompt"),
    "block_copies": Measure(Copies, "bytes/s", 64, 8192, "blocks read and written by copies"),
    "engine": Measure(Serving, "tokens/s", 64, 64, "four requests of a tiny model"),
}


def hold_floor(context: Context, floor: Floor) -> None:
    """Measure, verify, compare."""
    measure = MEASURES[floor.measure]
    size = measure.first
    while True:
        trial: Trial = measure.trial(context, size)
        try:
            warm = [_seconds(trial, i) for i in range(WARM_UP)]
            if warm[-1] < LONG_ENOUGH_S and size < measure.last:
                size *= 2
                continue
            seconds = [_seconds(trial, WARM_UP + i) for i in range(REPEATS)]
            trial.verify(context)
        finally:
            trial.close()
        break
    speed = trial.work / median(seconds)
    context.record("speed", speed)
    context.record("floor", floor.value)
    context.record("unit", measure.unit)
    context.record("size", size)
    context.record("fastest_s", min(seconds))
    context.record("slowest_s", max(seconds))
    if speed < floor.value:
        raise Failed(
            f"{floor.measure}: {speed:.4g} {measure.unit}, but the backend promises {floor.value:.4g} on "
            f"{floor.device!r} (size {size}, {REPEATS} calls of {min(seconds):.4g} to {max(seconds):.4g} s)"
        )


def _seconds(trial: Trial, i: int) -> float:
    start = time.perf_counter()
    trial.run(i)
    return time.perf_counter() - start


def checks(floors: Sequence[Floor]) -> Iterator[Check]:
    """A check for each floor of the device under test; none without a floor.

    Raises:
        ConfigError: a floor's measure is not known, or its value is not above 0.
    """
    for floor in floors:
        if floor.measure not in MEASURES:
            near = get_close_matches(floor.measure, MEASURES, n=1)
            raise ConfigError(
                f"the backend's floor of {floor.measure!r} has no measure; known are {', '.join(MEASURES)}"
                f"{f'; nearest is {near[0]!r}' if near else ''}"
            )
        if not 0 < floor.value < float("inf"):
            raise ConfigError(
                f"the backend's floor of {floor.measure} is {floor.value}; a number above 0 is wanted"
            )
        measure = MEASURES[floor.measure]
        yield Check(
            f"L7/floor/{floor.measure}",
            partial(hold_floor, floor=floor),
            f"{measure.about}: at least {floor.value:.4g} {measure.unit}, with the timed results verified",
            timeout_s=300.0,
        )
