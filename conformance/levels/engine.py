"""L5: the whole engine: what a request gets does not depend on its company, its chunks or its luck."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np

from conformance.bench import Array
from conformance.check import Check, Context, Failed
from conformance.families import FAMILIES, VOCAB, sized
from conformance.levels.kernels import oracle
from conformance.levels.models import emulated_errors, is_wide
from conformance.models import SHORT, folder_of, model_logits
from conformance.tolerance import Precision
from core.contract.spec import BackendSpec
from core.engine.config import EngineConfig
from core.engine.engine import Engine
from core.sampling.params import SamplingParams

MARGIN = 2e-3
"""Logits of two tokens that are nearer than this may change places in float32; in a narrower dtype, those
nearer than twice the largest error of the same model emulated in it.
"""
LENGTH, OUTPUT = 37, 12
MAX_POSITIONS = 512
"""Of the tiny models."""
ENDS = ("llama", "qwen3_5")
"""Families of these checks: one of attention alone, and one with states."""


@dataclass(frozen=True)
class Ask:
    """A request: its prompt and parameters."""

    name: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(
        default_factory=lambda: SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    )


def longest(spec: BackendSpec) -> int:
    """Tokens of a sequence at most: a few blocks, and a few chunks of a prompt."""
    return min(max(128, 3 * spec.cache.block_sizes[0], 3 * spec.batch.prefill_multiple), MAX_POSITIONS)


@contextmanager
def engine_of(context: Context, family: str, **options: Any) -> Iterator[Engine]:
    """An engine of a tiny model on the backend under test."""
    spec = context.spec
    config: dict[str, Any] = {
        "max_model_len": longest(spec),
        "max_requests": 4,
        "max_batch_tokens": 64,
        "overlap": spec.overlap,
        **options,
    }
    # A backend whose steps take so many prompt tokens at least cannot have smaller ones.
    config["max_batch_tokens"] = max(config["max_batch_tokens"], spec.batch.prefill_multiple)
    engine = Engine(
        EngineConfig(
            model=folder_of(family),
            load_format="dummy",
            backend=spec.name,
            device=context.subject.target.index,
            dtype=context.dtype,
            backend_options=dict(context.subject.target.options),
            **config,
        ),
        plugins=context.subject.handle.plugins,
    )
    try:
        yield engine
    finally:
        engine.close()


def play(
    engine: Engine, waves: Sequence[Sequence[Ask]], aborts: dict[int, str] | None = None
) -> dict[str, list[int]]:
    """Tokens of each request. A wave comes three steps after the last; `aborts`: who ends before a step."""
    found: dict[str, list[int]] = {}
    waiting = list(waves)
    step = 0
    while waiting or engine.has_work:
        if waiting and step % 3 == 0:
            for ask in waiting.pop(0):
                engine.add(ask.name, ask.prompt, ask.params)
                found[ask.name] = []
        if name := (aborts or {}).get(step):
            engine.abort(name)
        for event in engine.step():
            if event.token >= 0:
                found[event.sequence.request.request_id].append(event.token)
        engine.blocks.check_integrity()
        step += 1
        if step > 2000:
            raise Failed("the requests do not end")
    used = engine.metrics().blocks_used
    if used:
        raise Failed(f"{used} blocks are in use after every request has ended")
    return found


def prompt(context: Context, number: int, length: int = LENGTH) -> tuple[int, ...]:
    """A random prompt of this check."""
    rng = np.random.default_rng([context.seed % 2**32, number])
    return tuple(rng.integers(0, VOCAB, length).tolist())


@cache
def oracle_logits(family: str, ids: tuple[int, ...], dtype: str) -> Array:
    """Of dummy weights of seed 0, which an engine loads and holds in a dtype: [T, V]."""
    padded = (*ids, *(0,) * max(0, SHORT - len(ids)))
    found = model_logits(oracle(), family, np.array(padded), "float64", 0, exact=True, held=dtype)
    return found[: len(ids)]


def margin(family: str, precision: Precision) -> float:
    """Below it the choice between two tokens' logits is not decided."""
    if is_wide(precision.out):
        return MARGIN
    ids = tuple(np.random.default_rng(0).integers(0, VOCAB, 2 * LENGTH).tolist())
    return 2 * float(emulated_errors(family, ids, 0, precision).max())


def same(context: Context, family: str, ask: Ask, one: list[int], other: list[int], what: str) -> None:
    """Hold two outputs of a greedy request to be equal up to the first token that is not decided."""
    if len(one) != len(other):
        raise Failed(f"{what}: {ask.name} gives {len(other)} tokens, but {len(one)} are wanted")
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    if at is None:
        return
    logits = oracle_logits(family, (*ask.prompt, *one), context.dtype)[len(ask.prompt) + at - 1]
    gap = abs(float(logits[one[at]] - logits[other[at]]))
    context.record("undecided", 1)
    if gap > margin(family, context.precision) or context.spec.determinism == "batch_invariant":
        raise Failed(
            f"{what}: token {at} of {ask.name} is {other[at]}, but {one[at]} is wanted (their logits are "
            f"{gap:.3g} apart)"
        )


def right(context: Context, family: str, ask: Ask, tokens: list[int], what: str) -> None:
    """Hold an output to the oracle's greedy choice at every decided position."""
    logits = oracle_logits(family, (*ask.prompt, *tokens), context.dtype)
    for i, token in enumerate(tokens):
        row = logits[len(ask.prompt) + i - 1]
        lost = float(row.max() - row[token])
        if lost > margin(family, context.precision):
            raise Failed(
                f"{what}: token {i} of {ask.name} is {token}, which is {lost:.3g} below "
                f"{int(row.argmax())} in the oracle's logits"
            )


def _pair(
    context: Context, family: str, what: str, waves: Sequence[Sequence[Ask]], **options: Any
) -> dict[str, list[int]]:
    """Requests one by one, and as `waves` in an engine with `options`: equal, and right."""
    asks = [ask for wave in waves for ask in wave]
    with engine_of(context, family) as engine:
        alone = {ask.name: play(engine, [[ask]])[ask.name] for ask in asks}
        engine.blocks.reset_prefix_cache()
    for ask in asks:
        right(context, family, ask, alone[ask.name], "alone")
    with engine_of(context, family, **options) as engine:
        found = play(engine, waves)
        counters = engine.scheduler.counters
        context.record("preemptions", counters.preemptions)
        context.record("cached_tokens", counters.cached_tokens)
    for ask in asks:
        same(context, family, ask, alone[ask.name], found[ask.name], what)
    return found


def batched(context: Context, family: str) -> None:
    asks = [Ask(f"r{i}", prompt(context, i, n)) for i, n in enumerate((LENGTH, 5, 17, 30))]
    _pair(context, family, "in a batch", [asks])


def staggered(context: Context, family: str) -> None:
    asks = [Ask(f"r{i}", prompt(context, i, n)) for i, n in enumerate((9, LENGTH, 21, 3, 12, 40))]
    _pair(context, family, "arriving one by one", [[ask] for ask in asks])


def chunked(context: Context, family: str) -> None:
    chunk = max(8, context.spec.batch.prefill_multiple)
    lengths = (LENGTH, 23) if chunk == 8 else (2 * chunk + 5, chunk + 9)
    asks = [Ask(f"r{i}", prompt(context, i, n)) for i, n in enumerate(lengths)]
    _pair(context, family, "in chunks", [asks], max_batch_tokens=8, max_requests=2)


def uneven(context: Context, family: str) -> None:
    size = context.spec.cache.block_sizes[0]
    lengths = (max(4, min(2 * size, longest(context.spec) - OUTPUT) - 3), size // 2 + 1, size + 1, 3)
    asks = [Ask(f"r{i}", prompt(context, i, n)) for i, n in enumerate(lengths)]
    _pair(context, family, "beside longer and shorter ones", [asks])


def preempted(context: Context, family: str) -> None:
    with engine_of(context, family) as engine:
        size = engine.cache.plan.groups[0].block_size
    length = max(20, size - 10)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    each = -(-(length + 30) // size)
    # Room for two of them to reach their end, and for one of any length.
    multiple = context.spec.cache.num_blocks_multiple
    blocks = max(2 * each + 2, 2 + -(-longest(context.spec) // size))
    blocks = -(-blocks // multiple) * multiple
    many = max(3, blocks // each + 1)
    asks = [Ask(f"r{i}", prompt(context, i, length), params) for i in range(many)]
    _pair(context, family, "preempted", [asks], num_blocks=blocks, max_requests=max(many, 4))
    context.require(bool(context.metrics["preemptions"]), "no request's blocks were taken")


def prefix_hit(context: Context, family: str) -> None:
    with engine_of(context, family) as engine:
        size = engine.cache.plan.groups[0].block_size
        # Two blocks where a sequence may be that long, else one.
        whole = 2 * size if 2 * size + 12 + OUTPUT < longest(context.spec) else size
        first = Ask("first", prompt(context, 1, whole + 5))
        ends = {"block": size, "block-and-1": size + 1, "last block": whole, "all": whole + 5}
        longer = {
            name: Ask(name, (*first.prompt[:shared], *prompt(context, 2, 7)), first.params)
            for name, shared in ends.items()
        }
        alone = {}
        for name, ask in longer.items():
            engine.blocks.reset_prefix_cache()
            alone[name] = play(engine, [[ask]])[name]
        for name, ask in longer.items():
            engine.blocks.reset_prefix_cache()
            play(engine, [[first]])
            found = play(engine, [[ask]])[name]
            same(context, family, ask, alone[name], found, f"after a prefix hit ({name})")
        context.record("cached_tokens", engine.scheduler.counters.cached_tokens)
        context.require(
            engine.scheduler.counters.cached_tokens > 0, "no prompt was found in the prefix cache"
        )


def overlapped(context: Context, family: str) -> None:
    asks = [Ask(f"r{i}", prompt(context, i, n)) for i, n in enumerate((LENGTH, 5, 17))]
    found = [_pair(context, family, f"at overlap {depth}", [asks], overlap=depth) for depth in (1, 2)]
    for ask in asks:
        same(context, family, ask, found[0][ask.name], found[1][ask.name], "overlapped")


def identity(context: Context, family: str) -> None:
    """Each request may draw two tokens that are its own: whatever else it gets is another's."""
    own = {f"r{i}": (3 + 2 * i, 4 + 2 * i) for i in range(12)}
    asks = [
        Ask(
            name,
            prompt(context, i, 3 + 5 * i % 31),
            SamplingParams(
                temperature=i % 2,
                seed=i,
                max_tokens=5 + i % 7,
                ignore_eos=True,
                logit_bias=dict.fromkeys(ids, 1000.0),
            ),
        )
        for i, (name, ids) in enumerate(own.items())
    ]
    waves = [asks[i : i + 2] for i in range(0, len(asks), 2)]
    with engine_of(context, family) as engine:
        found = play(engine, waves, {4: "r1", 7: "r4", 11: "r5"})
    for name, tokens in found.items():
        others = set(tokens) - set(own[name])
        if others:
            owner = next((n for n, ids in own.items() if others & set(ids)), "nobody")
            raise Failed(f"{name} got the tokens {sorted(others)}, which are {owner}'s")
    ended = {"r1", "r4", "r5"}
    short = [a.name for a in asks if a.name not in ended and len(found[a.name]) != a.params.max_tokens]
    context.require(not short, f"{', '.join(short)} ended early")


def aborted(context: Context, family: str) -> None:
    """Who is ended at any step takes nothing from the others with it."""
    asks = [Ask(f"r{i}", prompt(context, i, n)) for i, n in enumerate((LENGTH, 5, 17))]
    with engine_of(context, family) as engine:
        whole = play(engine, [asks])
        for step in range(0, 12, 2):
            engine.blocks.reset_prefix_cache()
            found = play(engine, [asks], {step: "r1"})
            for ask in asks:
                kept = whole[ask.name][: len(found[ask.name])] if ask.name == "r1" else whole[ask.name]
                same(context, family, ask, kept, found[ask.name], f"r1 ended before step {step}")


def late(context: Context, family: str) -> None:
    """A deadline ends its request, and nothing else."""
    with engine_of(context, family) as engine:
        ask = Ask("r0", prompt(context, 0))
        wanted = play(engine, [[ask]])["r0"]
        engine.blocks.reset_prefix_cache()
        engine.add("late", prompt(context, 1), ask.params, timeout_s=0.0)
        found = play(engine, [[ask]])
        same(context, family, ask, wanted, found["r0"], "beside a request whose time is over")


def seeded(context: Context, family: str) -> None:
    """A seed gives the same tokens alone and in a batch, until a draw that is not decided."""
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=OUTPUT, ignore_eos=True, top_k=20 * (i % 2))
        for i in range(4)
    ]
    asks = [Ask(f"r{i}", prompt(context, i, 9 + 5 * i), p) for i, p in enumerate(params)]
    with engine_of(context, family) as engine:
        alone = {ask.name: play(engine, [[ask]])[ask.name] for ask in asks}
        together = play(engine, [asks])
    equal = sum(alone[a.name] == together[a.name] for a in asks)
    context.record("equal", equal)
    context.require(equal >= 3, f"{4 - equal} of 4 seeded requests give other tokens in a batch than alone")


ABOUT: dict[Callable[..., None], str] = {
    batched: "a request gives the same tokens alone and in a batch, and they are the oracle's",
    staggered: "requests that arrive while others run give what they give alone",
    uneven: "a request gives the same tokens beside much longer and shorter ones",
    chunked: "a prompt in chunks gives what it gives whole",
    preempted: "requests whose blocks were taken give what they would have given",
    prefix_hit: "a prompt found in the prefix cache gives what it gives anew, at every boundary",
    overlapped: "steps in flight change nothing",
    identity: "no request ever gets another's tokens",
    aborted: "a request that is ended takes nothing with it",
    late: "a deadline ends its request alone",
    seeded: "a seed gives the same tokens in any company",
}
_STRICT = (identity, aborted, prefix_hit)


def checks(spec: BackendSpec) -> Iterator[Check]:
    """See `conformance.catalogue`."""
    for family in ENDS:
        _, _, profile, needs = FAMILIES[family]
        for run, about in ABOUT.items():
            yield Check(
                f"L5/engine/{run.__name__.replace('_', '-')}-{family}",
                partial(run, family=sized(family, spec.attention.head_sizes)),
                f"{family}: {about}",
                needs,
                # Where requests run one by one, none takes another's blocks.
                supported=lambda spec, run=run: run is not preempted or spec.batch.max_requests != 1,  # type: ignore[misc]
                profile=profile,
                timeout_s=180.0,
                is_waivable=run not in _STRICT,
            )
